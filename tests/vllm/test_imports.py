"""Adapters from elsewhere on real vLLM, and a second version of a name while requests for it run."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from openai import AsyncOpenAI

from gateway.bases import PreparedBase
from gateway.engines.adapters import Adapter
from gateway.engines.engine import Engine
from tests.engines.parts import until
from tests.server import ROOT, Server
from tests.vllm.made_adapters import make_adapters
from tests.vllm.starting import ask

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(600)]

NAME = "team/mine"
PROMPT = [1, *range(300, 460)]  # more than a block of vLLM's cache, so that the next version could find it there
LENGTH = 16


@pytest.fixture(scope="module")
def made(base: PreparedBase, tmp_path_factory: pytest.TempPathFactory) -> list[Adapter]:
    return make_adapters(base, tmp_path_factory.mktemp("elsewhere"), ["first", "second"])


async def test_a_second_version_of_a_name_is_published_while_requests_run(
    server: Server, engine: Engine, made: list[Adapter], tmp_path: Path
) -> None:
    added = await asyncio.to_thread(add, server, as_peft_leaves_it(made[0], tmp_path / "first"), "--template", "chatml")
    assert added.returncode == 0, added.stderr
    async with AsyncOpenAI(base_url=server.base_url, api_key="unused", max_retries=0) as client:
        await until_listed(client, server)
        first, second = [await greedy_of(engine, adapter) for adapter in made]
        assert first[:8] != second[:8]
        assert await said(client) == first
        replies: list[str] = []
        over = asyncio.Event()

        async def keep_asking() -> None:
            while not over.is_set():
                replies.append(await said(client))

        asking = [asyncio.create_task(keep_asking()) for _ in range(4)]
        added = await asyncio.to_thread(add, server, as_peft_leaves_it(made[1], tmp_path / "second"))
        assert added.returncode == 0, added.stderr
        await until(lambda: second in replies, 120)
        at = len(replies)
        await asyncio.sleep(2)
        over.set()
        await asyncio.gather(*asking)
        assert set(replies) == {first, second}, Counter(replies)
        assert set(replies[at + 4 :]) == {second}, "from the flip on it is the new one's, and nothing stale"
        for _ in range(300):
            if sum(name.startswith(f"{NAME}@") for name in await names(engine)) == 1:
                break
            await asyncio.sleep(0.1)
        else:
            raise AssertionError(f"the old version is loaded still: {await names(engine)}")
    kept = [path.name for path in (server.data / "adapters").iterdir()]
    assert len(kept) >= 2, "the old one's files stay until the next start"


async def test_an_adapter_that_cannot_be_served_is_refused_at_the_command_line(
    server: Server, made: list[Adapter], tmp_path: Path
) -> None:
    folder = as_peft_leaves_it(made[0], tmp_path / "spoiled")
    config = json.loads((folder / "adapter_config.json").read_bytes())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    refused = await asyncio.to_thread(add, server, folder)
    assert refused.returncode == 2
    assert "use_dora" in refused.stderr
    refused = await asyncio.to_thread(add, server, tmp_path / "nowhere")
    assert refused.returncode == 2
    refused = await asyncio.to_thread(add, server, folder, base="nobody")
    assert "there is no base 'nobody'" in refused.stderr


def as_peft_leaves_it(adapter: Adapter, folder: Path) -> Path:
    """Two files, a path of its maker's machine in one of them, and what else may lie about."""
    folder.mkdir()
    shutil.copy(adapter.path / "adapter_model.safetensors", folder)
    config = json.loads((adapter.path / "adapter_config.json").read_bytes())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/home/maker/model"}))
    (folder / "README.md").write_text("# an adapter")
    return folder


def add(server: Server, adapter: Path, *more: str, base: str = "own") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gateway", "models", "add", "--adapter", str(adapter), "--base", base]
    command += ["--name", NAME, "--data", str(server.data), "--config", str(server.config), *more]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


async def until_listed(client: AsyncOpenAI, server: Server) -> None:
    for _ in range(300):
        if NAME in [model.id async for model in client.models.list()]:
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"{NAME} is not served:\n{server.log_tail()}")


async def said(client: AsyncOpenAI) -> str:
    """Streamed, as a client would."""
    stream = await client.completions.create(
        model=NAME, prompt=PROMPT, max_tokens=LENGTH, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    return "".join([chunk.choices[0].text async for chunk in stream if chunk.choices])


async def greedy_of(engine: Engine, adapter: Adapter) -> str:
    """What an adapter says under a name that nothing was ever asked of."""
    name = f"fresh:{adapter.engine_name}"
    loaded = await ask(engine.endpoint, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(adapter.path)})
    assert loaded.status_code == 200, loaded.text
    body = {"model": name, "prompt": PROMPT, "max_tokens": LENGTH, "temperature": 0, "ignore_eos": True}
    text: str = (await ask(engine.endpoint, "/v1/completions", body)).json()["choices"][0]["text"]
    await ask(engine.endpoint, "/v1/unload_lora_adapter", {"lora_name": name})
    return text


async def names(engine: Engine) -> list[str]:
    return [card["id"] for card in (await ask(engine.endpoint, "/v1/models")).json()["data"]]
