"""The conversations that every template is tried with: the edges at which renderers are known to differ."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gateway.chat.conversation import Message, ToolCall

TYPED = "TYPED"  # stands for control tokens of the tokenizer at hand, written out by a user

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'The weather in a "city", today.',
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Where"},
                "days": {"type": "integer", "description": "How many"},
            },
            "required": ["city"],
        },
    },
}
TIMER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "set_timer",
        "description": "Sets a timer.",
        "parameters": {
            "type": "object",
            "properties": {"seconds": {"type": "number", "description": "s"}},
            "required": [],
        },
    },
}


@dataclass(frozen=True)
class Case:
    """A conversation that ends where a reply is wanted, or with the reply, if that is to be learnt from."""

    name: str
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    learnt: bool = False
    typed: bool = False

    @property
    def thoughts(self) -> list[str]:
        return [message.reasoning for message in self.messages if message.reasoning]

    def with_typed(self, text: str) -> Case:
        """The same with control tokens in place of TYPED."""
        said = tuple(
            Message(
                m.role,
                m.content.replace(TYPED, text),
                m.weight,
                tuple(ToolCall(c.id, c.name, c.arguments.replace(TYPED, text)) for c in m.tool_calls),
                m.tool_call_id,
                m.name,
                m.reasoning,
            )
            for m in self.messages
        )
        return Case(self.name, said, self.tools, self.options, self.learnt, self.typed)


def _user(text: str) -> Message:
    return Message("user", text)


def _says(text: str, reasoning: str | None = None, weight: int | None = None) -> Message:
    return Message("assistant", text, weight, reasoning=reasoning)


def _calls(*calls: tuple[str, str], text: str = "") -> Message:
    made = tuple(
        ToolCall(f"call{number:05d}", name, arguments) for number, (name, arguments) in enumerate(calls, start=1)
    )
    return Message("assistant", text, tool_calls=made)


_SYSTEM = Message("system", "Be brief.")
_RESULT = Message("tool", '{"sky": "grey — ½ rain"}', tool_call_id="call00001", name="get_weather")
_WEATHER_CALL = _calls(("get_weather", '{"city": "Łódź", "days": 2}'))

_THINKING = {"enable_thinking": True, "thinking": True, "thinking_mode": "thinking"}  # by various names

CASES = (
    Case("one question", (_user("hello there"),)),
    Case("system", (_SYSTEM, _user("hello  there "))),
    Case("turns", (_SYSTEM, _user("a"), _says("b"), _user("c"), _says("d"), _user("e"))),
    Case("unicode", (_user("naïve 😀 ﷺ 日本語 \u200d e\u0301"), _says("Ça va — ½"), _user("ok"))),
    Case("spaces", (_user("  two  spaces "), _says(" leading and trailing \n"), _user("\n\nnewlines\n\n"))),
    Case("empty content", (_user(""), _says(""), _user("x"))),
    Case("empty system", (Message("system", ""), _user("x"))),
    Case("braces", (_user("{system_message} {} %s {{ x }} {% if %} {0}"), _says("{}"), _user("}"))),
    Case("code", (_user("```python\n\tdef f(x):\n\t\treturn x ** 2  # ok\n```"),)),
    Case("numbers", (_user("1234567 12.50 0x1F 2026-11-21 ٣٤"),)),
    Case("assistant first", (_says("Welcome!"), _user("hi"))),
    Case("two users", (_user("one"), _user("two"))),
    Case("a late system", (_user("a"), _says("b"), Message("system", "Now in French."), _user("c"))),
    Case("typed control tokens", (_user(f"a{TYPED}b {TYPED} c"), _says(f"{TYPED}"), _user(TYPED)), typed=True),
    Case("typed in the system", (Message("system", f"{TYPED} x"), _user("y")), typed=True),
    Case("thoughts", (_user("2+2?"), _says("4", "two and two\nis four"), _user("sure?"))),
    Case("thoughts switched off", (_user("2+2?"),), options={"enable_thinking": False}),
    Case("reasoning effort", (_user("2+2?"),), options={"reasoning_effort": "high"}),
    Case("tools", (_SYSTEM, _user("the weather?")), (WEATHER, TIMER)),
    Case("a call", (_user("weather?"), _WEATHER_CALL, _RESULT), (WEATHER,)),
    Case("a call in the past", (_user("w?"), _WEATHER_CALL, _RESULT, _says("grey"), _user("and now?")), (WEATHER,)),
    Case(
        "typed in a call",
        (_user("w?"), _calls(("get_weather", f'{{"city": "{TYPED}"}}')), _RESULT),
        (WEATHER,),
        typed=True,
    ),
    # What is learnt from.
    Case("learn one", (_user("hello"), _says("I am fine")), learnt=True),
    Case("learn turns", (_SYSTEM, _user("a"), _says("b c"), _user("d"), _says("e f")), learnt=True),
    Case("learn some", (_user("a"), _says("b", weight=0), _user("c"), _says("d", weight=1)), learnt=True),
    Case("learn a newline", (_user("a"), _says("\nstarts with a newline")), learnt=True),
    Case("learn an empty reply", (_user("a"), _says("")), learnt=True),
    Case("learn unicode", (_user("ä"), _says("日本語 😀 é")), learnt=True),
    Case("learn typed control tokens", (_user("a"), _says(f"x {TYPED} y")), learnt=True, typed=True),
    Case("learn thoughts", (_user("2+2?"), _says("4", "two and two is four")), learnt=True),
    Case("learn thoughts in turns", (_user("a"), _says("b", "hm"), _user("c"), _says("d", "oh")), learnt=True),
    Case("learn thoughts, switched on", (_user("2+2?"), _says("4", "two and two")), options=_THINKING, learnt=True),
    Case("learn a reply, thinking off", (_user("2+2?"), _says("4")), options={"enable_thinking": False}, learnt=True),
    Case("learn a call", (_user("weather?"), _WEATHER_CALL), (WEATHER,), learnt=True),
    Case("learn after a call", (_user("w?"), _WEATHER_CALL, _RESULT, _says("It is grey.")), (WEATHER,), learnt=True),
)
