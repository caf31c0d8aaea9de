"""Whatever the method, precision or quantisation: the engine does with the adapter what the witness says of it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file

from gateway.bases import PreparedBase, prepare
from gateway.engines.adapters import check_adapter
from gateway.engines.engine import Engine
from gateway.engines.kinds import llama_engine
from gateway.engines.witness import WitnessMismatch
from gateway.jobdir import BaseRef, Lora, Method, Options, read_json
from tests.engines.parts import as_adapter
from tests.tiny_model import write_tiny_model
from tests.trainer.drawn import draw_examples
from tests.trainer.runs import Settings, train_in_process
from trainer.arithmetic import choose
from trainer.data.examples import Examples
from trainer.export.lora_gguf import write_lora_gguf
from trainer.export.tensors import Layout
from trainer.export.witness import Witness
from trainer.model import add_lora, base_learning_rate, load_base

pytestmark = pytest.mark.anyio
torch.set_num_threads(1)

LORA = Lora(rank=8, alpha=16)
RUNS: dict[str, tuple[Method, Lora, Options]] = {
    "dpo": ("dpo", LORA, Options()),
    "kto": ("kto", LORA, Options()),
    "orpo": ("orpo", LORA, Options()),
    "bf16": ("supervised", LORA, Options(precision="bf16")),
    "nf4": ("supervised", LORA, Options(quantization="nf4")),
    "int8 and bf16": ("dpo", LORA, Options(quantization="int8", precision="bf16")),
    "rsLoRA": ("supervised", replace(LORA, use_rslora=True), Options()),
    "some modules": ("supervised", replace(LORA, target_modules="v_proj,down_proj", dropout=0.1), Options()),
    "packing": ("supervised", LORA, Options(packing=True)),
}


@pytest.fixture(scope="module")
async def base(tmp_path_factory: pytest.TempPathFactory) -> PreparedBase:
    folder = tmp_path_factory.mktemp("proof")
    return await prepare("tiny", write_tiny_model(folder / "source"), "vicuna_v1.1", folder / "bases/tiny")


@pytest.fixture(scope="module")
async def engine(base: PreparedBase, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Engine]:
    engine = llama_engine(base, tmp_path_factory.mktemp("engine"), max_seqs=2, threads=1)
    await engine.start()
    await engine.wait_ready(60)
    yield engine
    await engine.stop()


def train(base: PreparedBase, folder: Path, method: Method, lora: Lora, options: Options) -> Path:
    """The adapter's folder; a few large steps, for an effect that stands out of the engine's rounding."""
    multiplier = 1e-2 / base_learning_rate(64, method)
    settings = Settings(method, lora, options, batch_size=2, learning_rate_multiplier=multiplier)
    run = train_in_process(folder, reference_to(base), draw_examples(method, 12), settings)
    return run.job.path / "adapter_checkpoints" / "step-6"


def reference_to(base: PreparedBase) -> BaseRef:
    assert base.gguf is not None
    return BaseRef("tiny", str(base.path), base.gguf.name, base.digest)


@pytest.mark.parametrize("name", RUNS)
async def test_what_was_trained_is_what_is_served(
    name: str, base: PreparedBase, engine: Engine, tmp_path: Path
) -> None:
    folder = train(base, tmp_path, *RUNS[name])
    facts = check_adapter(folder, base.digest)
    assert (facts.rank, facts.alpha) == (8, 16)
    report = await engine.ensure_adapter(as_adapter(folder, name))
    assert report is not None and report.warning is None
    assert report.effect > 6 * report.noise and report.error < 2 * report.noise
    assert report.scale == pytest.approx(1, abs=0.05)


async def test_examples_that_are_learnt_from_their_first_token_on_prove_as_much(
    base: PreparedBase, engine: Engine, tmp_path: Path
) -> None:
    """train_on "all", or replies so long that nothing is left of their prompts."""
    folder = train(base, tmp_path, "supervised", LORA, Options())
    model = add_lora(load_base(reference_to(base)), LORA, seed=1, start=folder)
    sequences = [replace(s, labels=s.ids) for s in draw_examples("supervised", 12).sequences(0)]
    witness = Witness(Examples.of([sequences] * 12), max_length=256).score(model)
    assert len(witness["items"]) == 6 and all(item["prompt_ids"] for item in witness["items"])
    (folder / "witness.json").write_text(json.dumps(witness))
    report = await engine.ensure_adapter(as_adapter(folder, "learnt whole"))
    assert report is not None and report.effect > 6 * report.noise


async def test_what_a_quantised_base_says_would_prove_nothing(
    base: PreparedBase, engine: Engine, tmp_path: Path
) -> None:
    """Why the witness is scored on the base as it is served: on the one that was trained on, it is refused."""
    folder = train(base, tmp_path, "supervised", LORA, Options(quantization="nf4"))
    quantised = load_base(reference_to(base), choose(Options(quantization="nf4")))
    model = add_lora(quantised, LORA, seed=1, start=folder)
    witness = Witness(draw_examples("supervised", 12), max_length=256).score(model)
    (folder / "witness.json").write_text(json.dumps(witness))
    with pytest.raises(WitnessMismatch, match="the base itself"):
        await engine.ensure_adapter(as_adapter(folder, "quantised"))


async def test_an_rslora_that_is_scaled_as_a_plain_one_is_caught(
    base: PreparedBase, engine: Engine, tmp_path: Path
) -> None:
    folder = train(base, tmp_path, "supervised", replace(LORA, use_rslora=True), Options())
    config = read_json(folder / "adapter_config.json")
    assert config["use_rslora"] is True
    layout = Layout.from_config(read_json(base.path / "config.json"))
    tensors = load_file(folder / "adapter_model.safetensors")
    write_lora_gguf(folder / "adapter.gguf", tensors, config | {"use_rslora": False}, layout)
    with pytest.raises(WitnessMismatch):
        await engine.ensure_adapter(as_adapter(folder, "plain"))
