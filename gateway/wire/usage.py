"""Usage on the wire: OpenAI's query of buckets becomes a `UsageQuery`, sums become its page. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gateway.errors import RequestError

# Width → seconds, buckets by default, buckets at most.
WIDTHS = {"1m": (60, 60, 1440), "1h": (3600, 24, 168), "1d": (86400, 7, 31)}
GROUPS = {"project_id": "project_id", "api_key_id": "key_id", "model": "model", "batch": "is_batch"}
FILTERS = {"project_ids": "project_id", "api_key_ids": "key_id", "models": "model"}
MAX_VALUES = 100
MAX_TIME = 1 << 40


@dataclass(frozen=True)
class UsageQuery:
    """`limit` buckets of `width_s` from `begin` on, none of them beginning at or after `end`."""

    begin: int
    end: int
    width_s: int
    limit: int
    group_by: tuple[str, ...] = ()  # columns of the store
    wanted: dict[str, list[Any]] = field(default_factory=dict)


def parse_usage(params: Sequence[tuple[str, str]], now: int) -> UsageQuery:
    """Raises RequestError that names the parameter."""
    known = {"start_time", "end_time", "bucket_width", "limit", "page", "group_by", "batch", "user_ids", *FILTERS}
    values: dict[str, list[str]] = {}
    for name, value in params:
        name = name.removesuffix("[]")
        if name not in known:
            raise RequestError(
                f"Unknown parameter: {name[:60]!r}. There are: {', '.join(sorted(known))}.", param=name[:60]
            )
        values.setdefault(name, []).append(value)
        if len(values[name]) > MAX_VALUES:
            raise RequestError(f"'{name}' has more than {MAX_VALUES} values.", param=name)
    width = values.get("bucket_width", ["1d"])[-1]
    if width not in WIDTHS:
        raise RequestError(f"'bucket_width' is {width[:40]!r}; it is one of {', '.join(WIDTHS)}.", param="bucket_width")
    width_s, usual, most = WIDTHS[width]
    begin = _number(values, "start_time", None, MAX_TIME)
    begin -= begin % width_s
    end = _number(values, "end_time", now + 1, MAX_TIME)
    if end <= begin:
        raise RequestError(f"'end_time' is {end}; it must be after 'start_time', {begin}.", param="end_time")
    begin = max(begin, _number(values, "page", begin, MAX_TIME))
    limit = _number(values, "limit", usual, most)
    wanted: dict[str, list[Any]] = {column: values[name] for name, column in FILTERS.items() if name in values}
    if "user_ids" in values:
        wanted["key_id"] = []  # there are no users here: nothing is theirs
    if "batch" in values:
        text = values["batch"][-1]
        if text not in ("true", "false"):
            raise RequestError(f"'batch' is {text[:40]!r}; it is true or false.", param="batch")
        wanted["is_batch"] = [text == "true"]
    groups = values.get("group_by", [])
    for group in groups:
        if group not in GROUPS and group not in ("user_id", "service_tier"):
            raise RequestError(f"'group_by' holds {group[:40]!r}; there are {', '.join(GROUPS)}.", param="group_by")
    return UsageQuery(begin, end, width_s, max(limit, 1), tuple(GROUPS[g] for g in groups if g in GROUPS), wanted)


def usage_page(query: UsageQuery, kind: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The page of the buckets that a query asks for, empty ones too; `rows` are the sums of `store.metering`."""
    first_after = query.begin + query.limit * query.width_s
    by_bucket: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        by_bucket.setdefault(query.begin + row["bucket"], []).append(_result(query, kind, row))
    begins = range(query.begin, min(first_after, query.end), query.width_s)
    data = [
        {
            "object": "bucket",
            "start_time": begin,
            "end_time": min(begin + query.width_s, query.end),
            "results": by_bucket.get(begin, []),
        }
        for begin in begins
    ]
    has_more = first_after < query.end
    return {"object": "page", "data": data, "has_more": has_more, "next_page": str(first_after) if has_more else None}


def _result(query: UsageQuery, kind: str, row: Mapping[str, Any]) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "object": f"organization.usage.{kind}.result",
        "input_tokens": row["input_tokens"],
        "num_model_requests": row["requests"],
        "project_id": row.get("project_id"),
        "user_id": None,
        "api_key_id": (row["key_id"] or None) if "key_id" in query.group_by else None,
        "model": row.get("model"),
    }
    if kind == "completions":
        shown |= {
            "output_tokens": row["output_tokens"],
            "input_cached_tokens": row["cached_tokens"],
            "input_audio_tokens": 0,
            "output_audio_tokens": 0,
            "batch": bool(row["is_batch"]) if "is_batch" in query.group_by else None,
            "service_tier": None,
        }
    return shown


def _number(values: Mapping[str, list[str]], name: str, default: int | None, most: int) -> int:
    if name not in values:
        if default is None:
            raise RequestError(f"You must provide '{name}', in unix seconds.", param=name)
        return default
    text = values[name][-1]
    if not (text.isascii() and text.isdigit() and len(text) < 15) or int(text) > most:
        raise RequestError(f"'{name}' is {text[:40]!r}; it is a whole number from 0 to {most}.", param=name)
    return int(text)
