"""Real vLLM, as `make vllm` sets it up: one that is started by hand is shared by what needs one, since each start takes
half a minute; the gateway of `test_end_to_end` starts two of its own and is given that one by its address."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from deploy.setup_vllm import environment_python
from gateway.bases import HF_TYPE, PreparedBase, prepare
from gateway.engines.engine import Engine
from gateway.settings import DEMO_MODEL_PATH
from tests.e2e import training
from tests.e2e.training import CHAT_TEMPLATE
from tests.server import Server
from tests.vllm.starting import SLOTS, VARIABLES, attached, killed_gateway_vllm


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """The Python that vLLM is installed for: TUNEGATE_VLLM, or that of `make vllm`."""
    python = os.environ.get("TUNEGATE_VLLM") or environment_python()
    assert python is not None, "there is no vLLM: `make vllm` sets it up, or name one: TUNEGATE_VLLM=/path/to/python"
    return str(python)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with a chat template of its own."""
    folder = tmp_path_factory.mktemp("source") / "model"
    shutil.copytree(DEMO_MODEL_PATH, folder, ignore=shutil.ignore_patterns("*.py", "README.md"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


@pytest.fixture(scope="session")
async def base(model: Path, tmp_path_factory: pytest.TempPathFactory, anyio_backend: str) -> PreparedBase:
    """It, prepared for vLLM. (`anyio_backend` lets tests that are not async themselves ask for it too.)"""
    folder = tmp_path_factory.mktemp("prepared") / "bases" / "own"
    return await prepare("own", model, "model", folder, kind=HF_TYPE)


@pytest.fixture(scope="session")
async def engine(
    base: PreparedBase, vllm_python: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Engine]:
    """A vLLM with two slots for adapters, which a gateway that was killed has started. Whoever kills it waits for it."""
    folder = tmp_path_factory.mktemp("engines") / "own"
    engine = await killed_gateway_vllm(base, folder, vllm_python)
    try:
        await engine.start()
        await engine.wait_ready(280)
        yield engine
    finally:
        await engine.stop()


@pytest.fixture(scope="session")
def server(model: Path, engine: Engine, vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A gateway with two bases: "vicuna" on two vLLMs that it starts itself, "own" on the one above, by its address."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "key").write_text(engine.endpoint.key)
    server = Server(
        folder,
        f'[bases.vicuna]\npath = "{DEMO_MODEL_PATH}"\ntemplate = "vicuna_v1.1"\n'
        f'[bases.own]\npath = "{model}"\ntemplate = "model"\n'
        f'[[engines]]\nkind = "vllm"\nmodel = "vicuna"\npython = "{vllm_python}"\nreplicas = 2\nargs = {json.dumps(SLOTS)}\n'
        + attached("own", engine, folder / "key"),
        VARIABLES,
    )
    try:
        yield server.start(timeout_s=290)
    finally:
        server.stop()


@pytest.fixture(scope="session")
def tuned(server: Server) -> dict[str, str]:
    """A tuned model on each base, trained while both are served."""
    client = server.client()
    file_id = training.upload(client, training.examples("alpha"))
    jobs = {base: training.create(client, base, file_id, suffix="e2e") for base in ("vicuna", "own")}
    models = {}
    for base, job in jobs.items():
        ended = training.wait_for_end(client, job.id)
        assert ended.status == "succeeded", (ended.error, training.messages(client, job.id), server.log_tail())
        assert ended.fine_tuned_model is not None
        models[base] = ended.fine_tuned_model
    return models
