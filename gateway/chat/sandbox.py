"""Jinja with bounds: a stranger's template sees plain data, changes nothing, and is stopped when it takes or makes too much.

Place in the flow: jinja → **sandbox**. One rule: whatever a template can do either takes a step of the budget first or is known
beforehand to be small. Loops, calls, filters, comparisons and all that makes new values are routed through the budget when the
template is compiled; a template cannot name, replace or catch what it is routed through.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jinja2
from jinja2 import nodes, pass_context
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from gateway.chat.conversation import RenderError
from gateway.chat.tokenizer import MARK_END, MARK_START

SOURCE_LIMIT = 128 * 1024  # characters of a template
NODE_LIMIT = 60_000  # of its syntax tree: what compiling takes grows with it
TIME_LIMIT_S = 0.5
STEP_LIMIT = 2_000_000
SIZE_LIMIT = 8 * 1024 * 1024  # characters of a text; a list or a mapping counts with all that it holds
TOTAL_LIMIT = 128 * 1024 * 1024  # of all texts that one rendering makes
QUICK_STEPS, QUICK_SIZE = 4_000, 256 * 1024  # what may be spent where nobody may be kept waiting: some 3 ms
_DEPTH_LIMIT = 60
_BITS_LIMIT = 4096
_ITEM_WEIGHT = 16

_BUDGET, _NOW = "tunegate budget", "tunegate now"  # with a space in it, no template can name it
_TICK, _KEEP, _CONCAT = "tunegate tick", "tunegate keep", "tunegate concat"

# Not in any chat template that is known: their cost cannot be foreseen, or they answer differently each time.
REFUSED_FILTERS = frozenset({"pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr"})
REFUSED_METHODS = frozenset({"translate", "maketrans", "striptags", "unescape"})
_ENCODINGS = frozenset({"utf-8", "utf8", "ascii", "latin-1", "strict", "ignore", "replace"})  # others take their time
_WORK_LIMIT = 500_000_000  # characters times characters that one search or strip may compare: a twentieth of a second
_SLOW_LIMIT = 500_000  # characters for the filters that go through a text piece by piece: a quarter of a second
_GROUPED_LIMIT = 10_000  # items: they are sorted and gone through in one operation
REFUSED_TAGS = "autoescape, include, import, extends"


class Exceeded(Exception):
    """A bound was met. No ValueError, since Jinja's own filters catch those."""


class TooLong(RenderError):
    """The text may be fine, but takes longer to write than the caller can wait."""


def render(
    template: str, variables: Mapping[str, Any], now: datetime.datetime | None = None, quick: bool = False
) -> str:
    """The text that a template writes. Raises RenderError when it fails, refuses, or exceeds its bounds.

    `now` is what `strftime_now` tells. `quick` gives it a few milliseconds' worth of steps and raises TooLong beyond.
    """
    budget = Budget(QUICK_STEPS, QUICK_SIZE) if quick else Budget()
    given = {"tools": None, "documents": None, **variables, _BUDGET: budget, _NOW: now or datetime.datetime.now()}
    parts: list[str] = []
    size = 0
    try:
        for part in compiled(template).generate(given):
            parts.append(part)
            size += len(part)
            if size > SIZE_LIMIT:
                raise Exceeded(f"wrote more than {SIZE_LIMIT} characters")
    except Exceeded as error:
        if quick:
            raise TooLong(f"the chat template {error}") from error
        raise RenderError(f"the chat template {error}") from error
    except RenderError:
        raise
    except jinja2.TemplateError as error:
        raise RenderError(f"the chat template failed: {error.message or type(error).__name__}"[:500]) from error
    except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError, RecursionError, MemoryError) as error:
        raise RenderError(f"the chat template failed: {type(error).__name__}: {error}"[:500]) from error
    return "".join(parts)


