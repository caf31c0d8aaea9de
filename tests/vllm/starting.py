"""How the tests start vLLM: small, and with slots for two adapters."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx

from gateway.bases import PreparedBase
from gateway.engines.client import Endpoint
from gateway.engines.engine import Engine
from gateway.engines.kinds import vllm_engine
from tests.engines.parts import until
from tests.server import ROOT

# Two adapters at once on the engine and four in memory: more than that are brought back from their folders when asked.
MAX_SEQS = 16
SLOTS = ("--max-loras", "2", "--max-cpu-loras", "4", "--max-num-seqs", str(MAX_SEQS))
# A model as small as this one would fill an object with blanks for ever.
SLOTS += ("--structured-outputs-config", '{"backend":"guidance","disable_any_whitespace":true}')
# What a test asks /render for, with a template of the request's own.
ORACLE = ("--enable-scale-out", "--trust-request-chat-template")
# Several share two cores: none binds itself to one.
VARIABLES = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}

COUNTS = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
# `vicuna_v1.1` as a Jinja template, for vLLM's own rendering.
VICUNA = """{{ bos_token }}{%- if messages[0].role == 'system' -%}{{ messages[0].content }}{%- else -%}\
A chat between a curious user and an artificial intelligence assistant. \
The assistant gives helpful, detailed, and polite answers to the user's questions.{%- endif -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{ ' USER: ' + m.content }}
{%- elif m.role == 'assistant' -%}{{ ' ASSISTANT: ' + m.content + '</s>' }}{%- endif -%}
{%- endfor -%}{{ (' ' if messages[-1].role != 'assistant' else '') + 'ASSISTANT:' }}"""


def vllm_of(base: PreparedBase, folder: Path, python: str) -> Engine:
    """Not started yet."""
    return vllm_engine(base, folder, python=python, arguments=(*SLOTS, *ORACLE), variables=VARIABLES)


async def killed_gateway_vllm(base: PreparedBase, folder: Path, python: str) -> Engine:
    """The engine of a vLLM that runs already: a gateway started it and was killed with SIGKILL right after."""
    spec = json.dumps({"base": asdict(base), "folder": folder, "python": python}, default=str)
    command = [sys.executable, "-m", "tests.vllm.starting", spec]
    gateway = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, cwd=ROOT)
    assert gateway.stdout is not None
    said = await asyncio.wait_for(gateway.stdout.readline(), 60)
    gateway.kill()
    await gateway.wait()
    assert said, "the gateway ended before it got that far"
    return vllm_of(base, folder, python)


def attached(base: str, engine: Engine, key_file: Path) -> str:
    """The settings' entry of a vLLM that runs already."""
    endpoint = engine.endpoint
    url = f"http://{endpoint.host}:{endpoint.port}"
    return f'[[engines]]\nkind = "vllm"\nmodel = "{base}"\nurls = ["{url}"]\nkey_file = "{key_file}"\n'


async def ask(endpoint: Endpoint, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
    """A request to an engine itself."""
    async with httpx.AsyncClient(timeout=60, headers={"Authorization": f"Bearer {endpoint.key}"}) as client:
        url = f"http://{endpoint.host}:{endpoint.port}{path}"
        return await (client.get(url) if body is None else client.post(url, json=body))


def replicas(folder: Path) -> list[Endpoint]:
    """The vLLMs that a gateway has started for a base, by the folder that it keeps of them."""
    found = []
    for record in sorted(folder.glob("**/spawn.json")):
        port = json.loads(record.read_bytes())["port"]
        found.append(Endpoint("127.0.0.1", port, record.with_name("key").read_text()))
    return found


async def running(endpoint: Endpoint) -> tuple[int, int]:
    """How many requests an engine is working on, and how many wait."""
    text = (await ask(endpoint, "/metrics")).text
    counts = [line.rsplit(" ", 1)[1] for line in text.splitlines() if line.startswith(COUNTS)]
    assert len(counts) == len(COUNTS), text
    at_work, waiting = (int(float(count)) for count in counts)
    return at_work, waiting


async def main(spec: dict[str, Any]) -> None:
    """A gateway that is there to be killed."""
    paths = {name: Path(spec["base"][name]) for name in ("path", "hf")}
    base = PreparedBase(**{**spec["base"], **paths, "eos_token_ids": tuple(spec["base"]["eos_token_ids"])})
    folder = Path(spec["folder"])
    engine = vllm_of(base, folder, spec["python"])
    await engine.start()
    await until((folder / "spawn.json").exists)
    print(engine.pid or "spawned", flush=True)
    await asyncio.sleep(600)


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
