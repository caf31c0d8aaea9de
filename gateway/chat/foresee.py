"""What an operator, a call or a filter of a template will cost, told before it is made: nothing can be stopped within one.

Place in the flow: sandbox → **foresee** → budget. One rule: a cost that cannot be foreseen is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from gateway.chat.budget import BITS_LIMIT, ITEM_WEIGHT, SIZE_LIMIT, Budget, Exceeded, check_weight

# Not in any chat template that is known: their cost cannot be foreseen.
REFUSED_METHODS = frozenset({"translate", "maketrans", "striptags", "unescape"})
_ENCODINGS = frozenset({"utf-8", "utf8", "ascii", "latin-1", "strict", "ignore", "replace"})  # others take their time
_WORK_LIMIT = 500_000_000  # characters times characters that one search or strip may compare: a twentieth of a second
_SLOW_LIMIT = 500_000  # characters for the filters that go through a text piece by piece: a quarter of a second
_GROUPED_LIMIT = 10_000  # items: they are sorted and gone through in one operation


def foresee_operator(budget: Budget, operator: str, left: Any, right: Any) -> None:
    sized = [value for value in (left, right) if isinstance(value, str | bytes | list | tuple)]
    if operator == "*" and sized:
        times = right if sized[0] is left else left
        if isinstance(times, int):
            budget.spend(_size(sized[0]) * max(0, times))
    elif operator == "+" and len(sized) == 2:
        budget.spend(_size(left) + _size(right))
    elif operator == "%" and isinstance(left, str | bytes):
        _foresee_format(budget, str(left), right if isinstance(right, tuple) else (right,))
    elif (
        operator == "**" and isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > BITS_LIMIT
    ):
        raise Exceeded("computes with numbers beyond all bounds")


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes) else ITEM_WEIGHT * len(value)


def foresee_call(budget: Budget, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Counts what a call is going to make, where that can be more than what it is given."""
    values = (*args, *kwargs.values())
    for value in values:
        if isinstance(value, int) and abs(value) > SIZE_LIMIT:
            raise Exceeded(f"calls something with the number {value}")
    method = getattr(function, "__wrapped__", function)  # Jinja's own wrapper of str.format
    owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
    if not isinstance(owner, str | bytes):
        if name == "fromkeys" and len(args) > 1:
            check_weight([args[1]])
        return args
    if name in REFUSED_METHODS:
        raise Exceeded(f"calls the method '{name}', which is not taken")
    if name in ("format", "format_map"):
        _foresee_format(budget, str(owner), values)
    elif name == "replace" and len(args) > 1:
        _foresee_replace(budget, owner, args[0], args[1])
    elif name == "expandtabs":
        size = values[0] if values and isinstance(values[0], int) else 8
        tabs = owner.count("\t") if isinstance(owner, str) else owner.count(b"\t")
        budget.spend(len(owner) + tabs * max(0, size))
    elif name in ("encode", "decode") and not _ENCODINGS.issuperset(values):
        raise Exceeded("encodes a text in a way that is not taken")
    elif name in _QUADRATIC and values:
        _foresee_work(owner, values[0])
    elif name == "join" and args and isinstance(args[0], str):
        budget.spend(len(args[0]) * (1 + len(owner)))
    elif name == "join" and args:
        items = [*args[0]] if hasattr(args[0], "__iter__") else args[0]
        if isinstance(items, list):
            budget.spend(sum(len(item) + len(owner) for item in items if isinstance(item, str | bytes)))
        return (items, *args[1:])
    return args


# The interpreter searches backwards, and strips, in time that both lengths multiply to, and nothing else runs meanwhile.
_QUADRATIC = frozenset({"lstrip", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "strip"})


def _foresee_work(text: Any, other: Any) -> None:
    if isinstance(other, str | bytes) and len(text) * len(other) > _WORK_LIMIT:
        raise Exceeded("looks for a long text in a long text from behind, or strips it of too many characters")


def _foresee_replace(budget: Budget, text: Any, old: Any, new: Any) -> None:
    if all(isinstance(value, str) for value in (text, old, new)) or all(isinstance(v, bytes) for v in (text, old, new)):
        budget.spend(len(text) + text.count(old) * max(0, len(new) - len(old)))


_FORMAT_NUMBER = re.compile(r"\d+")


