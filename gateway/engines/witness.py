"""The proof that an engine serves an adapter as it was trained: the trainer's log-probabilities, asked again of the engine.

witness.json, written by the trainer: {"items": [{"prompt_ids", "reply_ids", "base_logprobs", "tuned_logprobs"}]}, one
log-probability a reply token, under the base and under base + adapter. The engine scores the same ids under both names.

What is compared is tuned − base (what the adapter *does*): a wrong alpha, a lost q/k permutation or another base all change
it, while most of the engine's own rounding is in both terms and cancels. `compare` is pure; `verify` asks an engine.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway.engines.adapters import Adapter, AdapterRejected
from gateway.engines.control import EngineControl

MAX_WITNESS_BYTES = 16 << 20
MAX_ITEMS = 256


class WitnessMismatch(AdapterRejected):
    """The engine does not reproduce what the trainer saw."""

    code = "witness_mismatch"


@dataclass(frozen=True)
class Tolerances:
    """How far an engine may be from the trainer; see `tests/bench/witness_margins.py` for what they were set by."""

    relative_error: float = 0.3  # ‖Δ engine − Δ trainer‖ / ‖Δ trainer‖ over all reply tokens
    base_error: float = 0.25  # mean |engine − trainer| of the base's own log-probabilities, nats
    noise: float = 0.05  # root mean square of Δ below which an adapter does nothing that can be measured, nats


@dataclass(frozen=True)
class WitnessItem:
    """A prompt, a reply, and the trainer's log-probabilities of the reply's tokens."""

    prompt_ids: list[int]
    reply_ids: list[int]
    base_logprobs: list[float]
    tuned_logprobs: list[float]


@dataclass(frozen=True)
class WitnessReport:
    """What was compared. `warning` is set for an adapter that changes nothing measurable."""

    items: int
    tokens: int
    relative_error: float
    base_error: float  # mean |Δ|, nats
    effect: float  # root mean square of the trainer's tuned − base, nats
    scale: float  # least-squares factor between the engine's effect and the trainer's: 1.0 when all is well
    warning: str | None = None


async def verify(
    control: EngineControl, adapter: Adapter, tolerances: Tolerances | None = None, max_items: int | None = None
) -> WitnessReport:
    """Has the engine score the adapter's witness; WitnessMismatch when it is not what the trainer saw.

    `max_items` takes the shortest ones only: enough to see that a name stands for what it stood for before.
    """
    items = read_witness(adapter.path / "witness.json")
    if max_items is not None:
        items = sorted(items, key=lambda item: len(item.prompt_ids) + len(item.reply_ids))[:max_items]
    base: list[list[float]] = []
    tuned: list[list[float]] = []
    for item in items:
        base.append(await _score_reply(control, adapter.base, item))
        tuned.append(await _score_reply(control, adapter.engine_name, item))
    return compare(items, base, tuned, tolerances or Tolerances())


def compare(
    items: Sequence[WitnessItem],
    engine_base: Sequence[Sequence[float]],
    engine_tuned: Sequence[Sequence[float]],
    tolerances: Tolerances,
) -> WitnessReport:
    """The engine's log-probabilities against the trainer's, item by item; WitnessMismatch when they do not agree."""
    base = [value for values in engine_base for value in values]
    tuned = [value for values in engine_tuned for value in values]
    expected_base = [value for item in items for value in item.base_logprobs]
    expected_tuned = [value for item in items for value in item.tuned_logprobs]
    count = len(expected_base)
    if not (count == len(expected_tuned) == len(base) == len(tuned)):
        raise WitnessMismatch(f"the engine scored {len(base)} and {len(tuned)} tokens of the witness's {count}")
    if not all(math.isfinite(value) for value in (*base, *tuned)):
        raise WitnessMismatch("the engine's log-probabilities of the witness are not all finite numbers")

    base_error = sum(abs(got - want) for got, want in zip(base, expected_base, strict=True)) / count
    wanted = [after - before for before, after in zip(expected_base, expected_tuned, strict=True)]
    got = [after - before for before, after in zip(base, tuned, strict=True)]
    difference = [a - b for a, b in zip(got, wanted, strict=True)]
    norm = math.sqrt(math.fsum(value * value for value in wanted))
    effect = norm / math.sqrt(count)
    relative_error = math.sqrt(math.fsum(value * value for value in difference)) / norm if norm else math.inf
    scale = math.fsum(a * b for a, b in zip(got, wanted, strict=True)) / norm**2 if norm else math.nan
    report = WitnessReport(len(items), count, relative_error, base_error, effect, scale)

    if base_error > tolerances.base_error:
        raise WitnessMismatch(
            f"the base itself answers otherwise than in training: its log-probabilities differ by {base_error:.3f} nats "
            f"on average, {tolerances.base_error} are allowed; is it the same base, quantised the same way?"
        )
    if effect < tolerances.noise:
        engine_effect = math.sqrt(math.fsum(value * value for value in got) / count)
        if engine_effect > effect + 2 * tolerances.noise:
            raise WitnessMismatch(
                f"the adapter did next to nothing in training ({effect:.4f} nats), but {engine_effect:.4f} nats here"
            )
        return WitnessReport(
            **{**vars(report), "warning": f"the adapter changes next to nothing ({effect:.4f} nats a token)"}
        )
    if relative_error > tolerances.relative_error:
        raise WitnessMismatch(
            f"the adapter does something else here than in training: its effect differs by {relative_error:.0%} of its "
            f"size, {tolerances.relative_error:.0%} are allowed ({scale:.2f} times as strong; a factor near 1 points to "
            "the weights' order or another base, another factor to alpha)"
        )
    return report


def read_witness(path: Path) -> list[WitnessItem]:
    """The items of a witness.json, every value checked; AdapterRejected when it cannot be used."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_WITNESS_BYTES + 1)
        if len(content) > MAX_WITNESS_BYTES:
            raise AdapterRejected(f"witness.json has more than {MAX_WITNESS_BYTES} bytes")
        raw = json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterRejected(f"witness.json cannot be read: {error}") from error
    entries = raw.get("items") if isinstance(raw, dict) else None
    if not isinstance(entries, list) or not 0 < len(entries) <= MAX_ITEMS:
        raise AdapterRejected(f"witness.json must hold 1 to {MAX_ITEMS} items")
    return [_item(entry, index) for index, entry in enumerate(entries)]


