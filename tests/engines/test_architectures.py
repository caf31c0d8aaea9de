"""From a model's folder to a tuned model that is served, for architectures whose conversion is llama.cpp's own."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from gateway.bases import prepare
from gateway.engines.adapters import check_adapter
from gateway.engines.kinds import llama_engine
from gateway.jobdir import Hyperparameters, Lora
from tests.engines.parts import as_adapter
from tests.tiny_architectures import write_tiny_architecture
from tests.tiny_model import write_examples, write_job

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Phi3ForCausalLM"])
async def test_what_is_trained_on_such_a_base_is_served_and_holds_the_witness(
    architecture: str, tmp_path: Path
) -> None:
    source = write_tiny_architecture(tmp_path / "source", architecture)
    base = await prepare("tiny", source, "vicuna_v1.1", tmp_path / "bases/tiny")
    assert (base.architecture, base.untrainable) == (architecture, None)
    job = write_job(
        tmp_path / "job",
        base.path,
        write_examples(tmp_path / "train.jsonl", 20),
        hyperparameters=Hyperparameters(n_epochs=1, batch_size=10, learning_rate_multiplier=4),
        lora=Lora(),
    )
    trainer = await asyncio.create_subprocess_exec(sys.executable, "-m", "trainer", str(job.path))
    assert await trainer.wait() == 0
    result = job.read_result()
    assert result is not None and (result.status, result.steps) == ("succeeded", 2), result
    facts = check_adapter(job.adapter, base.digest)
    assert facts.modules == 2 * (4 if architecture == "Phi3ForCausalLM" else 7)
    engine = llama_engine(base, tmp_path / "engine", max_seqs=2, threads=1)
    await engine.start()
    try:
        await engine.wait_ready(60)
        report = await engine.ensure_adapter(as_adapter(job.adapter, "tiny"))
    finally:
        await engine.stop()
    assert report is not None and report.warning is None
    assert report.error < 0.1 * report.effect and report.scale == pytest.approx(1, abs=0.05)
