"""An engine with the real worker: adapters loaded, verified, restored, refused."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.bases import PreparedBase
from gateway.engines.adapters import Adapter, AdapterRejected
from gateway.engines.control import EngineControl
from gateway.engines.engine import Engine, Standing
from gateway.engines.kinds import llama_engine
from gateway.engines.llama_launch import LLAMA_COMMAND
from gateway.engines.witness import WitnessMismatch
from gateway.errors import EngineError, EngineTimeout, EngineUnavailable
from tests.engines.parts import (
    QUICK,
    as_adapter,
    is_alive,
    kill_gateway_when,
    score,
    tiny_base,
    until,
    with_other_weights,
    witnessed_adapter,
    write_adapter,
)

pytestmark = pytest.mark.anyio
START_S = 60


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> PreparedBase:
    return tiny_base(tmp_path_factory.mktemp("base"))


def engine_of(base: PreparedBase, folder: Path) -> Engine:
    return llama_engine(base, folder / "engine", max_seqs=4, threads=1, timings=QUICK)


@pytest.fixture
async def engine(base: PreparedBase, tmp_path: Path) -> AsyncIterator[Engine]:
    engine = engine_of(base, tmp_path)
    await engine.start()
    await engine.wait_ready(START_S)
    yield engine
    await engine.stop()


async def loaded(engine: Engine) -> set[str]:
    control = EngineControl(engine.endpoint)
    try:
        return {name for name, parent in (await control.models()).items() if parent is not None}
    finally:
        await control.close()


async def test_an_adapter_is_loaded_verified_and_served(engine: Engine, tmp_path: Path) -> None:
    adapter = await witnessed_adapter(engine, tmp_path, "a")
    report = await engine.ensure_adapter(adapter)
    assert report is not None and report.warning is None
    assert report.error < 0.01 and report.noise < 0.01 and report.effect > 0.05
    assert engine.serves(adapter.engine_name) and await loaded(engine) == {adapter.engine_name}
    again = await engine.ensure_adapter(adapter)
    assert again == report


async def test_a_killed_worker_is_not_ready_before_its_adapters_are_back(engine: Engine, tmp_path: Path) -> None:
    adapters = [await witnessed_adapter(engine, tmp_path, name, seed=seed) for seed, name in enumerate("ab")]
    for adapter in adapters:
        await engine.ensure_adapter(adapter)
    ids = list(range(3, 40))
    before = [await score(engine.endpoint, adapter.engine_name, ids) for adapter in adapters]
    seen: list[tuple[bool, list[Standing]]] = []
    engine.on_change(lambda e: seen.append((e.ready, [status.standing for status in e.adapters.values()])))
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)
    await until(lambda: not engine.ready)
    assert not any(engine.serves(adapter.engine_name) for adapter in adapters)
    await engine.wait_ready(START_S)
    assert await loaded(engine) == {adapter.engine_name for adapter in adapters}
    assert [await score(engine.endpoint, adapter.engine_name, ids) for adapter in adapters] == before
    assert all(standings == [Standing.SERVED] * 2 for ready, standings in seen if ready)


async def test_a_worker_of_a_killed_gateway_is_taken_over_with_its_adapters(
    engine: Engine, base: PreparedBase, tmp_path: Path
) -> None:
    adapters = [await witnessed_adapter(engine, tmp_path, name, seed=seed) for seed, name in enumerate("abc")]
    await kill_gateway_when("ready", base, tmp_path / "second/engine", LLAMA_COMMAND, adapters[:2])
    heir = llama_engine(base, tmp_path / "second/engine", timings=QUICK)
    heir.set_desired(adapters[1:])
    await heir.start()
    try:
        await heir.wait_ready(START_S)
        assert heir.restarts == 0
        assert await loaded(heir) == {adapter.engine_name for adapter in adapters[1:]}
        log = (tmp_path / "second/engine/worker.log").read_text()
        assert log.count(f"{adapters[1].engine_name!r} registered") == 1  # it was there, and was not brought again
    finally:
        await heir.stop()


@pytest.mark.parametrize("changes", [{"alpha": 16.0}, {"alpha": 4.0}, {"seed": 9}])
async def test_an_adapter_that_acts_otherwise_than_in_training_is_never_served(
    engine: Engine, base: PreparedBase, tmp_path: Path, changes: dict[str, float]
) -> None:
    good = await witnessed_adapter(engine, tmp_path, "good")
    wrong = with_other_weights(good, tmp_path / "wrong", base, **changes)
    with pytest.raises(WitnessMismatch):
        await engine.ensure_adapter(wrong)
    assert not engine.serves(wrong.engine_name) and await loaded(engine) == set() and not engine.adapters
    await engine.ensure_adapter(good)
    assert engine.serves(good.engine_name)


async def test_an_adapter_that_does_nothing_is_served_with_a_warning(engine: Engine, tmp_path: Path) -> None:
    adapter = await witnessed_adapter(engine, tmp_path, "quiet", strength=0.0)
    report = await engine.ensure_adapter(adapter)
    assert report is not None and report.warning is not None and engine.serves(adapter.engine_name)


async def test_one_unservable_adapter_keeps_neither_the_engine_nor_the_others_from_being_ready(
    engine: Engine, base: PreparedBase, tmp_path: Path
) -> None:
    good = await witnessed_adapter(engine, tmp_path, "good")
    wrong = with_other_weights(good, tmp_path / "wrong", base, seed=9)
    broken = as_adapter(write_adapter(tmp_path / "broken", base.digest), "broken")
    (broken.path / "adapter.gguf").write_bytes(b"GGUF but not really")
    missing = Adapter("missing@1", tmp_path / "missing", "tiny", "sha256:1")
    await engine.stop()
    engine.set_desired([wrong, broken, missing, good])
    await engine.start()
    await engine.wait_ready(START_S)
    assert [engine.serves(a.engine_name) for a in (wrong, broken, missing, good)] == [False, False, False, True]
    assert await loaded(engine) == {good.engine_name}
    assert "not as" not in str(engine.adapters[missing.engine_name].error)
    assert isinstance(engine.adapters[wrong.engine_name].error, WitnessMismatch)


async def test_a_gguf_that_llama_cpp_refuses_leaves_the_engine_alive(
    engine: Engine, base: PreparedBase, tmp_path: Path
) -> None:
    broken = as_adapter(write_adapter(tmp_path / "broken", base.digest), "broken")
    (broken.path / "adapter.gguf").write_bytes(b"GGUF but not really")
    pid = engine.pid
    with pytest.raises(AdapterRejected, match="refused"):
        await engine.ensure_adapter(broken)
    assert engine.ready and engine.pid == pid and engine.restarts == 0


async def test_a_dropped_adapter_is_unloaded_and_stays_away_after_a_restart(engine: Engine, tmp_path: Path) -> None:
    adapter = await witnessed_adapter(engine, tmp_path, "a")
    await engine.ensure_adapter(adapter)
    await engine.drop_adapter(adapter.engine_name)
    assert not engine.serves(adapter.engine_name) and await loaded(engine) == set()
    await engine.drop_adapter(adapter.engine_name)
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)
    await until(lambda: not engine.ready)
    await engine.wait_ready(START_S)
    assert await loaded(engine) == set()


async def test_an_adapter_asked_for_while_the_worker_is_dead_is_served_when_it_is_back(
    engine: Engine, tmp_path: Path
) -> None:
    adapter = await witnessed_adapter(engine, tmp_path, "a")
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)
    report = await engine.ensure_adapter(adapter)
    assert report is not None and report.items == 3 and engine.serves(adapter.engine_name) and engine.restarts == 1


async def test_a_worker_killed_while_it_loads_ends_in_a_served_adapter(engine: Engine, tmp_path: Path) -> None:
    adapter = await witnessed_adapter(engine, tmp_path, "a")
    for delay_s in (0.0, 0.002, 0.01, 0.03):
        ensuring = asyncio.create_task(engine.ensure_adapter(adapter))
        await asyncio.sleep(delay_s)
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        await ensuring
        await until(lambda: engine.serves(adapter.engine_name), START_S)
        await engine.drop_adapter(adapter.engine_name)


async def test_ensuring_many_at_once_serves_them_all(engine: Engine, tmp_path: Path) -> None:
    adapters = [await witnessed_adapter(engine, tmp_path, f"m{seed}", seed=seed) for seed in range(4)]
    await asyncio.gather(*(engine.ensure_adapter(adapter) for adapter in adapters))
    assert all(engine.serves(adapter.engine_name) for adapter in adapters)


async def test_giving_up_on_an_adapter_leaves_it_undesired(engine: Engine, tmp_path: Path) -> None:
    adapter = await witnessed_adapter(engine, tmp_path, "a")
    ensuring = asyncio.create_task(engine.ensure_adapter(adapter))
    await asyncio.sleep(0)
    ensuring.cancel()
    with pytest.raises(asyncio.CancelledError):
        await ensuring
    assert not engine.adapters
    await engine.stop()
    with pytest.raises(EngineUnavailable, match=r"could not load .* within 0\.1 s"):
        await engine.ensure_adapter(adapter, timeout_s=0.1)
    assert not engine.adapters


async def test_a_stopped_worker_gives_timeouts_and_then_is_replaced(engine: Engine) -> None:
    pid, endpoint = engine.pid, engine.endpoint
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    control = EngineControl(endpoint)
    with pytest.raises(EngineTimeout, match="did not answer"):
        await control.health(timeout_s=0.2)
    await control.close()
    await until(lambda: not engine.ready, 10)
    await engine.wait_ready(START_S)
    assert not is_alive(pid)


async def test_an_adapter_that_is_desired_again_while_it_is_dropped_stays(engine: Engine, tmp_path: Path) -> None:
    adapter = await witnessed_adapter(engine, tmp_path, "a")
    await engine.ensure_adapter(adapter)
    engine.take(adapter.engine_name)  # a reply is under way
    dropping = asyncio.create_task(engine.drop_adapter(adapter.engine_name))
    await until(lambda: not engine.serves(adapter.engine_name))
    await engine.ensure_adapter(adapter)
    engine.release(adapter.engine_name)
    await dropping
    assert engine.serves(adapter.engine_name) and await loaded(engine) == {adapter.engine_name}


async def test_one_that_does_not_wake_is_started_again(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    base = PreparedBase("a", tmp_path, tmp_path / "model.gguf", "sha256:base", "LlamaForCausalLM", 64, "", (2,))
    command = (sys.executable, "-m", "tests.engines.fake_worker", "never-wakes")
    engine = llama_engine(base, tmp_path / "engine", command=command, timings=QUICK)
    await engine.start()
    try:
        await engine.wait_ready(START_S)
        before = engine.pid
        await engine.sleep()
        assert engine.state == "asleep"
        with pytest.raises(EngineError, match="wake_up"):
            await engine.wake()
        await engine.wait_ready(START_S)
        assert engine.state == "ready" and engine.pid != before
    finally:
        await engine.stop()
