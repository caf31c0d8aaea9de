"""Variables of a template that a client may set, such as `enable_thinking`: vLLM's `chat_template_kwargs`. Pure."""

from __future__ import annotations

from typing import Any

from gateway.errors import RequestError
from gateway.wire.fields import show

_OPTION_LIMIT = 32
# What a template is given by the server alone.
_NO_OPTIONS = frozenset("messages tools documents add_generation_prompt continue_final_message tokenize".split())


_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")


def effort_options(effort: Any, param: str) -> dict[str, Any]:
    """How long a model is to think, as templates know it: `reasoning_effort`, and `enable_thinking` where it is not to."""
    if effort is None:
        return {}
    if effort not in _EFFORTS:
        raise RequestError(f"'{param}' must be one of {', '.join(_EFFORTS)}, not {show(effort)}", param=param)
    return {"reasoning_effort": effort, **({"enable_thinking": False} if effort == "none" else {})}


def template_options(value: Any, param: str) -> dict[str, Any]:
    """The options that `param` holds, none where it is null. Raises RequestError."""
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > _OPTION_LIMIT:
        raise RequestError(
            f"'{param}' must be an object of at most {_OPTION_LIMIT} options, not {show(value)}", param=param
        )
    for name in value:
        if name in _NO_OPTIONS or name.endswith("_token") or not name.isidentifier():
            raise RequestError(f"'{param}' cannot set {show(name)}: it is not an option of a template", param=param)
    return value
