"""`integrations` of a job: who else is told how training goes. OpenAI's SDK knows wandb alone, so that is what it is shown.

The one rule: nothing here is a secret. Keys are the operator's, never a request's; a field that we do not know is refused
without its value being said. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from gateway.errors import RequestError
from gateway.wire.fields import show
from gateway.wire.training_method import kind_of, refuse_unknown

MAX_INTEGRATIONS = 5
MAX_NAME_CHARS = 128
MAX_TAGS = 32
MAX_TAG_CHARS = 64
TRACKERS = ("tensorboard", "mlflow")  # asked for with `tunegate.tracking`
WANDB_FIELDS = ("project", "name", "entity", "tags")

_FORBIDDEN = re.compile(r"[/\\#?%:]")  # by W&B, in what becomes part of an address


def parse_integrations(value: Any, tracking: Any) -> tuple[dict[str, Any], ...]:
    """Each as job.json has it: {"type": "wandb", "wandb": {…}}, {"type": "tensorboard"}. Raises RequestError."""
    if value is None:
        value = []
    if not isinstance(value, list) or len(value) > MAX_INTEGRATIONS:
        shown = f"a list of {len(value)}" if isinstance(value, list) else kind_of(value)
        raise RequestError(
            f"integrations is {shown}; it must be a list of at most {MAX_INTEGRATIONS} objects.", param="integrations"
        )
    wandb = [_integration(item, f"integrations[{number}]") for number, item in enumerate(value)]
    return (*wandb, *({"type": name} for name in _tracking(tracking)))


def shown_integrations(integrations: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Those that the SDK knows."""
    return [dict(item) for item in integrations if item["type"] == "wandb"]


def shown_tracking(integrations: Iterable[Mapping[str, Any]]) -> list[str]:
    """The others, as `tunegate.tracking` names them."""
    return [item["type"] for item in integrations if item["type"] != "wandb"]


def _integration(item: Any, where: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise RequestError(
            f"{where} is {kind_of(item)}; it must be an object like {{'type': 'wandb', 'wandb': {{…}}}}.", param=where
        )
    refuse_unknown(item, ("type", "wandb"), f"{where}.")
    if item.get("type") != "wandb":
        raise RequestError(
            f"{where}.type is {show(item.get('type'))}; it must be 'wandb' (tunegate.tracking takes "
            f"{' and '.join(TRACKERS)}).",
            param=f"{where}.type",
        )
    block, where = item.get("wandb"), f"{where}.wandb"
    if not isinstance(block, dict):
        raise RequestError(
            f"{where} is {kind_of(block)}; it must be an object like {{'project': 'lamps'}}.", param=where
        )
    refuse_unknown(block, WANDB_FIELDS, f"{where}.")
    if block.get("project") is None:
        raise RequestError(
            f"You must provide {where}.project: the project at Weights & Biases.", param=f"{where}.project"
        )
    return {
        "type": "wandb",
        "wandb": {
            "project": _name(block["project"], f"{where}.project", _FORBIDDEN),
            "name": None if block.get("name") is None else _name(block["name"], f"{where}.name"),
            "entity": None if block.get("entity") is None else _name(block["entity"], f"{where}.entity", _FORBIDDEN),
            "tags": _tags(block.get("tags"), f"{where}.tags"),
        },
    }


def _name(value: Any, where: str, forbidden: re.Pattern[str] | None = None) -> str:
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_NAME_CHARS or not value.isprintable():
        raise RequestError(
            f"{where} is {show(value)}; it must be a printable string of 1 to {MAX_NAME_CHARS} characters.", param=where
        )
    if forbidden is not None and forbidden.search(value):
        raise RequestError(f"{where} is {show(value)}; Weights & Biases takes none of / \\ # ? % : in it.", param=where)
    return value


def _tags(value: Any, where: str) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, list) or len(value) > MAX_TAGS:
        raise RequestError(f"{where} must be a list of at most {MAX_TAGS} strings.", param=where)
    for tag in value:
        if not isinstance(tag, str) or not 1 <= len(tag) <= MAX_TAG_CHARS or not tag.isprintable():
            raise RequestError(
                f"{where} has {show(tag)}; each tag must be a printable string of 1 to {MAX_TAG_CHARS} characters.",
                param=where,
            )
    return list(dict.fromkeys(value))


def _tracking(value: Any) -> list[str]:
    where = "tunegate.tracking"
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(name, str) and name in TRACKERS for name in value):
        raise RequestError(
            f"{where} is {show(value)}; it must be a list of {' and '.join(TRACKERS)} (Weights & Biases is asked for in "
            "'integrations').",
            param=where,
        )
    return list(dict.fromkeys(value))