@functools.lru_cache(maxsize=256)
def compiled(template: str) -> jinja2.Template:
    """The template made ready. Raises RenderError when it is none. Takes up to a second for one of the largest size."""
    if len(template) > SOURCE_LIMIT:
        raise RenderError(f"the chat template has {len(template)} characters; at most {SOURCE_LIMIT} are taken")
    try:
        return _environment().from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise RenderError(f"the chat template is not valid Jinja: line {error.lineno}: {error.message}") from error
    except (RecursionError, MemoryError, SyntaxError, OverflowError) as error:
        raise RenderError(f"the chat template nests too deep ({type(error).__name__})") from error


def literal_text(template: str) -> str:
    """All that a template may write of itself: its text and its string constants, NUL between them."""
    found = _environment().bare_tree(template)
    literals = {node.data for node in found.find_all(nodes.TemplateData)}
    literals |= {node.value for node in found.find_all(nodes.Const) if isinstance(node.value, str)}
    return "\0".join(sorted(literals))


class Budget:
    """What one rendering may still spend."""

    __slots__ = ("_deadline", "_room", "_steps")

    def __init__(self, steps: int = STEP_LIMIT, room: int = TOTAL_LIMIT) -> None:
        self._steps, self._room = steps, room
        self._deadline = time.monotonic() + TIME_LIMIT_S

    def tick(self) -> None:
        self._steps -= 1
        if self._steps < 0 or time.monotonic() > self._deadline:
            raise Exceeded(f"ran for more than {TIME_LIMIT_S} s or {STEP_LIMIT} steps")

    def spend(self, size: int) -> None:
        """Counts a text of `size` characters. To be called before it is made, where its size can be foreseen."""
        if size > SIZE_LIMIT:
            raise Exceeded(f"makes a text or list of more than {SIZE_LIMIT} characters")
        self._room -= size
        if self._room < 0:
            raise Exceeded(f"makes more than {TOTAL_LIMIT} characters of text")

    def keep(self, value: Any) -> Any:
        """A new value, once it is known to be within bounds; what comes bit by bit is counted as it comes."""
        if isinstance(value, str | bytes):
            self.spend(len(value))
        elif isinstance(value, int):
            if value.bit_length() > _BITS_LIMIT:
                raise Exceeded("computes with numbers beyond all bounds")
        elif isinstance(value, list | tuple | dict | set | frozenset):
            self.spend(_ITEM_WEIGHT * len(value))
            _check_weight(value)
        elif hasattr(value, "__next__"):
            return self._watched(value)
        return value

    def _watched(self, values: Iterator[Any]) -> Iterator[Any]:
        for value in values:
            self.tick()
            yield value


def _check_weight(value: Any) -> None:
    """Raises where all that a value holds, counted as often as it is in there, is too much: printing it would be too."""
    total, level = 0, [value]
    for _ in range(_DEPTH_LIMIT):
        below: list[Any] = []
        for held in level:
            if isinstance(held, str | bytes):
                total += len(held)
            elif isinstance(held, dict):
                total += 2 * _ITEM_WEIGHT * len(held)
                below += held.keys()
                below += held.values()
            elif isinstance(held, _HOLDERS):
                items: Any = held
                total += _ITEM_WEIGHT * len(items)
                below += items
            if total > SIZE_LIMIT:
                raise Exceeded(f"makes a list of more than {SIZE_LIMIT} characters")
        if not below:
            return
        level = below
    raise Exceeded(f"nests lists more than {_DEPTH_LIMIT} deep")


_HOLDERS: tuple[type[Any], ...] = (list, tuple, set, frozenset, type({}.keys()), type({}.values()), type({}.items()))


