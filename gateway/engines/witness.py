"""The proof that an engine serves an adapter as it was trained: the trainer's log-probabilities, asked again of the engine.

witness.json, written by the trainer: {"items": [{"prompt_ids", "reply_ids", "base_logprobs", "tuned_logprobs"}]}, one
log-probability a reply token, under the base and under base + adapter. The engine scores the same ids under both names.

What is compared is tuned − base (what the adapter *does*): a wrong alpha, a lost q/k permutation or another base all change
it, while most of the engine's own rounding is in both terms and cancels. `compare` is pure; `verify` asks an engine.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
    """How far an engine may be from the trainer; `tests/bench/witness_margins.py` shows what they were set by."""

    base_error: float = 0.2  # engine − trainer of the base's own log-probabilities, root mean square, nats
    relative_error: float = 0.06  # of the effect's size …
    noise_factor: float = 2.5  # … and so many times the engine's own rounding, as its scores of the base show it
    floor: float = 0.01  # nats
    scale_error: float = 0.1  # how far from 1 the factor between the two effects may be
    measurable: float = 3.0  # an effect of fewer times the rounding (or of fewer than 2 floors) proves little


@dataclass(frozen=True)
class WitnessItem:
    """A prompt, a reply, and the trainer's log-probabilities of the reply's tokens."""

    prompt_ids: list[int]
    reply_ids: list[int]
    base_logprobs: list[float]
    tuned_logprobs: list[float]


@dataclass(frozen=True)
class WitnessReport:
    """What was compared, in nats a token (root mean squares). `warning`: it proves little."""

    items: int
    tokens: int
    effect: float  # of the adapter, as the trainer saw it: tuned − base
    error: float  # of the engine's effect against the trainer's
    noise: float  # of the engine's base against the trainer's
    scale: float | None  # least-squares factor between the engine's effect and the trainer's; None without any effect
    warning: str | None = None


async def verify(
    control: EngineControl,
    adapter: Adapter,
    base_name: str,
    tolerances: Tolerances | None = None,
    max_items: int | None = None,
) -> WitnessReport:
    """Has the engine score the adapter's witness; WitnessMismatch when it is not what the trainer saw.

    `base_name` is the base's at the engine.

    `max_items` takes the shortest ones only: enough to see that a name stands for what it stood for before.
    """
    items = await asyncio.to_thread(read_witness, adapter.path / "witness.json")
    if max_items is not None:
        items = sorted(items, key=lambda item: len(item.prompt_ids) + len(item.reply_ids))[:max_items]
    base: list[list[float]] = []
    tuned: list[list[float]] = []
    for item in items:
        base.append(await _score_reply(control, base_name, item))
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

    wanted = [after - before for before, after in zip(expected_base, expected_tuned, strict=True)]
    got = [after - before for before, after in zip(base, tuned, strict=True)]
    effect = _root_mean_square(wanted)
    report = WitnessReport(
        items=len(items),
        tokens=count,
        effect=effect,
        error=_root_mean_square([a - b for a, b in zip(got, wanted, strict=True)]),
        noise=_root_mean_square([a - b for a, b in zip(base, expected_base, strict=True)]),
        scale=math.fsum(a * b for a, b in zip(got, wanted, strict=True)) / (effect**2 * count) if effect else None,
    )
    _judge(report, tolerances)
    if effect < max(tolerances.measurable * report.noise, 2 * tolerances.floor):
        little = f"the adapter changes next to nothing: {effect:.4f} nats a token, with {report.noise:.4f} of rounding"
        return replace(report, warning=little)
    return report


def _judge(report: WitnessReport, allowed: Tolerances) -> None:
    if report.noise > allowed.base_error:
        raise WitnessMismatch(
            f"the base itself answers otherwise than in training: its log-probabilities are off by {report.noise:.3f} "
            f"nats a token, {allowed.base_error} are allowed; is it the same base, quantised the same way?"
        )
    limit = allowed.relative_error * report.effect + allowed.noise_factor * report.noise + allowed.floor
    # A wrong strength shows in the factor even where the error drowns in the rounding, which is no factor.
    doubt = 4 * report.noise / (report.effect * math.sqrt(report.tokens)) if report.effect else math.inf
    scale_is_off = report.scale is not None and abs(report.scale - 1) > allowed.scale_error + doubt
    if report.error > limit or (scale_is_off and report.effect > 2 * allowed.floor):
        scale = "" if report.scale is None else f", and is {report.scale:.2f} times as strong"
        raise WitnessMismatch(
            f"the adapter does something else here than in training: its effect of {report.effect:.3f} nats a token is off by "
            f"{report.error:.3f}{scale}; up to {limit:.3f} is rounding (a factor far from 1 points to alpha, else to the "
            "order of the weights or to another base)"
        )


def _root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(math.fsum(value * value for value in values) / len(values))


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
