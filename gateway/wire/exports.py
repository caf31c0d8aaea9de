"""`/v1/models/{model}/export`, an extension of ours: a tuned model as a file to download. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gateway.errors import RequestError
from gateway.wire.fields import refuse_unknown, required_string, show, string
from gateway.wire.files import parse_expiry_object

FIELDS = ("to", "type", "expires_after")
# The forms, and the types of weights that each can have, the default first (a checkpoint's is that of its base). As
# `trainer.export` makes them; a test holds the two equal.
TYPES: dict[str, tuple[str, ...]] = {
    "hf": ("f32", "f16", "bf16"),
    "gguf": tuple(
        (
            "f16 bf16 q4_0 q4_1 q5_0 q5_1 q8_0 q2_k q3_k_s q3_k_m q3_k_l q4_k_s q4_k_m q5_k_s q5_k_m q6_k iq4_nl iq4_xs"
        ).split()
    ),
    "adapter": (),
}
DEFAULT_EXPIRY_S = 7 * 86_400  # it can be made again, and is large


@dataclass(frozen=True)
class ExportRequest:
    to: str
    type: str | None  # None: the default of `to`
    expires_after_s: int


def parse_export(body: Mapping[str, Any]) -> ExportRequest:
    """Raises RequestError."""
    refuse_unknown(body, FIELDS)
    to, kind = required_string(body, "to", 60), string(body, "type", 60)
    check_form(to, kind)
    expiry_s = parse_expiry_object(body.get("expires_after"), "fine-tune-results")
    return ExportRequest(to, kind, DEFAULT_EXPIRY_S if expiry_s is None else expiry_s)


def check_form(to: str, kind: str | None) -> None:
    """RequestError unless there is such a form, and it can have weights of the type (None: its default)."""
    if to not in TYPES:
        raise RequestError(f"'to' must be one of {', '.join(TYPES)}, not {show(to)}", param="to")
    if kind is None or kind in TYPES[to]:
        return
    if not TYPES[to]:
        raise RequestError(
            f"'type' is {show(kind)}, and an adapter is exported as it was trained: leave it out", param="type"
        )
    raise RequestError(f"'type' must be one of {', '.join(TYPES[to])} for '{to}', not {show(kind)}", param="type")
