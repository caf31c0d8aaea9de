"""What every test shares: async tests run on asyncio, and the session's server is started once."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"