class _Routes(NodeTransformer):
    """Puts the budget into a syntax tree."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        if node.test is not None:
            node.test = _filtered(_TICK, node.test)  # type: ignore[arg-type]
        node.body.insert(0, _step(node))
        return node

    def visit_body(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, _step(node))
        return node  # type: ignore[no-any-return]

    visit_Macro = visit_CallBlock = visit_Block = visit_FilterBlock = visit_body

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(_CONCAT, node.nodes[0], *node.nodes[1:])

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(_TICK, node)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(_KEEP, node, nodes.Const(True)) if isinstance(node.arg, nodes.Slice) else node

    def visit_List(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(_KEEP, node)

    visit_Dict = visit_List

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(_KEEP, node) if node.ctx == "load" else node

    def visit_refused(self, node: nodes.Node) -> nodes.Node:
        raise jinja2.TemplateSyntaxError(f"the tags {REFUSED_TAGS} are not taken in chat templates", node.lineno)

    visit_Include = visit_Import = visit_FromImport = visit_Extends = visit_refused
    visit_ScopedEvalContextModifier = visit_EvalContextModifier = visit_refused


def _step(node: Any) -> nodes.Node:
    """One step of the budget, and room for all text that the body may write at one go."""
    written = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
    return nodes.ExprStmt(_filtered(_TICK, nodes.Const(None), nodes.Const(written))).set_lineno(node.lineno)


def _filtered(name: str, node: nodes.Expr, *arguments: nodes.Expr) -> nodes.Filter:
    made = nodes.Filter(node, name, list(arguments), [], None, None)
    made.set_lineno(node.lineno or 1, override=False)
    return made


@pass_context
def _tick(context: Context, value: Any, written: int = 0) -> Any:
    budget: Budget = context.parent[_BUDGET]
    budget.tick()
    if written:
        budget.spend(written)
    return value


@pass_context
def _keep(context: Context, value: Any, part: bool = False) -> Any:
    budget: Budget = context.parent[_BUDGET]
    budget.tick()
    if part and isinstance(value, list | tuple):  # of a list that was weighed when it was made
        budget.spend(_ITEM_WEIGHT * len(value))
        return value
    return budget.keep(value)


@pass_context
def _concat(context: Context, *values: Any) -> str:
    budget: Budget = context.parent[_BUDGET]
    budget.tick()
    texts = [str(value) for value in values]
    budget.spend(sum(map(len, texts)))
    return "".join(texts)


@pass_context
def _finalize(context: Context, value: Any) -> str:
    budget: Budget = context.parent[_BUDGET]
    budget.tick()
    text = str(value)
    budget.spend(len(text))
    return text


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here it says nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with bounds on what its operators, calls and filters may make."""

    intercepted_binops = frozenset({"+", "*", "**", "%", "//", "/", "-"})

    def bare_tree(self, source: str) -> nodes.Template:
        return super()._parse(source, None, None)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        count = sum(1 for _ in tree.find_all(nodes.Node))
        if count > NODE_LIMIT:
            raise jinja2.TemplateSyntaxError(f"it has {count} parts; at most {NODE_LIMIT} are taken", 1)
        _Routes().visit(tree)
        return tree

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget: Budget = context.parent[_BUDGET]
        budget.tick()
        _foresee_operator(budget, operator, left, right)
        return budget.keep(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        # Named as Jinja names them, so that a keyword of a macro may be called anything.
        budget: Budget = __context.parent[_BUDGET]
        budget.tick()
        args = _foresee_call(budget, __obj, args, kwargs)
        return budget.keep(super().call(__context, __obj, *args, **kwargs))


def _foresee_operator(budget: Budget, operator: str, left: Any, right: Any) -> None:
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
        operator == "**"
        and isinstance(left, int)
        and isinstance(right, int)
        and left.bit_length() * right > _BITS_LIMIT
    ):
        raise Exceeded("computes with numbers beyond all bounds")


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes) else _ITEM_WEIGHT * len(value)


