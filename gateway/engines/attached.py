"""An engine that already runs somewhere: asked what it is, never started or stopped."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from gateway.engines.client import Endpoint
from gateway.errors import SettingsError


class AttachedEngine:
    """A URL and a key. It is taken to be ready; a request finds out when it is not."""

    resting = False  # it is never stopped from here

    def __init__(self, url: str, key: str) -> None:
        """Raises SettingsError for a URL that is not http://HOST:PORT."""
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname or not parts.port or parts.path.strip("/"):
            raise SettingsError(f"engine_url must be http://HOST:PORT, not {url!r}")
        self.endpoint = Endpoint(parts.hostname, parts.port, key)
        self.ready = True
        self.version: dict[str, Any] = {}  # it was not asked: what it cannot do, it refuses itself

    def serves(self, engine_name: str) -> bool:
        """Adapters are not brought to engines that were started elsewhere (yet)."""
        return False

    async def drop_adapter(self, engine_name: str) -> None:
        """There is none to drop."""
