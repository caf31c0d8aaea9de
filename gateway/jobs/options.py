"""What a job is asked to train with, made whole, and held against its base and the engines that will serve the result.

Its one rule: what an engine would refuse after the training is refused before the job is there, with the field that says it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from gateway.engines.catalog import Base
from gateway.errors import RequestError
from gateway.jobdir import Lora, Options
from gateway.jobs.target_modules import linear_modules

ALL_LINEAR = "all-linear"
QUANTISER = "bitsandbytes"  # looked for, never imported
LORA_FIELDS = {
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_target_modules": "target_modules",
    "use_rslora": "use_rslora",
}
OPTION_FIELDS = {
    "quantization": "quantization",
    "precision": "precision",
    "train_on": "train_on",
    "packing": "packing",
    "lr_scheduler": "scheduler",
    "warmup_ratio": "warmup_ratio",
    "weight_decay": "weight_decay",
    "early_stopping_patience": "early_stopping_patience",
    "checkpoint_steps": "checkpoint_steps",
}
KEPT = ("lora_rank", "lora_alpha", "lora_target_modules", "use_rslora")  # of an adapter that training goes on from


@dataclass(frozen=True)
class Settled:
    """As job.json has it."""

    lora: Lora
    options: Options
    max_length: int

    def to_json(self) -> dict[str, Any]:
        """By the names that clients use; what is off is left out."""
        shown = {name: getattr(self.lora, field) for name, field in LORA_FIELDS.items()}
        shown |= {name: getattr(self.options, field) for name, field in OPTION_FIELDS.items()}
        return {name: value for name, value in shown.items() if value is not None} | {"max_length": self.max_length}


def settle(asked: Mapping[str, Any], places: Mapping[str, str], base: Base, start: Lora | None) -> Settled:
    """`asked` over the defaults, or over those of the adapter in `start`. RequestError where base or engine cannot. Blocks."""
    lora = _lora(asked, places, base, start)
    _check_rank(lora.rank, places, base, start)
    if lora.target_modules != ALL_LINEAR and start is None:
        _check_modules(lora.target_modules.split(","), places, base)
    length = asked.get("max_length", base.context_length)
    if length > base.context_length:
        raise RequestError(
            f"{places['max_length']} is {length}, but '{base.name}' is served with a context of {base.context_length} "
            "tokens: what is longer could be trained and never used.",
            param=places["max_length"],
        )
    options = Options(**{field: asked[name] for name, field in OPTION_FIELDS.items() if name in asked})
    if options.quantization != "none" and find_spec(QUANTISER) is None:
        raise RequestError(
            f"{places['quantization']} is '{options.quantization}', which {QUANTISER} computes, and that is not installed on "
            f"this server: pip install 'tunegate[quantize]'. Leave it out to train on the base as it is served.",
            param=places["quantization"],
        )
    return Settled(lora, options, length)


def _lora(asked: Mapping[str, Any], places: Mapping[str, str], base: Base, start: Lora | None) -> Lora:
    wanted = {field: asked[name] for name, field in LORA_FIELDS.items() if name in asked}
    if start is None:
        return Lora(**wanted)
    for name in KEPT:
        is_kept = name not in asked or asked[name] == getattr(start, LORA_FIELDS[name])
        if is_kept or (name == "lora_target_modules" and _means_all(asked[name], start, base)):
            continue
        raise RequestError(
            f"{places[name]} is {asked[name]!r}, but the model that training goes on from has "
            f"{getattr(start, LORA_FIELDS[name])!r}, which cannot be changed any more; leave it out.",
            param=places[name],
        )
    return Lora(start.rank, start.alpha, wanted.get("dropout", start.dropout), start.target_modules, start.use_rslora)


def _means_all(asked: str, start: Lora, base: Base) -> bool:
    every = ",".join(linear_modules(base.prepared) or ())
    return {asked, start.target_modules} == {ALL_LINEAR, every}


def _check_rank(rank: int, places: Mapping[str, str], base: Base, start: Lora | None) -> None:
    limit = base.engine.max_lora_rank
    if rank <= limit:
        return
    whose = f"{places['lora_rank']} is {rank}" if "lora_rank" in places else f"jobs train rank {rank} unless they say"
    if start is not None:
        whose = f"the model that training goes on from has rank {rank}"
    raise RequestError(
        f"'{base.name}' is served by an engine that takes adapters of rank {limit} at most, and {whose}. Ask for a lora_rank "
        f"of {limit} or less, or start it with --max-lora-rank {rank} (`args` of its [[engines]] entry, `max_lora_rank` of "
        "one with `urls`).",
        param=places.get("lora_rank", "model"),
    )


def _check_modules(asked: list[str], places: Mapping[str, str], base: Base) -> None:
    found = linear_modules(base.prepared)
    if found is None:
        return
    if unknown := [name for name in asked if name not in found]:
        raise RequestError(
            f"{places['lora_target_modules']} names {', '.join(unknown)[:200]}, which '{base.name}' has not, or which no "
            f"engine serves an adapter of. Its linear layers are {', '.join(found)}; '{ALL_LINEAR}' stands for them all.",
            param=places["lora_target_modules"],
        )
