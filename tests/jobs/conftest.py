"""One real engine with a tiny base for the module, and an adapter whose witness that engine wrote."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.bases import PreparedBase
from gateway.engines.engine import Engine
from gateway.engines.kinds import llama_engine
from tests.engines.parts import QUICK, tiny_base, witnessed_adapter
from tests.jobs.parts import with_bundle


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> PreparedBase:
    return tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
async def engine(base: PreparedBase, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Engine]:
    engine = llama_engine(base, tmp_path_factory.mktemp("engine"), max_seqs=4, threads=1, timings=QUICK)
    await engine.start()
    await engine.wait_ready(60)
    yield engine
    await engine.stop()


@pytest.fixture(scope="module")
async def adapter(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a trainer leaves in adapter/."""
    made = await witnessed_adapter(engine, tmp_path_factory.mktemp("adapter"), "a")
    return with_bundle(made.path, engine.base.digest)
