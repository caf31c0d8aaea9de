"""`metadata`: the pairs that a client hangs on an object, and the filter that lists take by them. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from gateway.errors import RequestError
from gateway.wire.fields import show

MAX_PAIRS = 16
MAX_KEY_CHARS = 64
MAX_VALUE_CHARS = 512

_FILTER = re.compile(r"metadata\[(.*)\]", re.DOTALL)


def parse_metadata(value: Any) -> dict[str, str] | None:
    """At most 16 pairs of strings; None when absent or null. Raises RequestError."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise RequestError(
            f"metadata is {show(value)}; it must be an object of strings like {{'team': 'a'}}.", param="metadata"
        )
    if len(value) > MAX_PAIRS:
        raise RequestError(f"metadata has {len(value)} pairs; at most {MAX_PAIRS} are taken.", param="metadata")
    for key, text in value.items():
        if not 1 <= len(key) <= MAX_KEY_CHARS or "\0" in key:  # which no database looks up
            raise RequestError(
                f"The metadata key {show(key)} must have 1 to {MAX_KEY_CHARS} characters, none of them NUL; it has "
                f"{len(key)}.",
                param="metadata",
            )
        if not isinstance(text, str) or len(text) > MAX_VALUE_CHARS:
            raise RequestError(
                f"metadata.{key} is {show(text)}; it must be a string of at most {MAX_VALUE_CHARS} characters.",
                param=f"metadata.{key}",
            )
    return dict(value)


def parse_metadata_filter(query: Mapping[str, str], what: str) -> dict[str, str] | Literal["none"] | None:
    """`metadata[k]=v` as pairs that must all be there; "none" for `metadata=null`, None for all. `what` is listed."""
    pairs = {m[1]: v for k, v in query.items() if (m := _FILTER.fullmatch(k))}
    bare = query.get("metadata")
    if bare is not None:
        if bare not in ("null", "") or pairs:
            raise RequestError(
                f"metadata={show(bare)} is not a filter: write metadata[key]=value, or metadata=null for {what} "
                "without metadata.",
                param="metadata",
            )
        return "none"
    return parse_metadata(pairs) if pairs else None
