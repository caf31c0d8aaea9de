"""How far a right adapter is from its witness, and how far wrong ones are: what the tolerances are set by.

    python -m tests.bench.witness_margins [--model FOLDER] [--template NAME] [--examples N] [--epochs N] [--threads N]

Prepares the model, trains an adapter with the real trainer, serves it on the real worker, then spoils `adapter.gguf` and
the base on purpose. Prints a table; asserts nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

from gateway.bases import PreparedBase, prepare
from gateway.engines.adapters import Adapter, check_adapter, file_digest
from gateway.engines.engine import RECHECK_ITEMS
from gateway.engines.kinds import llama_engine
from gateway.engines.witness import Tolerances, WitnessMismatch, verify
from gateway.jobdir import Hyperparameters, Lora, read_json
from tests.engines.parts import ANYTHING_GOES, as_adapter, control_of
from tests.tiny_model import write_examples, write_job
from trainer.export.lora_gguf import write_lora_gguf
from trainer.export.tensors import Layout

Tensors = dict[str, npt.NDArray[np.float32]]


class Unpermuted(Layout):
    """A Llama whose q and k rows stay as transformers has them: the mistake to be caught."""

    def to_gguf_rows(self, gguf_name: str, tensor: Any) -> Any:
        return tensor


def scaled(factor: float) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda config: config | {"lora_alpha": config["lora_alpha"] * factor}


async def main(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        base = await prepare("demo", options.model, options.template, folder / "bases/demo")
        trained = train(base, folder, options)
        facts = check_adapter(trained, base.digest)
        print(f"adapter: rank {facts.rank}, alpha {facts.alpha:g}, {facts.modules} modules, {facts.size_bytes} bytes\n")
        right = as_adapter(trained, "demo")
        right = Adapter(right.engine_name, right.path, "demo", right.digest)
        print(
            f"{'what is served':38} {'effect':>7} {'error':>6} {'of it':>7} {'scale':>6} {'noise':>6} {'2 items':>8}  verdict"
        )
        await measure(base, folder, [("as it was trained", right), *spoiled(right, base, folder)], options)
        for name, other in other_bases(base, folder):
            await measure(other, folder, [(name, right)], options)


def train(base: PreparedBase, folder: Path, options: argparse.Namespace) -> Path:
    examples = write_examples(folder / "train.jsonl", options.examples)
    job = write_job(
        folder / "job",
        base.path,
        examples,
        threads=options.threads,
        hyperparameters=Hyperparameters(n_epochs=options.epochs),
        lora=Lora(),
    )
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "trainer", str(job.path)], check=True, stdout=sys.stderr)
    print(f"trained for {time.monotonic() - began:.1f} s")
    return job.adapter


def spoiled(right: Adapter, base: PreparedBase, folder: Path) -> list[tuple[str, Adapter]]:
    tensors: Tensors = load_file(right.path / "adapter_model.safetensors")
    config = read_json(right.path / "adapter_config.json")
    base_config = read_json(base.path / "config.json")
    llama = Layout.from_config(base_config)
    rank = int(config["r"])
    noise = np.random.default_rng(0)
    return [
        _variant(right, folder, name, changed, change(config), rows)
        for name, changed, change, rows in (
            ("alpha x 2", tensors, scaled(2.0), llama),
            ("alpha x 1.25", tensors, scaled(1.25), llama),
            ("alpha / 2", tensors, scaled(0.5), llama),
            ("alpha as if rsLoRA (x sqrt r)", tensors, scaled(math.sqrt(rank)), llama),
            ("alpha not written (scale 1)", tensors, scaled(rank / config["lora_alpha"]), llama),
            ("q and k not permuted", tensors, scaled(1.0), Unpermuted.from_config(base_config)),
            ("first layer lost", _without(tensors, ".layers.0."), scaled(1.0), llama),
            ("q and k lost", _without(tensors, ".q_proj.", ".k_proj."), scaled(1.0), llama),
            ("B with 2 % of noise", _noisy(tensors, 0.02, noise), scaled(1.0), llama),
            ("B with 20 % of noise", _noisy(tensors, 0.2, noise), scaled(1.0), llama),
            ("another adapter of that size", _shuffled(tensors, noise), scaled(1.0), llama),
        )
    ]


def other_bases(base: PreparedBase, folder: Path) -> list[tuple[str, PreparedBase]]:
    f16 = base.path / "model.f16.gguf"
    return [("on the base in f16, not its q4_0", replace(base, gguf=f16, digest=file_digest(f16)))]


async def measure(
    base: PreparedBase, folder: Path, adapters: list[tuple[str, Adapter]], options: argparse.Namespace
) -> None:
    engine = llama_engine(base, folder / "engine", max_seqs=2, threads=options.threads, tolerances=ANYTHING_GOES)
    await engine.start()
    try:
        await engine.wait_ready(300)
        for name, adapter in adapters:
            began = time.monotonic()
            report = await engine.ensure_adapter(adapter)
            took_s = time.monotonic() - began
            assert report is not None
            async with control_of(engine.endpoint) as control:
                part = await verify(control, adapter, ANYTHING_GOES, RECHECK_ITEMS)
                verdict = await _verdict(control, adapter)
            print(
                f"{name:38} {report.effect:7.3f} {report.error:6.3f} {report.error / report.effect:7.1%} "
                f"{report.scale or 0:6.2f} {report.noise:6.3f} {part.error / part.effect:8.1%}  {verdict} "
                f"({took_s * 1e3:.0f} ms)"
            )
    finally:
        await engine.stop()


async def _verdict(control: Any, adapter: Adapter) -> str:
    try:
        await verify(control, adapter, Tolerances())
    except WitnessMismatch:
        return "refused"
    return "served"


def _variant(right: Adapter, folder: Path, name: str, tensors: Tensors, config: dict[str, Any], rows: Any) -> Any:
    path = folder / "variants" / name.replace("/", "over")
    shutil.copytree(right.path, path)
    write_lora_gguf(path / "adapter.gguf", tensors, config, rows)
    return name, replace(right, engine_name=f"demo@{name}", path=path)


def _without(tensors: Tensors, *parts: str) -> Tensors:
    lost = [name for name in tensors if any(part in name for part in parts)]
    return tensors | {name: np.zeros_like(tensors[name]) for name in lost}


def _noisy(tensors: Tensors, share: float, noise: np.random.Generator) -> Tensors:
    return {
        name: (value + share * np.sqrt(np.mean(value**2)) * noise.standard_normal(value.shape)).astype(np.float32)
        if "lora_B" in name
        else value
        for name, value in tensors.items()
    }


def _shuffled(tensors: Tensors, noise: np.random.Generator) -> Tensors:
    return {name: noise.permutation(value) if "lora_B" in name else value for name, value in tensors.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(__file__).parents[2] / "deploy/demo_model")
    parser.add_argument("--template", default="vicuna_v1.1")
    parser.add_argument("--examples", type=int, default=120)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    asyncio.run(main(parser.parse_args()))
