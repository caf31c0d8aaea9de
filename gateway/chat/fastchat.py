"""Templates of `fastchat.conversation`, taken from the library at run time and rendered by its own `get_prompt`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastchat.conversation import Conversation, SeparatorStyle, get_conv_template

from gateway.chat.conversation import Message, Options, RenderError, Tools, alternate, merge_system, refuse_tools

# get_prompt takes an empty reply for "generate here"; a character that no text holds stands in for it.
_EMPTY = "\ufdd2"
_FIELDS = (
    "name",
    "system_template",
    "system_message",
    "roles",
    "messages",
    "offset",
    "sep",
    "sep2",
    "stop_str",
    "stop_token_ids",
)
_PROBE = (Message("system", "s"), Message("user", "u\n\nv"), Message("assistant", "a"), Message("user", ""))


@dataclass(frozen=True)
class FastChatTemplate:
    """One of fastchat's templates; `fields` are its Conversation's, its separator style by name (numbers may move).

    "proof", where it is there, is what a small conversation came out as when the template was written down: should another
    version of the library write it differently, the template refuses to be read rather than render something else.
    """

    fields: dict[str, Any]
    kind = "fastchat"
    adds_bos = True

    def __post_init__(self) -> None:
        proof = self.fields.get("proof")
        if proof is not None and proof != self._proof():
            raise ValueError(
                f"this version of fschat writes the template '{self.name}' differently from the one that it was made with; "
                "install that one again (0.2.36 unless you know better)"
            )

    @classmethod
    def named(cls, name: str) -> FastChatTemplate:
        """The library's template of that name. Raises KeyError where it has none, ValueError for one of an API only."""
        conversation = get_conv_template(name)
        if conversation.sep_style is None:
            raise ValueError("it stands for a model behind somebody's API and has no text form")
        fields = {field: getattr(conversation, field) for field in _FIELDS}
        fields["roles"] = list(fields["roles"])
        fields["messages"] = [list(message) for message in fields["messages"]]
        return cls({**fields, "sep_style": conversation.sep_style.name})

    @property
    def name(self) -> str:
        return str(self.fields["name"])

    @property
    def stop(self) -> str:
        """The first stop string, or else what the style puts after a turn; "" where it puts nothing that could stop."""
        text = next(iter(self.stop_strings), "") or self.fields["sep2"] or self.fields["sep"] or ""
        return str(text).strip()

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """What FastChat itself would stop at."""
        stop = self.fields["stop_str"]
        return tuple(stop) if isinstance(stop, list | tuple) else (stop,) if stop else ()

    @property
    def turn_ends(self) -> tuple[str, ...]:
        """What the style writes after a turn, as far as it can be told from the reply's own spaces."""
        return tuple(text for sep in (self.fields["sep2"], self.fields["sep"]) if (text := str(sep or "").strip()))

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Ids in the vocabulary of the model that the template was written for."""
        return tuple(self.fields["stop_token_ids"] or ())

    @property
    def literal_text(self) -> str:
        texts = [self.fields["system_template"], self.fields["sep"], self.fields["sep2"], *self.fields["roles"]]
        return "\0".join(str(text) for text in (*texts, *self.stop_strings) if text)

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
        turns = alternate(turns, self.name)
        if generate and turns and turns[-1].role == "assistant":
            raise RenderError(f"the template '{self.name}' needs the last message to come from the user")
        conversation = self._conversation()
        if system is not None:
            conversation.set_system_message(system)
        for turn in turns:
            role = conversation.roles[0 if turn.role == "user" else 1]
            conversation.append_message(role, turn.content or _EMPTY)
        if generate:
            conversation.append_message(conversation.roles[1], None)
        return str(conversation.get_prompt()).replace(_EMPTY, "")

    def source(self) -> dict[str, Any]:
        return {**self.fields, "proof": self._proof()}

    def _proof(self) -> str:
        return hashlib.sha256(self.text(_PROBE, generate=True).encode()).hexdigest()[:16]

    def _conversation(self) -> Conversation:
        fields = {name: value for name, value in self.fields.items() if name in _FIELDS}
        messages = [list(message) for message in self.fields.get("messages") or ()]
        style = SeparatorStyle[self.fields["sep_style"]]
        return Conversation(**{**fields, "roles": tuple(fields["roles"]), "messages": messages, "sep_style": style})
