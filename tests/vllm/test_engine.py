"""One real vLLM as a replica: taken over, closed to others, its adapters verified, brought back, kept apart."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest

from gateway.bases import PreparedBase
from gateway.engines.adapters import Adapter, AdapterRejected, check_adapter
from gateway.engines.engine import Engine
from gateway.engines.kinds import remote_engine
from gateway.engines.process import Timings
from gateway.engines.witness import WitnessMismatch, verify
from gateway.jobdir import read_json
from tests.engines.parts import control_of, until, write_manifest_again
from tests.vllm.made_adapters import make_adapters
from tests.vllm.starting import ask

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def adapters(base: PreparedBase, tmp_path_factory: pytest.TempPathFactory) -> list[Adapter]:
    return make_adapters(base, tmp_path_factory.mktemp("made"), [f"ft:own:{number}" for number in range(10)])


async def test_a_vllm_of_a_killed_gateway_is_taken_over_while_it_is_still_starting(engine: Engine) -> None:
    record = read_json(Path(engine_folder(engine)) / "spawn.json")
    assert engine.pid == record["pid"]
    assert engine.restarts == 0
    assert engine.version["kind"] == "vllm"
    assert engine.version["adapters"] is True
    assert engine.max_model_len == 1024


async def test_nobody_without_the_key_gets_anything_of_a_vllm_that_was_started_here(engine: Engine) -> None:
    endpoint = engine.endpoint
    async with httpx.AsyncClient(base_url=f"http://{endpoint.host}:{endpoint.port}") as stranger:
        for path in ("/health", "/metrics", "/v1/models", "/version", "/is_sleeping", "/docs"):
            assert (await stranger.get(path)).status_code == 401, path
        for path in ("/sleep?level=2&mode=abort", "/collective_rpc", "/tokenize", "/v1/load_lora_adapter"):
            assert (await stranger.post(path, json={})).status_code == 401, path
    assert (await ask(endpoint, "/is_sleeping")).json() == {"is_sleeping": False}
    assert endpoint.key not in command_line(engine)


async def test_an_adapter_is_loaded_under_an_immutable_name_and_verified(
    engine: Engine, adapters: Sequence[Adapter]
) -> None:
    report = await engine.ensure_adapter(adapters[0])
    assert report is not None and report.warning is None
    assert report.error < 0.05 * report.effect, report
    assert engine.serves(adapters[0].engine_name)
    cards = (await ask(engine.endpoint, "/v1/models")).json()["data"]
    assert [card["root"] for card in cards if card["id"] == adapters[0].engine_name] == [str(adapters[0].path)]
    await engine.drop_adapter(adapters[0].engine_name)
    assert adapters[0].engine_name not in await models(engine)


@pytest.mark.parametrize("factor", [0.5, 0.9, 1.2])
async def test_an_adapter_of_another_alpha_is_refused_and_forgotten(
    engine: Engine, adapters: Sequence[Adapter], tmp_path: Path, factor: float
) -> None:
    config = read_json(adapters[1].path / "adapter_config.json")
    spoiled = spoil(adapters[1], tmp_path, config | {"lora_alpha": config["lora_alpha"] * factor})
    with pytest.raises(WitnessMismatch):
        await engine.ensure_adapter(spoiled)
    assert not engine.serves(spoiled.engine_name)
    assert spoiled.engine_name not in await models(engine)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [("use_dora", True, "DoRA"), ("r", 32, "rank"), ("modules_to_save", ["lm_head"], "modules_to_save")],
)
async def test_what_vllm_does_not_take_is_refused_before_it_is_asked_and_by_vllm_itself(
    engine: Engine,
    base: PreparedBase,
    adapters: Sequence[Adapter],
    tmp_path: Path,
    field: str,
    value: object,
    words: str,
) -> None:
    spoiled = spoil(adapters[2], tmp_path, read_json(adapters[2].path / "adapter_config.json") | {field: value})
    with pytest.raises(AdapterRejected, match=field if field != "r" else "rank 32; this engine takes at most 16"):
        check_adapter(spoiled.path, base.digest, engine.max_lora_rank or 0, gguf=False)
    with pytest.raises(AdapterRejected, match=words):
        await engine.ensure_adapter(spoiled)
    assert engine.ready


async def test_ten_adapters_on_two_slots_all_answer_and_none_wrongly(
    engine: Engine, adapters: Sequence[Adapter]
) -> None:
    for adapter in adapters:
        await engine.ensure_adapter(adapter)
    alone = [await greedy(engine, adapter.engine_name) for adapter in adapters]
    assert len({tuple(ids) for ids in alone}) == len(adapters), "each says something of its own"
    async with control_of(engine.endpoint) as control:
        for _ in range(2):
            replies, _ = await asyncio.gather(
                asyncio.gather(*(greedy(engine, adapter.engine_name) for adapter in adapters)),
                asyncio.gather(*(verify(control, adapter, "own") for adapter in adapters)),
            )
            for own, reply in zip(alone, replies, strict=True):
                assert agreement(own, reply) > max(agreement(other, reply) for other in alone if other is not own)
    assert engine.restarts == 0, "scoring a prompt beside other replies ends no engine"
    for adapter in adapters[2:]:
        await engine.drop_adapter(adapter.engine_name)


async def test_a_request_for_an_adapter_that_was_dropped_is_let_finish(
    engine: Engine, adapters: Sequence[Adapter]
) -> None:
    name = adapters[5].engine_name
    await engine.ensure_adapter(adapters[5])
    await engine.hold(name)
    dropping = asyncio.ensure_future(engine.drop_adapter(name))
    await asyncio.sleep(0)
    assert not engine.serves(name), "no new request is sent"
    assert await greedy(engine, name), "one that was on its way is answered"
    assert not dropping.done()
    engine.release(name)
    await dropping
    assert name not in await models(engine)


async def test_an_engine_elsewhere_gets_its_adapters_and_gets_them_again_when_it_has_lost_them(
    engine: Engine, base: PreparedBase, adapters: Sequence[Adapter]
) -> None:
    there = adapters[7].path.parent.parent / "as-seen-there"
    there.symlink_to(adapters[7].path.parent)
    remote = remote_engine(
        base,
        engine.endpoint,
        path_map={str(adapters[7].path.parent): str(there)},
        timings=Timings(health_interval_s=0.2, backoff_first_s=0.1),
    )
    remote.set_desired([adapters[7]])
    await remote.start()
    try:
        await remote.wait_ready(30)
        assert remote.serves(adapters[7].engine_name)
        cards = (await ask(engine.endpoint, "/v1/models")).json()["data"]
        assert str(there / adapters[7].path.name) in [card["root"] for card in cards]
        assert remote.pid is None
        async with control_of(engine.endpoint) as control:  # as a restart by its owner would
            await control.unload_adapter(adapters[7].engine_name)
        await until(lambda: remote.restarts == 1)
        await until(lambda: remote.serves(adapters[7].engine_name))
        await remote.drop_adapter(adapters[7].engine_name)
    finally:
        await remote.stop()
    assert engine.ready, "it was not ours to stop"


async def test_an_engine_elsewhere_that_serves_something_else_says_what_to_do(
    engine: Engine, base: PreparedBase
) -> None:
    remote = remote_engine(base, engine.endpoint, served_name="other", timings=Timings(backoff_first_s=0.1))
    await remote.start()
    try:
        await until(lambda: remote.reason)
        assert "serves own and not 'other'; start it with --served-model-name other" in (remote.reason or "")
        assert not remote.ready
    finally:
        await remote.stop()


async def test_it_sleeps_and_is_woken(engine: Engine) -> None:
    async with control_of(engine.endpoint) as control:
        await control.sleep()
        assert await control.is_sleeping()
        await control.wake_up()
        assert not await control.is_sleeping()
    assert await greedy(engine, "own")


def command_line(engine: Engine) -> list[str]:
    return Path(f"/proc/{engine.pid}/cmdline").read_text().split("\0")


def engine_folder(engine: Engine) -> str:
    argv = command_line(engine)
    return argv[argv.index("-X") + 1].partition("=")[2]


def spoil(adapter: Adapter, folder: Path, config: dict[str, object]) -> Adapter:
    """The adapter with another adapter_config.json, and a manifest that owns up to it."""
    path = folder / "spoiled"
    shutil.copytree(adapter.path, path)
    (path / "adapter_config.json").unlink()
    (path / "adapter_config.json").write_text(json.dumps(config))
    write_manifest_again(path)
    return Adapter(f"spoiled@{folder.name}", path, adapter.base, adapter.digest)


async def models(engine: Engine) -> list[str]:
    async with control_of(engine.endpoint) as control:
        return list(await control.models())


async def greedy(engine: Engine, model: str) -> list[int]:
    body = {"model": model, "prompt": [1, 300, 400, 500, 600], "max_tokens": 24, "temperature": 0, "ignore_eos": True}
    reply = await ask(engine.endpoint, "/v1/completions", body | {"return_token_ids": True})
    assert reply.status_code == 200, reply.text
    ids: list[int] = reply.json()["choices"][0]["token_ids"]
    return ids


def agreement(one: list[int], other: list[int]) -> float:
    """How much of two replies is the same from their beginning on: rounding in bfloat16 may part them late, a wrong adapter at
    once."""
    same = next((n for n, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))
    return same / len(one)
