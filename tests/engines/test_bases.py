"""A base is prepared once, again when its source changed, and never half."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
from pathlib import Path

import pytest

from gateway.bases import HF_TYPE, prepare, read_base
from gateway.engines.adapters import file_digest
from gateway.errors import SettingsError
from tests.tiny_model import write_tiny_model

pytestmark = pytest.mark.anyio


async def test_a_base_is_prepared_once_and_read_the_second_time(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "source")
    lines: list[str] = []
    base = await prepare("org/tiny:1", source, "vicuna_v1.1", tmp_path / "bases/tiny", lines.append)
    assert base.name == "org/tiny:1" and base.context_length == 256 and base.eos_token_ids == (2,)
    assert base.digest == file_digest(base.gguf) and base.template == "vicuna_v1.1" and lines
    written_at = base.gguf.stat().st_mtime_ns
    assert await prepare("org/tiny:1", source, "vicuna_v1.1", tmp_path / "bases/tiny") == base
    assert base.gguf.stat().st_mtime_ns == written_at


async def test_a_changed_source_name_or_template_prepares_again(tmp_path: Path) -> None:
    source, out = write_tiny_model(tmp_path / "source"), tmp_path / "bases/tiny"
    first = await prepare("tiny", source, "vicuna_v1.1", out)
    other = write_tiny_model(tmp_path / "other", seed=1)
    os.replace(other / "model.safetensors", source / "model.safetensors")
    second = await prepare("tiny", source, "vicuna_v1.1", out)
    assert second.digest != first.digest
    third = await prepare("tiny", source, "alpaca", out)
    assert third.template == "alpaca" and third.digest == second.digest
    assert (await prepare("renamed", source, "alpaca", out)).name == "renamed"


async def test_a_base_for_vllm_stays_as_it_is_on_hugging_face(tmp_path: Path) -> None:
    source, out = write_tiny_model(tmp_path / "source"), tmp_path / "bases/tiny"
    (source / "modeling_evil.py").write_text("raise SystemExit")
    base = await prepare("tiny", source, "vicuna_v1.1", out, kind=HF_TYPE)
    assert base.gguf is None and base.hf == out / "hf" and base.untrainable is None
    assert not list(out.glob("*.gguf"))
    assert (base.hf / "model.safetensors").samefile(source / "model.safetensors"), "no second copy"
    assert not (base.hf / "modeling_evil.py").exists(), "nothing that could be executed"
    assert read_base(out) == base
    other = write_tiny_model(tmp_path / "other", seed=1)
    os.replace(other / "model.safetensors", source / "model.safetensors")
    assert (await prepare("tiny", source, "vicuna_v1.1", out, kind=HF_TYPE)).digest != base.digest


async def test_a_ready_gguf_is_not_for_vllm(tmp_path: Path) -> None:
    base = await prepare("tiny", write_tiny_model(tmp_path / "source"), "vicuna_v1.1", tmp_path / "bases/tiny")
    assert base.gguf is not None
    with pytest.raises(SettingsError, match="vLLM serves models as they are on Hugging Face"):
        await prepare("again", base.gguf, "vicuna_v1.1", tmp_path / "bases/again", kind=HF_TYPE)


async def test_what_a_killed_preparation_left_is_swept(tmp_path: Path) -> None:
    source, out = write_tiny_model(tmp_path / "source"), tmp_path / "bases/tiny"
    (tmp_path / "bases/.tiny.123").mkdir(parents=True)
    out.mkdir()
    (out / "config.json").write_text("{}")
    base = await prepare("tiny", source, "vicuna_v1.1", out)
    assert base.gguf.is_file() and sorted(path.name for path in out.parent.iterdir()) == [".lock-tiny", "tiny"]


@pytest.mark.parametrize("what", ["nothing", "a broken config", "an unknown architecture", "an unknown template"])
async def test_a_source_that_cannot_be_prepared_is_named_and_leaves_nothing(tmp_path: Path, what: str) -> None:
    source = tmp_path / "source"
    if what != "nothing":
        config = write_tiny_model(source) / "config.json"
        if what == "a broken config":
            config.write_text("{")
        if what == "an unknown architecture":
            config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": ["Strange"]}))
    template = "no_such_template" if what == "an unknown template" else "vicuna_v1.1"
    with pytest.raises(SettingsError, match="source"):
        await prepare("tiny", source, template, tmp_path / "bases/tiny")
    assert not (tmp_path / "bases/tiny").exists()


def test_a_folder_that_is_no_prepared_base_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="remove the folder"):
        read_base(tmp_path)


async def test_a_preparation_that_a_killed_gateway_left_is_waited_for(tmp_path: Path) -> None:
    source, out = write_tiny_model(tmp_path / "source"), tmp_path / "bases/tiny"
    out.parent.mkdir()
    held = os.open(out.parent / ".lock-tiny", os.O_RDWR | os.O_CREAT)
    fcntl.flock(held, fcntl.LOCK_EX)
    preparing = asyncio.create_task(prepare("tiny", source, "vicuna_v1.1", out))
    await asyncio.sleep(0.5)
    assert not preparing.done() and not out.exists()
    os.close(held)
    assert (await preparing).gguf.is_file()
