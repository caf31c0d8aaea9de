"""Two real vLLMs behind one gateway, and one elsewhere: adapters on both, a death under load, a gateway that is killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest
from openai import APIError, APIStatusError, AsyncOpenAI

from gateway.jobdir import process_start_time
from tests.e2e import training
from tests.server import Server
from tests.vllm.starting import ask, replicas

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(600)]

CLIENTS = 6


async def test_a_model_that_was_tuned_while_both_served_answers_on_both(server: Server, tuned: dict[str, str]) -> None:
    folder = server.data / "engines" / "vicuna"
    await until_served(server, tuned["vicuna"], 2)
    said = []
    for endpoint in replicas(folder):
        names = [card["id"] for card in (await ask(endpoint, "/v1/models")).json()["data"]]
        (name,) = [name for name in names if name.startswith(f"{tuned['vicuna']}@")]
        body = {
            "model": name,
            "prompt": [1, 300, 400, 500],
            "max_tokens": 12,
            "temperature": 0,
            "return_token_ids": True,
        }
        said.append((await ask(endpoint, "/v1/completions", body)).json()["choices"][0]["token_ids"])
    assert said[0] == said[1] and said[0]


async def test_one_of_two_is_killed_under_load_and_nobody_fails_who_had_not_begun(
    server: Server, tuned: dict[str, str]
) -> None:
    folder = server.data / "engines" / "vicuna"
    outcomes: Counter[str] = Counter()
    over = asyncio.Event()

    async def keep_asking(client: AsyncOpenAI, model: str) -> None:
        while not over.is_set():
            begun = False
            try:
                stream = await client.chat.completions.create(
                    model=model,
                    messages=[{"role": "user", "content": "What is cedar 2?"}],
                    max_tokens=60,
                    stream=True,
                    extra_body={"ignore_eos": True},
                )
                async for chunk in stream:
                    begun = begun or bool(chunk.choices)  # its first event, which may hold no text yet
                outcomes["whole"] += 1
            except APIStatusError as error:
                outcomes[f"refused: {error.status_code} {error.message}"] += 1
            except APIError as error:
                outcomes[
                    "broken off, with an error event" if begun else f"failed before it began: {error.message}"
                ] += 1

    async with AsyncOpenAI(base_url=server.base_url, api_key="unused", max_retries=0) as client:
        asking = [
            asyncio.create_task(keep_asking(client, name)) for name in ("vicuna", tuned["vicuna"]) * (CLIENTS // 2)
        ]
        await asyncio.sleep(3)
        assert outcomes["whole"] or not outcomes, outcomes
        record = folder / "spawn.json"
        pid = json.loads(record.read_bytes())["pid"]
        family = [member for member in session(pid) if member != pid]
        assert family, "vLLM's engine is a process of its own"
        key = (folder / "key").read_text()
        os.kill(pid, signal.SIGKILL)
        await asyncio.sleep(5)
        over.set()
        await asyncio.gather(*asking)
    broken = outcomes.pop("broken off, with an error event", 0)
    assert set(outcomes) == {"whole"}, outcomes
    assert outcomes["whole"] >= CLIENTS
    assert broken <= CLIENTS, "only those that the dead one was answering"
    await until_served(server, tuned["vicuna"], 2, not_pid=pid)
    assert not any(process_start_time(member) for member in family), "nothing of it is left"
    assert (folder / "key").read_text() != key


async def test_a_killed_gateways_engines_are_taken_over_with_their_adapters(
    server: Server, tuned: dict[str, str]
) -> None:
    folder = server.data / "engines" / "vicuna"
    before = pids(folder)
    assert len(before) == 2
    await asyncio.to_thread(server.kill)
    started = time.monotonic()
    await asyncio.to_thread(server.start, timeout_s=120)
    assert time.monotonic() - started < 60, "nothing was loaded anew"
    assert pids(folder) == before
    for base, model in tuned.items():
        reply = await asyncio.to_thread(training.ask, server.client(), model, "What is cedar 2?")
        assert reply.startswith("alpha"), base
    await until_served(server, tuned["vicuna"], 2)


async def until_served(server: Server, model: str, count: int, not_pid: int = 0, timeout_s: float = 240) -> None:
    """So many replicas of "vicuna" list the model's adapter, and the process `not_pid` is none of them."""
    folder = server.data / "engines" / "vicuna"
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        having = 0
        for endpoint in [] if not_pid in pids(folder) else replicas(folder):
            try:
                cards = (await ask(endpoint, "/v1/models")).json()["data"]
            except (httpx.HTTPError, ValueError):
                continue
            having += any(card["id"].startswith(f"{model}@") for card in cards)
        if having == count:
            return
        await asyncio.sleep(0.2)
    raise AssertionError(f"{model} is not on {count} replicas after {timeout_s} s:\n{server.log_tail()}")


def pids(folder: Path) -> list[int]:
    return [json.loads(record.read_bytes())["pid"] for record in sorted(folder.glob("**/spawn.json"))]


def session(leader: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.getsid(int(entry.name)) == leader:
                found.append(int(entry.name))
        except ProcessLookupError:
            continue
    return found
