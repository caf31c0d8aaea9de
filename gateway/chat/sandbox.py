"""Jinja with bounds: a stranger's template sees plain data, changes nothing, and is stopped when it takes or makes too much.

Place in the flow: jinja → **sandbox**. One rule: whatever a template can do either takes a step of the budget first or is known
beforehand to be small. Loops, calls, filters, comparisons and all that makes new values are routed through the budget when the
template is compiled; a template cannot name, replace or catch what it is routed through.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
from jinja2 import nodes, pass_context
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from gateway.chat.budget import ITEM_WEIGHT, SIZE_LIMIT, Budget, Exceeded
from gateway.chat.conversation import RenderError
from gateway.chat.foresee import FORESEEN, foresee_call, foresee_operator
from gateway.chat.tokenizer import MARK_END, MARK_START

SOURCE_LIMIT = 128 * 1024  # characters of a template
NODE_LIMIT = 60_000  # of its syntax tree: what compiling takes grows with it
QUICK_STEPS, QUICK_SIZE = 4_000, 256 * 1024  # what may be spent where nobody may be kept waiting: some 3 ms

_BUDGET, _NOW = "tunegate budget", "tunegate now"  # with a space in it, no template can name it
_TICK, _KEEP, _CONCAT = "tunegate tick", "tunegate keep", "tunegate concat"

# Not in any chat template that is known: their cost cannot be foreseen, or they answer differently each time.
REFUSED_FILTERS = frozenset({"pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr"})
REFUSED_TAGS = "autoescape, include, import, extends"


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
        budget.spend(ITEM_WEIGHT * len(value))
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
        foresee_operator(budget, operator, left, right)
        return budget.keep(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        # Named as Jinja names them, so that a keyword of a macro may be called anything.
        budget: Budget = __context.parent[_BUDGET]
        budget.tick()
        args = foresee_call(budget, __obj, args, kwargs)
        return budget.keep(super().call(__context, __obj, *args, **kwargs))


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    takes = getattr(function, "jinja_pass_arg", None)
    passes = {
        "context": lambda c: (c,),
        "eval_context": lambda c: (c.eval_ctx,),
        "environment": lambda c: (c.environment,),
    }
    first = passes.get(takes.name if takes is not None else "", lambda c: ())
    foresee = FORESEEN.get(name)
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
