"""What a template is, and the two that fastchat does not have: `chatml` and `llama-3`.

A template turns a conversation into text in which control tokens stand as their literal names; `render.py` makes ids of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from gateway.chat.conversation import Message, Options, Tools, merge_system, refuse_tools


class Template(Protocol):
    """A named way to write a conversation down."""

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str:
        """Which class reads `source` back: "turns", "fastchat" or "jinja"."""
        ...

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer's own first token (BOS) is put before the text, as `tokenizer(text)` does."""
        ...

    @property
    def stop(self) -> str:
        """What ends a reply, written out: a control token's name, or plain text. "" where the template has no word for it."""
        ...

    @property
    def literal_text(self) -> str:
        """All that the template may write of itself: added tokens named in it are control tokens for it."""
        ...

    def text(
        self,
        messages: Sequence[Message],
        *,
        generate: bool,
        tools: Tools | None = None,
        options: Options | None = None,
        quick: bool = False,
    ) -> str:
        """The conversation as text; `generate` ends it where the assistant's next reply begins.

        `options` are over those that the template comes with. `quick` raises TooLong where that takes over some milliseconds.
        Raises RenderError when the template cannot say it.
        """
        ...

    def source(self) -> dict[str, Any]:
        """All that is needed to make this template again, as JSON."""
        ...


@dataclass(frozen=True)
class TurnTemplate:
    """Every turn is written alike: `opening` (with the role's name in it), the content, `closing`."""

    name: str
    opening: str
    closing: str
    stop: str
    start: str = ""
    trims: bool = False
    kind = "turns"
    adds_bos = False

    @property
    def literal_text(self) -> str:
        return "\0".join((self.start, self.opening, self.closing, self.stop))

    def text(
        self,
        messages: Sequence[Message],
        *,
        generate: bool,
        tools: Tools | None = None,
        options: Options | None = None,
        quick: bool = False,
    ) -> str:
        refuse_tools(messages, tools, self.name)
        system, turns = merge_system(messages)
        if system is None and options and options.get("system"):
            system = str(options["system"])
        if system is not None:
            turns = [Message("system", system), *turns]
        parts = [self.start]
        for turn in turns:
            content = turn.content.strip() if self.trims else turn.content
            parts += (self.opening.replace("{role}", turn.role), content, self.closing)
        if generate:
            parts.append(self.opening.replace("{role}", "assistant"))
        return "".join(parts)

    def source(self) -> dict[str, Any]:
        return asdict(self)


CHATML = TurnTemplate(name="chatml", opening="<|im_start|>{role}\n", closing="<|im_end|>\n", stop="<|im_end|>")
LLAMA_3 = TurnTemplate(
    name="llama-3",
    start="<|begin_of_text|>",
    opening="<|start_header_id|>{role}<|end_header_id|>\n\n",
    closing="<|eot_id|>",
    stop="<|eot_id|>",
    trims=True,
)
