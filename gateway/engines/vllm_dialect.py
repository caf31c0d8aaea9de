"""What a vLLM says of itself, and what it must be able to do: the handshake with one that was started here or elsewhere."""

from __future__ import annotations

from typing import Any

from gateway.engines.control import EngineControl
from gateway.errors import EngineError

# What its grammars can hold a reply to, by the dialect's names.
STRUCTURED_KINDS = ("json", "regex", "choice", "grammar", "structural_tag", "json_object")


async def greet_vllm(control: EngineControl, served_name: str, timeout_s: float) -> dict[str, Any]:
    """kind, version, max_model_len, root, structured_outputs, adapters (whether they can be loaded at run time).

    Raises EngineUnavailable while it does not answer, EngineError when it is no vLLM or does not serve `served_name`.
    """
    told = await control.version(timeout_s)
    await control.health(timeout_s)
    cards = await control.model_cards()
    card = next((card for card in cards if card.get("id") == served_name), None)
    if card is None:
        served = ", ".join(str(card.get("id")) for card in cards if card.get("parent") is None)
        raise EngineError(
            f"the engine serves {served or 'nothing'} and not '{served_name}'; start it with --served-model-name {served_name}"
        )
    if type(longest := card.get("max_model_len")) is not int or longest < 1:
        raise EngineError("the engine does not say its context length (max_model_len in /v1/models); is it a vLLM?")
    return {
        "kind": "vllm",
        "version": str(told.get("version")),
        "max_model_len": longest,
        "root": card.get("root"),
        "structured_outputs": list(STRUCTURED_KINDS),
        "adapters": await control.takes_adapters(),
    }
