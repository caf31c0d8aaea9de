"""Templates of `fastchat.conversation`, taken from the library at run time and rendered by its own `get_prompt`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastchat.conversation import Conversation, SeparatorStyle, get_conv_template

from gateway.chat.conversation import Message, RenderError, alternate, merge_system

# get_prompt takes an empty reply for "generate here"; a character that no text holds stands in for it.
_EMPTY = "\ufdd2"
_FIELDS = ("name", "system_template", "system_message", "roles", "offset", "sep", "sep2", "stop_str", "stop_token_ids")


@dataclass(frozen=True)
class FastChatTemplate:
    """One of fastchat's templates; `fields` are its Conversation's, its separator style by name (numbers may move)."""

    fields: dict[str, Any]
    kind = "fastchat"
    adds_bos = True

    @classmethod
    def named(cls, name: str) -> FastChatTemplate:
        """The library's template of that name. Raises KeyError where it has none."""
        conversation = get_conv_template(name)
        fields = {field: getattr(conversation, field) for field in _FIELDS}
        fields["roles"] = list(fields["roles"])
        return cls({**fields, "sep_style": conversation.sep_style.name})

    @property
    def name(self) -> str:
        return str(self.fields["name"])

    @property
    def stop(self) -> str:
        stop = self.fields["stop_str"]
        text = (stop[0] if isinstance(stop, list) else stop) or self.fields["sep2"] or self.fields["sep"]
        return str(text).strip()

    def text(self, messages: Sequence[Message], *, generate: bool) -> str:
        system, turns = merge_system(messages)
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
        return dict(self.fields)

    def _conversation(self) -> Conversation:
        fields = dict(self.fields)
        style = SeparatorStyle[fields.pop("sep_style")]
        return Conversation(**{**fields, "roles": tuple(fields["roles"]), "messages": [], "sep_style": style})