def _foresee_call(budget: Budget, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Counts what a call is going to make, where that can be more than what it is given."""
    values = (*args, *kwargs.values())
    for value in values:
        if isinstance(value, int) and abs(value) > SIZE_LIMIT:
            raise Exceeded(f"calls something with the number {value}")
    method = getattr(function, "__wrapped__", function)  # Jinja's own wrapper of str.format
    owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
    if not isinstance(owner, str | bytes):
        if name == "fromkeys" and len(args) > 1:
            _check_weight([args[1]])
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
    _check_weight(list(values))
    longest = max((len(str(value)) for value in values), default=0)
    budget.spend(len(form) + fields * longest)


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    takes = getattr(function, "jinja_pass_arg", None)
    passes = {
        "context": lambda c: (c,),
        "eval_context": lambda c: (c.eval_ctx,),
        "environment": lambda c: (c.environment,),
    }
    first = passes.get(takes.name if takes is not None else "", lambda c: ())
    foresee = _FORESEEN.get(name)
    is_part = name in _PARTS

    @pass_context
    def bounded(context: Context, *args: Any, **kwargs: Any) -> Any:
        budget: Budget = context.parent[_BUDGET]
        budget.tick()
        if foresee is not None:
            items = foresee(budget, *args, **kwargs)
            if items is not None:
                args = (items, *args[1:])
        made = function(*first(context), *args, **kwargs)
        return made if is_part else budget.keep(made)

    return bounded


def _bounded_test(function: Callable[..., Any]) -> Callable[..., Any]:
    takes = getattr(function, "jinja_pass_arg", None)
    first: Callable[[Context], tuple[Any, ...]] = lambda c: ()  # noqa: E731
    if takes is not None and takes.name == "environment":
        first = lambda c: (c.environment,)  # noqa: E731

    @pass_context
    def bounded(context: Context, *args: Any) -> bool:
        budget: Budget = context.parent[_BUDGET]
        budget.tick()
        return bool(function(*first(context), *args))

    return bounded


# What these give was there before.
_PARTS = frozenset({"attr", "count", "d", "default", "first", "last", "length", "max", "min"})


def _foresee_join(budget: Budget, value: Any, d: Any = "", attribute: Any = None) -> list[Any] | None:
    if isinstance(value, str | dict) or not hasattr(value, "__iter__"):
        budget.spend(len(str(value)) * (1 + len(str(d))))
        return None
    items = list(value)
    texts = len(items) * len(str(d))
    if attribute is None:
        texts += sum(len(item) if isinstance(item, str) else len(str(item)) for item in items)
    else:
        _check_weight(items)
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


_FORESEEN: dict[str, Callable[..., list[Any] | None]] = {  # those that give a list have run through the first argument
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


class _Dict:
    """`dict` for templates: makes one, and is nothing else."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace` for templates; as in transformers, no name in it starts with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # as in Jinja: `self` may be a keyword
        self, attributes = args[0], dict(*args[1:], **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(
            f"a namespace takes no name with an underscore in front, but got {name!r}"
        )


@functools.cache
def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, loopcontrols],
        optimized=False,  # nothing is computed while compiling
        finalize=_finalize,
        cache_size=0,
    )
    taken = {name: function for name, function in environment.filters.items() if name not in REFUSED_FILTERS}
    taken["tojson"] = _to_json
    bounded = {name: _bounded_filter(name, function) for name, function in taken.items()}
    environment.filters = {**bounded, _TICK: _tick, _KEEP: _keep, _CONCAT: _concat}
    tests: dict[str, Any] = {**environment.tests}
    environment.tests = {name: _bounded_test(function) for name, function in tests.items()}
    del environment.globals["lipsum"]
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": _strftime_now,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment


def _raise(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


@pass_context
def _strftime_now(context: Context, form: str) -> str:
    if len(form) > 1000:
        raise Exceeded("writes a date in a form of more than 1000 characters")
    now: datetime.datetime = context.parent[_NOW]
    return now.strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    if ensure_ascii:  # the marks around control tokens must stay marks
        for mark in (MARK_START, MARK_END):
            text = text.replace(f"\\u{ord(mark):04x}", mark)
    return text
