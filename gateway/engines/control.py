"""What the gateway asks of an engine beside the replies themselves: is it well, what has it loaded, load this, score that.

Its rule: every call has a deadline of its own, and a failure is one of EngineUnavailable (could not be asked),
EngineTimeout (asked, no answer), EngineError (a bad answer) or, where an adapter is at fault, AdapterRejected. Runs on the
gateway's loop; the replies' hot path is `client`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import httpx

from gateway.engines.adapters import AdapterRejected
from gateway.engines.client import Endpoint
from gateway.errors import EngineError, EngineTimeout, EngineUnavailable

CALL_TIMEOUT_S = 10.0
LOAD_TIMEOUT_S = 60.0
UNLOAD_TIMEOUT_S = 120.0  # an unload waits for the replies that use the adapter
SCORE_TIMEOUT_S = 120.0
SLEEP_TIMEOUT_S = 300.0  # replies under way are waited for
BUSY_STATUSES = (429, 503)


class EngineControl:
    """The control calls of one engine at one address; `close()` it."""

    def __init__(self, endpoint: Endpoint) -> None:
        # No proxy from the environment and no redirect: a key is sent, and only the engine may see it.
        self._http = httpx.AsyncClient(
            base_url=f"http://{endpoint.host}:{endpoint.port}",
            headers={"authorization": f"Bearer {endpoint.key}"},
            trust_env=False,
            follow_redirects=False,
            timeout=CALL_TIMEOUT_S,
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def health(self, timeout_s: float = CALL_TIMEOUT_S) -> None:
        """Returns when the engine can decode; raises otherwise."""
        await self._call("GET", "/health", timeout_s)

    async def version(self, timeout_s: float = CALL_TIMEOUT_S) -> dict[str, Any]:
        """What the engine says of itself: version, base_digest, max_model_len, …"""
        return _object(await self._call("GET", "/version", timeout_s))

    async def models(self) -> dict[str, str | None]:
        """The names that it answers to, each with the base it stands on (None: it is the base)."""
        try:
            return {str(card["id"]): card.get("parent") for card in await self.model_cards()}
        except KeyError as error:
            raise EngineError("the engine's /v1/models has one without an id") from error

    async def model_cards(self) -> list[dict[str, Any]]:
        """Its /v1/models."""
        cards = _object(await self._call("GET", "/v1/models", CALL_TIMEOUT_S)).get("data")
        if not isinstance(cards, list) or not all(isinstance(card, dict) for card in cards):
            raise EngineError("the engine's /v1/models is not a list of models")
        return cards

    async def takes_adapters(self) -> bool:
        """Whether adapters can be loaded while it runs: a vLLM that may not has no such route."""
        try:
            await self._call(
                "POST", "/v1/unload_lora_adapter", CALL_TIMEOUT_S, {"lora_name": "tunegate:no-such-adapter"}
            )
        except AdapterRejected as refusal:
            return "no-such-adapter" in refusal.message
        return True

    async def load_adapter(self, name: str, folder: Path | str) -> None:
        """Loads `folder`, a path on the engine's machine, under `name`. AdapterRejected when the engine refuses it."""
        request = {"lora_name": name, "lora_path": str(folder)}
        try:
            await self._call("POST", "/v1/load_lora_adapter", LOAD_TIMEOUT_S, request)
        except AdapterRejected:
            if name not in await self.models():  # else an earlier call, whose answer was lost, has loaded it
                raise

    async def unload_adapter(self, name: str) -> None:
        """Forgets `name` once the replies that use it are over. A name that is not loaded is fine."""
        try:
            await self._call("POST", "/v1/unload_lora_adapter", UNLOAD_TIMEOUT_S, {"lora_name": name})
        except AdapterRejected as error:
            if error.engine_status != 404:
                raise

    async def score(self, model: str, prompt_ids: list[int], timeout_s: float = SCORE_TIMEOUT_S) -> list[float | None]:
        """The log-probability of each prompt token given those before it: len(prompt_ids) values, the first None."""
        request = {
            "model": model,
            "prompt": prompt_ids,
            "max_tokens": 1,
            "temperature": 0.0,
            "top_p": 1.0,
            "top_k": -1,
            "n": 1,
            "prompt_logprobs": 0,
            "return_token_ids": True,
            "skip_special_tokens": False,
            "stream": False,
        }
        body = _object(await self._call("POST", "/v1/completions", timeout_s, request))
        try:
            entries = body["choices"][0]["prompt_logprobs"]
            if len(entries) != len(prompt_ids):
                raise EngineError(f"the engine scored {len(entries)} of {len(prompt_ids)} prompt tokens")
            return [
                None if entry is None else float(entry[str(token)]["logprob"])
                for token, entry in zip(prompt_ids, entries, strict=True)
            ]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise EngineError(f"the engine's prompt_logprobs are not as the dialect has them: {error!r}") from error

    async def sleep(self) -> None:
        """Lets the replies under way end, then gives the GPU's memory back, weights kept in the machine's own (level 1)."""
        await self._call("POST", "/sleep?level=1&mode=wait", SLEEP_TIMEOUT_S)

    async def wake_up(self) -> None:
        await self._call("POST", "/wake_up", SLEEP_TIMEOUT_S)

    async def is_sleeping(self) -> bool:
        return bool(_object(await self._call("GET", "/is_sleeping", CALL_TIMEOUT_S)).get("is_sleeping"))

    async def _call(
        self, method: str, path: str, timeout_s: float, body: dict[str, Any] | None = None
    ) -> httpx.Response:
        try:
            response = await self._http.request(method, path, json=body, timeout=timeout_s)
        except httpx.TimeoutException as error:
            raise EngineTimeout(f"the engine did not answer {path} within {timeout_s:g} s") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise EngineUnavailable(f"the engine cannot be asked {path}: {error!r}", retry_after_s=1) from error
        if response.status_code == 200:
            return response
        message = _message_of(response)
        if response.status_code in BUSY_STATUSES:
            retry_after = response.headers.get("retry-after", "")
            raise EngineUnavailable(
                f"the engine is busy: {message}", retry_after_s=int(retry_after) if retry_after.isdigit() else 1
            )
        at_adapter = path.endswith("_lora_adapter") and response.status_code not in (401, 403)
        # vLLM answers 500 for an adapter that it does not take; one that is itself in trouble is not well either.
        if at_adapter and (response.status_code < 500 or (response.status_code == 500 and await self._is_well())):
            raise AdapterRejected(f"the engine refused the adapter: {message}", engine_status=response.status_code)
        raise EngineError(f"the engine answered {path} with {response.status_code}: {message}")

    async def _is_well(self) -> bool:
        try:
            return (await self._http.get("/health", timeout=CALL_TIMEOUT_S)).status_code == 200
        except httpx.HTTPError:
            return False


def _object(response: httpx.Response) -> dict[str, Any]:
    try:
        value = json.loads(response.content, parse_constant=lambda constant: math.nan)
    except (ValueError, RecursionError) as error:
        raise EngineError(f"the engine's answer is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise EngineError("the engine's answer is not a JSON object")
    return value


def _message_of(response: httpx.Response) -> str:
    try:
        error = response.json()["error"]
        return str(error["message"] if isinstance(error, dict) else error)[:1000]
    except (ValueError, KeyError, TypeError):
        return response.text[:200]
