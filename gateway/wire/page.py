"""Lists as clients ask for them (`after`, `limit`, `order`) and see them (data, first_id, last_id, has_more). Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gateway.errors import RequestError

Order = Literal["asc", "desc"]


@dataclass(frozen=True)
class PageQuery:
    """At most `limit` items, after the one with the id `after`."""

    limit: int
    after: str | None
    order: Order


def parse_page(
    params: Mapping[str, str],
    *,
    default_limit: int = 20,
    max_limit: int = 100,
    default_order: Order = "desc",
) -> PageQuery:
    """The page that a list's query parameters ask for. Raises `RequestError`."""
    return PageQuery(
        limit=_parse_limit(params.get("limit"), default_limit, max_limit),
        after=params.get("after") or None,
        order=_parse_order(params.get("order") or default_order),
    )


def slice_page(items: Sequence[Mapping[str, Any]], query: PageQuery) -> tuple[list[Mapping[str, Any]], bool]:
    """The page of a list that is at hand, oldest first, and whether there is more."""
    ordered = list(items) if query.order == "asc" else list(reversed(items))
    if query.after is not None:
        ids = [item["id"] for item in ordered]
        ordered = ordered[ids.index(query.after) + 1 :] if query.after in ids else []
    return ordered[: query.limit], len(ordered) > query.limit


def list_body(data: Sequence[Mapping[str, Any]], has_more: bool) -> dict[str, Any]:
    """OpenAI's list object; every item has an `id`."""
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": has_more,
    }


def _parse_order(text: str) -> Order:
    if text == "asc":
        return "asc"
    if text == "desc":
        return "desc"
    raise RequestError(f"Invalid value for 'order': {text[:40]!r}. It is 'asc' or 'desc'.", param="order")


def _parse_limit(text: str | None, default: int, maximum: int) -> int:
    if text is None or text == "":
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 10) or int(text) > maximum:
        raise RequestError(
            f"Invalid value for 'limit': {text[:40]!r}. It is a whole number from 0 to {maximum}.", param="limit"
        )
    return int(text)
