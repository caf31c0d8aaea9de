"""Jinja chat templates, as models bring them: in an immutable sandbox, with the helpers that transformers gives them.

A template is code from a stranger. It sees plain data only, may change nothing, and is stopped when it takes too many steps,
too much time or writes too much; loops, macros and the operators that grow strings are watched for that.
"""

from __future__ import annotations

import datetime
import functools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gateway.chat.conversation import Message, RenderError

SOURCE_LIMIT = 256 * 1024  # characters of a template
STEP_LIMIT = 1_000_000  # loop turns and calls in one rendering
TIME_LIMIT_S = 0.8
OUTPUT_LIMIT = 8 * 1024 * 1024  # characters of a rendered text, and of any string or list on the way


@dataclass(frozen=True)
class JinjaTemplate:
    """A chat template. `tokens` are the names it may use (bos_token, …); `options` its further variables, as JSON."""

    name: str
    template: str
    tokens: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    kind = "jinja"
    adds_bos = False

    @property
    def stop(self) -> str:
        return self.tokens.get("eos_token", "")

    def text(self, messages: Sequence[Message], *, generate: bool) -> str:
        dicts = [{"role": message.role, "content": message.content} for message in messages]
        variables = {**self.tokens, **self.options, "messages": dicts, "add_generation_prompt": generate}
        return render(self.template, variables)

    def source(self) -> dict[str, Any]:
        return {"name": self.name, "template": self.template, "tokens": self.tokens, "options": self.options}


def render(template: str, variables: dict[str, Any]) -> str:
    """The text that a template writes. Raises RenderError when it fails, refuses, or exceeds its bounds."""
    budget = _Budget()
    try:
        compiled = _compile(template)
        parts, size = [], 0
        for part in compiled.generate({"tools": None, "documents": None, **variables, _TICK: budget.tick}):
            parts.append(part)
            size += len(part)
            if size > OUTPUT_LIMIT:
                raise RenderError(f"the chat template wrote more than {OUTPUT_LIMIT} characters")
            budget.tick()
        return "".join(parts)
    except RenderError:
        raise
    except jinja2.TemplateError as error:
        raise RenderError(f"the chat template failed: {error.message or type(error).__name__}") from error
    except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError, RecursionError, MemoryError) as error:
        raise RenderError(f"the chat template failed: {type(error).__name__}: {error}"[:500]) from error


class _Budget:
    """What one rendering may still spend."""

    __slots__ = ("_deadline", "_steps")

    def __init__(self) -> None:
        self._steps = 0
        self._deadline = time.monotonic() + TIME_LIMIT_S

    def tick(self) -> str:
        self._steps += 1
        if self._steps > STEP_LIMIT or (self._steps % 256 == 0 and time.monotonic() > self._deadline):
            raise RenderError(f"the chat template ran for more than {STEP_LIMIT} steps or {TIME_LIMIT_S} s")
        return ""


_TICK = "tunegate_tick"  # a template that calls it by itself only spends its own budget


class _Watched(Extension):
    """Puts a call of the budget's tick into every loop and macro body."""

    tags: set[str] = set()

    def parse(self, parser: Parser) -> nodes.Node:  # no tag of its own
        raise NotImplementedError

    @staticmethod
    def watch(tree: nodes.Template) -> nodes.Template:
        for node in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            call = nodes.Call(nodes.Name(_TICK, "load"), [], [], None, None)
            node.body.insert(0, nodes.Output([call]).set_lineno(node.lineno))  # type: ignore[union-attr]
        return tree


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here it says nothing."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with bounds on what its operators may make."""

    intercepted_binops = frozenset({"+", "*", "**", "%", "<<"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Watched.watch(super()._parse(source, name, filename))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _check_operands(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        for value in (*args, *kwargs.values()):
            if isinstance(value, int) and not isinstance(value, bool) and abs(value) > OUTPUT_LIMIT:
                raise RenderError(f"the chat template calls something with the number {value}")
        return super().call(context, function, *args, **kwargs)


def _check_operands(operator: str, left: Any, right: Any) -> None:
    sizes = [len(value) if isinstance(value, str | list | tuple) else None for value in (left, right)]
    if operator == "*" and (sizes[0] is not None or sizes[1] is not None):
        size = sizes[0] if sizes[0] is not None else sizes[1]
        times = right if sizes[0] is not None else left
        if isinstance(times, int) and (size or 0) * times > OUTPUT_LIMIT:
            raise RenderError("the chat template multiplies a text beyond all bounds")
    elif operator == "+" and None not in sizes:
        if sum(size or 0 for size in sizes) > OUTPUT_LIMIT:
            raise RenderError("the chat template adds up a text beyond all bounds")
    elif operator == "%" and isinstance(left, str):
        raise RenderError("the chat template formats with %, which is not taken")
    elif isinstance(left, int) and isinstance(right, int) and max(abs(left), abs(right)) > 2**32:
        raise RenderError("the chat template computes with numbers beyond all bounds")
    elif operator in ("**", "<<") and isinstance(right, int) and right > 64:
        raise RenderError("the chat template computes with numbers beyond all bounds")


@functools.lru_cache(maxsize=256)
def _compile(template: str) -> jinja2.Template:
    if len(template) > SOURCE_LIMIT:
        raise RenderError(f"the chat template has {len(template)} characters; at most {SOURCE_LIMIT} are taken")
    try:
        return _environment().from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise RenderError(f"the chat template is not valid Jinja: line {error.lineno}: {error.message}") from error
    except RecursionError as error:
        raise RenderError("the chat template nests too deep") from error


@functools.cache
def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], keep_trailing_newline=False
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _raise(message: str) -> None:
    raise RenderError(f"the chat template refuses: {message}")


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


Helper = Callable[..., Any]
