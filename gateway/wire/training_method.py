"""How a job is to train: `method`, the older `hyperparameters` and our options in `tunegate`, read as one. Pure.

OpenAI's SDK knows the types supervised, dpo and reinforcement, and checks replies for them: KTO and ORPO are asked for with
`tunegate.method` and answered as dpo. Its tests send every type's block at once: only the one that `type` names is meant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from gateway.errors import RequestError
from gateway.jobdir import Method
from gateway.wire.fields import show
from gateway.wire.training_options import BETA, HYPERPARAMETERS, OPTIONS, read_values

VARIANTS = ("kto", "orpo")  # of preference tuning, beside dpo
TYPES = ("supervised", "dpo", "reinforcement")

MethodType = Literal["supervised", "dpo"]


@dataclass(frozen=True)
class HowToTrain:
    """`hyperparameters` has all keys of the method, "auto" where unset; `options` only what was asked for, by our names.

    `places` says where in the request each option stands, for errors that only the base or its engine gives rise to.
    """

    method: Method
    hyperparameters: dict[str, int | float | str]
    options: dict[str, Any]
    places: dict[str, str] = field(default_factory=dict)


def method_type(method: Method) -> MethodType:
    """What OpenAI calls it."""
    return "supervised" if method == "supervised" else "dpo"


def parse_how(method: Any, older: Any, tunegate: Mapping[str, Any]) -> HowToTrain:
    """Raises RequestError that names the field, its value and the rule."""
    kind = _type(method)
    variant = _variant(tunegate.get("method"), kind)
    kind = "dpo" if variant else kind or "supervised"
    block, where = _block(method, kind, older)
    known = {**HYPERPARAMETERS, **(BETA if kind == "dpo" else {})}
    hyperparameters: dict[str, int | float | str] = dict.fromkeys(known, "auto")
    hyperparameters |= read_values(block, known, where)
    inner = read_values(block, OPTIONS, where)
    beside = read_values(tunegate, OPTIONS, "tunegate.")
    for name in inner.keys() & beside.keys():
        if inner[name] != beside[name]:
            raise RequestError(
                f"tunegate.{name} is {show(beside[name])}, but {where}{name} is {show(inner[name])}; set it in one place.",
                param=f"tunegate.{name}",
            )
    places = {name: f"tunegate.{name}" for name in beside} | {name: f"{where}{name}" for name in inner}
    how = HowToTrain(cast("Method", variant or kind), hyperparameters, inner | beside, places)
    _refuse_nonsense(how, tunegate.get("turns"))
    return how


def _type(method: Any) -> MethodType | None:
    """None where there is no method."""
    if method is None:
        return None
    if not isinstance(method, dict):
        raise RequestError(
            f"method is {kind_of(method)}; it must be an object like {{'type': 'supervised'}}.", param="method"
        )
    kind = method.get("type")
    if kind == "reinforcement":
        raise RequestError(
            "The method 'reinforcement' is not available here; 'supervised' and 'dpo' are (and KTO and ORPO through "
            "tunegate.method).",
            param="method.type",
        )
    if kind not in ("supervised", "dpo"):
        raise RequestError(f"method.type is {show(kind)}; it must be 'supervised' or 'dpo'.", param="method.type")
    refuse_unknown(method, ("type", *TYPES), "method.")
    return cast("MethodType", kind)


def _variant(value: Any, kind: MethodType | None) -> str | None:
    if value is None:
        return None
    if value not in VARIANTS:
        raise RequestError(
            f"tunegate.method is {show(value)}; it must be 'kto' or 'orpo' ('supervised' and 'dpo' are asked for with "
            "method.type).",
            param="tunegate.method",
        )
    if kind == "supervised":
        raise RequestError(
            f"tunegate.method is '{value}', but method.type is 'supervised'; make it 'dpo', or leave method out.",
            param="tunegate.method",
        )
    return str(value)


def _block(method: Any, kind: str, older: Any) -> tuple[Mapping[str, Any], str]:
    """The hyperparameters that are meant, and where they stand: in the method's own block, else in the older field."""
    block = None if method is None else method.get(kind)
    where = f"method.{kind}"
    if block is not None:
        if not isinstance(block, dict):
            raise RequestError(
                f"{where} is {kind_of(block)}; it must be an object like {{'hyperparameters': {{…}}}}.", param=where
            )
        refuse_unknown(block, ("hyperparameters",), f"{where}.")
        block = block.get("hyperparameters")
        where = f"{where}.hyperparameters"
    known: tuple[str, ...] = (*HYPERPARAMETERS, *(BETA if kind == "dpo" else ()), *OPTIONS)
    if block is None:
        block, where, known = {} if older is None else older, "hyperparameters", tuple(HYPERPARAMETERS)
    if not isinstance(block, dict):
        raise RequestError(f"{where} is {kind_of(block)}; it must be an object like {{'n_epochs': 3}}.", param=where)
    if "beta" in block and "beta" not in known:
        raise RequestError(
            f"{where} takes no beta: it weighs preferences, and is set in method.dpo.hyperparameters with the type 'dpo'.",
            param=f"{where}.beta",
        )
    refuse_unknown(block, known, f"{where}.")
    return block, f"{where}."


def _refuse_nonsense(how: HowToTrain, turns: Any) -> None:
    """Options that are each right and together mean nothing."""
    options, places = how.options, how.places
    if how.method != "supervised":
        if options.get("packing"):
            raise RequestError(
                f"{places['packing']} is true, but {how.method} compares whole examples, which are not packed; leave it out.",
                param=places["packing"],
            )
        if options.get("train_on") == "all":
            raise RequestError(
                f"{places['train_on']} is 'all', but {how.method} learns from replies alone; make it 'assistant'.",
                param=places["train_on"],
            )
        if turns == "last":
            raise RequestError(
                f"tunegate.turns is 'last', but in the data of {how.method} it is said which replies count; leave it out.",
                param="tunegate.turns",
            )
    if options.get("train_on") == "all" and turns == "last":
        raise RequestError(
            f"{places['train_on']} is 'all', which learns every token, but tunegate.turns is 'last'; leave one out.",
            param=places["train_on"],
        )


def refuse_unknown(block: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for name in block:
        if name not in known:
            raise RequestError(
                f"Unrecognized request argument supplied: {where}{show(name, quoted=False)}. Known here: "
                f"{', '.join(known)}.",
                param=f"{where}{name[:100]}",
            )


def kind_of(value: Any) -> str:
    """What a value is, where it should have been an object."""
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), show(value))
