"""An engine that already runs somewhere: asked what it is, never started or stopped."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

from gateway.engines.adapters import Adapter, AdapterRejected
from gateway.engines.client import Endpoint
from gateway.errors import SettingsError


class AttachedEngine:
    """A URL and a key. It is taken to be ready; a request finds out when it is not."""

    def __init__(self, url: str, key: str) -> None:
        """Raises SettingsError for a URL that is not http://HOST:PORT."""
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname or not parts.port or parts.path.strip("/"):
            raise SettingsError(f"engine_url must be http://HOST:PORT, not {url!r}")
        self.endpoint = Endpoint(parts.hostname, parts.port, key)
        self.ready = True
        self.version: dict[str, Any] = {}  # it was not asked: what it cannot do, it refuses itself

        self.started, self.state = True, "ready"
        self.reason: str | None = None

    takes_adapters = False

    def serves(self, engine_name: str) -> bool:
        """Adapters are not brought to engines that were started elsewhere (yet)."""
        return False

    def set_desired(self, adapters: Iterable[Adapter]) -> None:
        """None is brought to it."""

    async def start(self) -> None:
        """It runs."""

    async def wait_ready(self, timeout_s: float) -> None:
        """It is taken to be."""

    async def stop(self) -> None:
        """It runs on."""

    async def has_worker(self) -> bool:
        return False

    async def ensure_adapter(self, adapter: Adapter, witness: bool = True, timeout_s: float = 0.0) -> None:
        """Raises AdapterRejected."""
        raise AdapterRejected("adapters are not brought to engines that were started elsewhere")

    async def drop_adapter(self, engine_name: str) -> None:
        """There is none to drop."""