def _foresee_format(budget: Budget, form: str, values: tuple[Any, ...]) -> None:
    """Widths and precisions add up; a value may be put in as often as there are fields; nested widths are not taken."""
    if "*" in form or re.search(r"\{[^{}]*\{[^{}]*\{?", form.replace("{{", "")):
        raise Exceeded("formats a text with widths that are computed, which is not taken")
    budget.spend(sum(int(number[:9]) for number in _FORMAT_NUMBER.findall(form)))
    fields = form.count("%") + form.count("{")
    check_weight(list(values))
    longest = max((len(str(value)) for value in values), default=0)
    budget.spend(len(form) + fields * longest)


def _foresee_join(budget: Budget, value: Any, d: Any = "", attribute: Any = None) -> list[Any] | None:
    if isinstance(value, str | dict) or not hasattr(value, "__iter__"):
        budget.spend(len(str(value)) * (1 + len(str(d))))
        return None
    items = list(value)
    texts = len(items) * len(str(d))
    if attribute is None:
        texts += sum(len(item) if isinstance(item, str) else len(str(item)) for item in items)
    else:
        check_weight(items)
    budget.spend(texts)
    return items


def _foresee_filter_replace(budget: Budget, s: Any, old: Any, new: Any, count: Any = None) -> None:
    _foresee_replace(budget, str(s), str(old), str(new))


def _foresee_indent(budget: Budget, s: Any, width: Any = 4, *rest: Any, **more: Any) -> None:
    wide = width if isinstance(width, int) else len(str(width))
    budget.spend(len(str(s)) + (str(s).count("\n") + 1) * max(0, wide))


def _foresee_width(budget: Budget, value: Any, width: Any = 80, *rest: Any, **more: Any) -> None:
    budget.spend(max(0, width) if isinstance(width, int) else 0)


def _foresee_trim(budget: Budget, value: Any, chars: Any = None) -> None:
    _foresee_work(str(value), chars)


def _foresee_slow(budget: Budget, value: Any, *rest: Any, **more: Any) -> None:
    if isinstance(value, str | bytes) and len(value) > _SLOW_LIMIT:
        raise Exceeded(f"puts a text of more than {_SLOW_LIMIT} characters through a slow filter")


def _foresee_few(budget: Budget, value: Any, number: Any = 1, *rest: Any, **more: Any) -> None:
    if isinstance(number, int) and abs(number) > 100_000:
        raise Exceeded(f"cuts a list into {number}")


def _foresee_groups(budget: Budget, value: Any, *rest: Any, **more: Any) -> list[Any]:
    items = list(value)
    if len(items) > _GROUPED_LIMIT:
        raise Exceeded(f"groups a list of more than {_GROUPED_LIMIT}")
    return items


def _foresee_round(budget: Budget, value: Any, precision: Any = 0, *rest: Any, **more: Any) -> None:
    if isinstance(precision, int) and abs(precision) > 300:
        raise Exceeded(f"rounds to {precision} digits")


def _foresee_filter_format(budget: Budget, value: Any, *args: Any, **kwargs: Any) -> None:
    _foresee_format(budget, str(value), (*args, *kwargs.values()))


def _foresee_sum(budget: Budget, iterable: Any, attribute: Any = None, start: Any = 0) -> list[Any]:
    items = list(iterable)
    if len(items) > 1000 and not isinstance(start, int | float):
        raise Exceeded("adds up a long list of lists")
    return items


def _foresee_json(budget: Budget, value: Any, *rest: Any, **options: Any) -> None:
    for option in (*rest, *options.values()):
        if (isinstance(option, int) and option > 16) or (isinstance(option, str) and len(option) > 16):
            raise Exceeded("writes JSON with an indent of more than 16")
        if isinstance(option, list | tuple) and any(len(str(text)) > 16 for text in option):
            raise Exceeded("writes JSON with separators of more than 16 characters")


FORESEEN: dict[str, Callable[..., list[Any] | None]] = {  # those that give a list have run through the first argument
    "batch": _foresee_few,
    "center": _foresee_width,
    "format": _foresee_filter_format,
    "groupby": _foresee_groups,
    "indent": _foresee_indent,
    "join": _foresee_join,
    "replace": _foresee_filter_replace,
    "round": _foresee_round,
    "slice": _foresee_few,
    "sum": _foresee_sum,
    "title": _foresee_slow,
    "tojson": _foresee_json,
    "trim": _foresee_trim,
    "truncate": _foresee_width,
    "urlencode": _foresee_slow,
    "wordcount": _foresee_slow,
}