def _item(entry: Any, index: int) -> WitnessItem:
    names = ("prompt_ids", "reply_ids", "base_logprobs", "tuned_logprobs")
    if not isinstance(entry, dict) or not all(isinstance(entry.get(name), list) and entry[name] for name in names):
        raise AdapterRejected(f"item {index} of witness.json must hold {', '.join(names)}, none of them empty")
    prompt_ids, reply_ids, base, tuned = (entry[name] for name in names)
    if not all(type(value) is int and value >= 0 for value in (*prompt_ids, *reply_ids)):
        raise AdapterRejected(f"item {index} of witness.json has ids that are not token ids")
    if not all(type(value) in (int, float) and math.isfinite(value) for value in (*base, *tuned)):
        raise AdapterRejected(f"item {index} of witness.json has log-probabilities that are not finite numbers")
    if not len(reply_ids) == len(base) == len(tuned):
        raise AdapterRejected(
            f"item {index} of witness.json has {len(reply_ids)} reply ids, but other numbers of values"
        )
    return WitnessItem(prompt_ids, reply_ids, base, tuned)


async def _score_reply(control: EngineControl, model: str, item: WitnessItem) -> list[float]:
    scores = await control.score(model, item.prompt_ids + item.reply_ids)
    return [math.nan if score is None else score for score in scores[len(item.prompt_ids) :]]
