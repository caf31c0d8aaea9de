"""What every test shares: async tests run on asyncio, and one server with the demo model is started for the session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.server import Server

# How fast examples are drawn says how busy the machine is, and nothing of the code.
settings.register_profile("tunegate", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tunegate")

ALIAS = "gpt-4o-mini-2024-07-18"


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The demo model, served on a free port under its own name and under `ALIAS`. Not to be killed: others use it."""
    settings = f'[aliases]\n"{ALIAS}" = "tunegate-demo"\n'
    running = Server(tmp_path_factory.mktemp("server"), settings)
    try:
        yield running.start()
    finally:
        running.stop()
