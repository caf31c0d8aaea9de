"""An adapter that the real trainer made, on the real worker: served as it was trained, refused when it was spoiled."""

from __future__ import annotations

import asyncio
import shutil
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from gateway.bases import PreparedBase, prepare
from gateway.engines.adapters import Adapter, AdapterRejected, check_adapter, link_adapter
from gateway.engines.engine import Engine
from gateway.engines.kinds import llama_engine
from gateway.engines.witness import WitnessMismatch
from gateway.jobdir import Hyperparameters, Lora, read_json
from tests.tiny_model import write_examples, write_job, write_tiny_model
from trainer.export.lora_gguf import write_lora_gguf
from trainer.export.tensors import Layout

pytestmark = pytest.mark.anyio


@dataclass(frozen=True)
class Trained:
    base: PreparedBase
    adapter: Adapter


class Unpermuted(Layout):
    """Writes q and k as transformers has them: the mistake to be caught."""

    def to_gguf_rows(self, gguf_name: str, tensor: Any) -> Any:
        return tensor


@pytest.fixture(scope="module")
async def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    source = write_tiny_model(folder / "source")
    base = await prepare("tiny", source, "vicuna_v1.1", folder / "bases/tiny")
    job = write_job(
        folder / "job",
        base.path,
        write_examples(folder / "train.jsonl", 20),
        hyperparameters=Hyperparameters(n_epochs=1),
        lora=Lora(),
    )
    trainer = await asyncio.create_subprocess_exec(sys.executable, "-m", "trainer", str(job.path))
    assert await trainer.wait() == 0
    facts = check_adapter(job.adapter, base.digest)
    assert facts.rank == 16 and facts.alpha == 32
    digest, path = link_adapter(job.adapter, folder / "adapters")
    return Trained(base, Adapter("tuned@1", path, "tiny", digest))


@pytest.fixture
async def engine(trained: Trained, tmp_path: Path) -> AsyncIterator[Engine]:
    engine = llama_engine(trained.base, tmp_path / "engine", max_seqs=2, threads=1)
    await engine.start()
    await engine.wait_ready(60)
    yield engine
    await engine.stop()


async def test_what_was_trained_is_served_with_a_wide_margin(engine: Engine, trained: Trained) -> None:
    report = await engine.ensure_adapter(trained.adapter)
    assert report is not None and report.warning is None and engine.serves("tuned@1")
    assert report.error < 0.06 * report.effect and report.scale == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize(
    ("mistake", "factor"),
    [("alpha", 2.0), ("alpha", 0.5), ("alpha", 4.0), ("permutation", 1.0)],  # 4 = sqrt(16), as if for rsLoRA
)
async def test_a_spoiled_export_is_caught_and_never_served(
    engine: Engine, trained: Trained, tmp_path: Path, mistake: str, factor: float
) -> None:
    path = tmp_path / "spoiled"
    shutil.copytree(trained.adapter.path, path)
    (path / "adapter.gguf").unlink()  # a hard link no more
    config = read_json(path / "adapter_config.json")
    layout = Unpermuted if mistake == "permutation" else Layout
    write_lora_gguf(
        path / "adapter.gguf",
        load_file(path / "adapter_model.safetensors"),
        config | {"lora_alpha": config["lora_alpha"] * factor},
        layout.from_config(read_json(trained.base.path / "config.json")),
    )
    with pytest.raises(AdapterRejected, match=r"adapter\.gguf"):
        check_adapter(path, trained.base.digest)
    with pytest.raises(WitnessMismatch):
        await engine.ensure_adapter(replace(trained.adapter, engine_name="spoiled@1", path=path))
    assert not engine.serves("spoiled@1") and not engine.adapters


async def test_the_adapter_is_refused_on_another_base_by_its_digest_and_by_its_witness(
    trained: Trained, tmp_path: Path
) -> None:
    source = write_tiny_model(tmp_path / "source", seed=5)
    other = await prepare("tiny", source, "vicuna_v1.1", tmp_path / "bases/tiny")
    with pytest.raises(AdapterRejected, match="train it again on this base"):
        check_adapter(trained.adapter.path, other.digest)
    engine = llama_engine(other, tmp_path / "engine", max_seqs=2, threads=1)
    await engine.start()
    try:
        await engine.wait_ready(60)
        with pytest.raises(WitnessMismatch, match="the base itself"):
            await engine.ensure_adapter(trained.adapter)
    finally:
        await engine.stop()
