"""Every number and choice that a job may be asked to train with: its bounds, what they are called, their schema. Pure.

The one rule: a value is inside its bounds or refused with its name, the value and the rule; null is as good as absent.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from gateway.errors import RequestError
from gateway.jobdir import Precision, Quantization, Scheduler
from gateway.wire.fields import show

MAX_RANK = 512
MAX_ALPHA = 4096
MAX_LENGTH = 1 << 24
MAX_CHECKPOINT_STEPS = 1_000_000
MAX_PATIENCE = 1000
MAX_TARGET_MODULES = 64
MAX_MODULE_CHARS = 100
ALL_LINEAR = "all-linear"

_MODULE = re.compile(r"[A-Za-z0-9_]+")


@dataclass(frozen=True)
class Rule:
    """`read` gives the value as it is kept, None for one that the rule does not take; `says` is the rule in words."""

    read: Callable[[Any], Any]
    says: str
    schema: dict[str, Any]


def read_values(block: Mapping[str, Any], rules: Mapping[str, Rule], where: str) -> dict[str, Any]:
    """What `block` sets of `rules`, by name. RequestError for what breaks one; `where` is the block's name with a dot."""
    found = {}
    for name, rule in rules.items():
        value = block.get(name)
        if value is None:
            continue
        found[name] = rule.read(value)
        if found[name] is None:
            raise RequestError(f"{where}{name} is {show(value)}; it must be {rule.says}.", param=f"{where}{name}")
    return found


def _whole(low: int, high: int) -> Rule:
    def read(value: Any) -> int | None:
        return value if type(value) is int and low <= value <= high else None

    says = f"an integer from {low} to {high}"
    return Rule(read, says, {"type": "integer", "minimum": low, "maximum": high})


def _number(low: float, high: float, says: str, *, above: bool = False, below: bool = False) -> Rule:
    """`above` and `below`: the bound itself is not taken."""

    def read(value: Any) -> float | None:
        if type(value) not in (int, float) or not math.isfinite(value) or not low <= value <= high:
            return None
        return None if (above and value == low) or (below and value == high) else float(value)

    bounds = {"exclusiveMinimum" if above else "minimum": low, "exclusiveMaximum" if below else "maximum": high}
    return Rule(read, says, {"type": "number", **bounds})


def _choice(*names: str) -> Rule:
    def read(value: Any) -> str | None:
        return value if isinstance(value, str) and value in names else None

    return Rule(read, " or ".join(f"'{name}'" for name in names), {"type": "string", "enum": list(names)})


def _flag() -> Rule:
    return Rule(lambda value: value if isinstance(value, bool) else None, "true or false", {"type": "boolean"})


def _or_auto(rule: Rule) -> Rule:
    def read(value: Any) -> Any:
        return value if value == "auto" else rule.read(value)

    return Rule(read, f"'auto' or {rule.says}", {"anyOf": [{"type": "string", "enum": ["auto"]}, rule.schema]})


def _target_modules(value: Any) -> str | None:
    """As job.json has them: names with commas between, sorted, each once."""
    if value == ALL_LINEAR:
        return ALL_LINEAR
    if isinstance(value, str):
        value = [name.strip() for name in value.split(",", MAX_TARGET_MODULES)]
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_TARGET_MODULES:
        return None
    if not all(isinstance(n, str) and len(n) <= MAX_MODULE_CHARS and _MODULE.fullmatch(n) for n in value):
        return None
    return ",".join(sorted(set(value)))


# OpenAI's, of every method; "auto" where unset.
HYPERPARAMETERS: dict[str, Rule] = {
    "n_epochs": _or_auto(_whole(1, 50)),
    "batch_size": _or_auto(_whole(1, 256)),
    "learning_rate_multiplier": _or_auto(
        _number(0, 1e6, "a number greater than 0 (and at most 1e6)", above=True),
    ),
}
BETA: dict[str, Rule] = {"beta": _or_auto(_number(0, 2, "a number greater than 0 and at most 2", above=True))}

# Ours.
OPTIONS: dict[str, Rule] = {
    "lora_rank": _whole(1, MAX_RANK),
    "lora_alpha": _whole(1, MAX_ALPHA),
    "lora_dropout": _number(0, 1, "a number from 0 to less than 1", below=True),
    "lora_target_modules": Rule(
        _target_modules,
        f"'{ALL_LINEAR}' or a list of 1 to {MAX_TARGET_MODULES} names of modules such as 'q_proj'",
        {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]},
    ),
    "use_rslora": _flag(),
    "quantization": _choice(*get_args(Quantization)),
    "precision": _choice(*get_args(Precision)),
    "max_length": _whole(16, MAX_LENGTH),
    "train_on": _choice("assistant", "all"),
    "packing": _flag(),
    "lr_scheduler": _choice(*get_args(Scheduler)),
    "warmup_ratio": _number(0, 1, "a number from 0 to 1"),
    "weight_decay": _number(0, 1, "a number from 0 to 1"),
    "early_stopping_patience": _whole(1, MAX_PATIENCE),
    "checkpoint_steps": _whole(1, MAX_CHECKPOINT_STEPS),
}
