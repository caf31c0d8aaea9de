"""What a generation says, gathered whole: for replies that are not streamed, and for those that are kept."""

from __future__ import annotations

from typing import Any

from gateway.chat.calls import CallDelta
from gateway.generation import Delta, Generation
from gateway.wire.chat import Usage, token_logprob


class Reply:
    """The deltas of one choice."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.reasoning: list[str] = []
        self.calls: list[CallDelta] = []
        self.logprobs: list[dict[str, Any]] = []
        self.token_ids: list[int] = []
        self.finish_reason = "stop"

    def add(self, delta: Delta) -> None:
        self.text.append(delta.text)
        self.reasoning.append(delta.reasoning)
        for call in delta.calls:
            if call.name is not None:
                self.calls.append(CallDelta(call.index, call.id, call.name, list(call.arguments)))
            else:
                self.calls[-1].arguments += call.arguments
        self.logprobs += logprob_entries(delta) or []
        self.token_ids += delta.token_ids
        self.finish_reason = delta.finish_reason or self.finish_reason


def usage_of(generation: Generation) -> Usage:
    """What a generation has used so far."""
    return Usage(
        generation.prompt_tokens,
        generation.completion_tokens,
        generation.cached_tokens,
        generation.reasoning_tokens,
    )


def logprob_entries(delta: Delta) -> list[dict[str, Any]] | None:
    """A delta's log-probabilities as chat shows them; None where none were asked for."""
    if delta.logprobs is None:
        return None
    return [token_logprob(token.token, token.logprob, token.top) for token in delta.logprobs]
