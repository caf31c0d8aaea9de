"""How a vLLM is started: what is ours is not the owner's to choose, and its key is told to nobody."""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from gateway.bases import PreparedBase
from gateway.engines.kinds import llama_engine, vllm_engine
from gateway.engines.spawn import WorkerFolder
from gateway.engines.vllm_launch import PLUGIN_PATH, VllmLaunch, argument_value
from gateway.errors import SettingsError


def launch(*arguments: str) -> VllmLaunch:
    return VllmLaunch("tiny", Path("/models/tiny/hf"), "sha256:1", "/opt/vllm/bin/python", arguments)


def test_the_command_line_names_the_model_and_the_folder_and_no_key(tmp_path: Path) -> None:
    argv = launch("--dtype", "float32").argv(WorkerFolder(tmp_path), 5001)
    assert argv[0] == "/opt/vllm/bin/python"
    assert argument_value(argv, "--host") == "127.0.0.1"
    assert argument_value(argv, "--port") == "5001"
    assert argument_value(argv, "--model") == "/models/tiny/hf"
    assert argument_value(argv, "--served-model-name") == "tiny"
    assert argument_value(argv, "--generation-config") == "vllm", "no defaults that we do not know of"
    assert argv[-2:] == ["--dtype", "float32"]
    told = launch().environment("the-key")
    assert told["VLLM_API_KEY"] == "the-key"
    assert told["HF_HUB_OFFLINE"] == "1"
    assert told["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert told["PYTHONPATH"].split(":")[0] == str(PLUGIN_PATH)


@pytest.mark.parametrize(
    "argument", ["--port", "--host=0.0.0.0", "--api-key", "--served_model_name=x", "--middleware", "--no-enable-lora"]
)
def test_what_the_gateway_relies_on_cannot_be_overridden(argument: str) -> None:
    with pytest.raises(SettingsError, match="set by Tunegate; leave it out"):
        launch(argument, "1")


def test_the_highest_rank_is_read_off_the_arguments() -> None:
    assert launch().max_lora_rank == 16
    assert launch("--max-lora-rank", "64").max_lora_rank == 64
    assert launch("--max_lora_rank=8").max_lora_rank == 8
    with pytest.raises(SettingsError, match="not a number"):
        _ = launch("--max-lora-rank", "many").max_lora_rank


def test_a_base_is_served_by_the_kind_that_it_was_prepared_for(tmp_path: Path) -> None:
    gguf = PreparedBase("tiny", tmp_path, tmp_path / "m.gguf", "sha256:1", "LlamaForCausalLM", 64, "chatml", (2,))
    hf = PreparedBase("tiny", tmp_path, None, "sha256:1", "LlamaForCausalLM", 64, "chatml", (2,), hf=tmp_path / "hf")
    with pytest.raises(SettingsError, match='type = "hf"'):
        vllm_engine(gguf, tmp_path / "engine", python="/opt/vllm/bin/python")
    with pytest.raises(SettingsError, match=r"has no \.gguf"):
        llama_engine(hf, tmp_path / "engine")


@pytest.mark.parametrize(
    ("headers", "passes"),
    [
        ([(b"authorization", b"Bearer the-key")], True),
        ([(b"authorization", b"Bearer another")], False),
        ([(b"authorization", b"Bearer the-key"), (b"authorization", b"Bearer the-key")], False),
        ([], False),
    ],
)
@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_the_guard_lets_nobody_in_without_the_key(
    monkeypatch: pytest.MonkeyPatch, headers: list[tuple[bytes, bytes]], passes: bool, kind: str
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "the-key")
    spec = importlib.util.spec_from_file_location("tunegate_guard", PLUGIN_PATH / "tunegate_guard.py")
    assert spec is not None and spec.loader is not None
    guard = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(guard)
    reached: list[str] = []
    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope["path"])

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": kind, "path": "/sleep", "headers": headers}
    asyncio.run(guard.RequireKey(app)(scope, None, send))
    assert bool(reached) is passes
    if not passes:
        assert (sent[0]["type"], sent[0].get("status")) in {("http.response.start", 401), ("websocket.close", None)}
