"""The trainer beside plain TRL: the same base, ids, batch size and steps, each in a process of its own, in turns.

    python -m tests.bench.trainer [--examples 200] [--steps 40] [--rounds 3] [--threads 2]

Plain TRL is its SFTTrainer as it comes, on the same ids and labels (its own collator, order and fused LM head). Also
printed: seconds from the process's start to the end of its first optimizer step. Medians of the rounds; asserts nothing.
CPU seconds are the steadier figure on a shared machine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gateway.jobdir import Hyperparameters, JobDir, Lora
from tests.tiny_model import write_job

DEMO_MODEL = Path(__file__).parents[2] / "deploy" / "demo_model"
KINDS = ("tunegate", "plain TRL")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(measure(options.kind, JobDir(options.job), options.steps)))
        return
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(Path(folder) / "demo")
        rounds: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
        for number in range(options.rounds):
            for kind in KINDS:
                job = write_demo_job(Path(folder) / f"{number}-{kind}", prepared, options)
                rounds[kind].append(in_a_process(kind, job, options))
    table = Table(title=f"{options.steps} steps of 8 examples, {options.threads} threads, medians of {options.rounds}")
    columns = ["tokens/s", "CPU s / 1000 tokens", "ms a step", "start → first step s", "peak MB"]
    for name in ["", *columns]:
        table.add_column(name, justify="right")
    for kind, found in rounds.items():
        table.add_row(kind, *(f"{statistics.median(one[name] for one in found):.4g}" for name in columns))
    ratios = [
        statistics.median(
            one[name] / other[name] for one, other in zip(rounds[KINDS[0]], rounds[KINDS[1]], strict=True)
        )
        for name in columns
    ]
    table.add_row("ratio", *(f"{ratio:.2f}" for ratio in ratios))
    Console().print(table)


def prepare(out: Path) -> Path:
    command = [sys.executable, "-m", "trainer.export.prepare", "--source", str(DEMO_MODEL), "--out", str(out)]
    subprocess.run([*command, "--template", "vicuna_v1.1"], check=True, capture_output=True)
    return out


def write_demo_job(folder: Path, base: Path, options: argparse.Namespace) -> JobDir:
    draw = random.Random(0)
    rooms = ["kitchen", "hall", "office", "garden"]
    lines = []
    for _ in range(options.examples):
        note = " ".join(
            draw.choices(["milk", "bread", "call", "the", "dentist", "at", "noon", *rooms], k=draw.randint(2, 14))
        )
        turns = [
            {"role": "user", "content": f"Write down: {note}"},
            {"role": "assistant", "content": f'note(text="{note}")'},
        ]
        lines.append(json.dumps({"messages": turns}))
    folder.parent.mkdir(exist_ok=True)
    file = folder.parent / "train.jsonl"
    file.write_text("\n".join(lines))
    job = write_job(folder, base, file, hyperparameters=Hyperparameters(50, 8, 1.0), lora=Lora(), max_length=1024)
    job.write_spec(replace(job.read_spec(), threads=options.threads))
    return job


def in_a_process(kind: str, job: JobDir, options: argparse.Namespace) -> dict[str, float]:
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    if kind == "tunegate":
        environment |= {"OMP_WAIT_POLICY": "PASSIVE"}  # as trainer/__main__.py sets it
    command = [sys.executable, "-m", "tests.bench.trainer", "--job", str(job.path), "--kind", kind]
    began = time.time()
    done = subprocess.run(
        [*command, "--steps", str(options.steps)], env=environment, check=True, capture_output=True, text=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    found["start → first step s"] = found.pop("first_step_at") - began
    return found


def measure(kind: str, job: JobDir, steps: int) -> dict[str, float]:
    """In the process that is measured: trains `steps` steps, the first two not counted."""
    import torch
    from transformers import TrainerCallback

    from trainer.dataset import load_examples, read_bundle
    from trainer.model import add_lora, load_base

    spec = job.read_spec()
    torch.set_num_threads(spec.threads)
    examples = load_examples(job.path / spec.training_file.path, read_bundle(job), spec.max_length)
    model = add_lora(load_base(spec.base), spec.lora, spec.seed)
    mean_tokens = len(examples.ids) / len(examples)

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.wall: list[float] = []
            self.cpu: list[float] = []
            self.first_at = 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.first_at = self.first_at or time.time()
            self.wall.append(time.perf_counter())
            self.cpu.append(time.process_time())
            control.should_save = False
            control.should_training_stop = state.global_step >= steps

    clock = Clock()
    trainer = (our_trainer if kind == "tunegate" else plain_trainer)(job, model, examples)
    trainer.add_callback(clock)
    trainer.train()
    counted = len(clock.wall) - 2
    tokens = counted * 8 * mean_tokens
    wall_s, cpu_s = clock.wall[-1] - clock.wall[1], clock.cpu[-1] - clock.cpu[1]
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return {
        "tokens/s": tokens / wall_s,
        "CPU s / 1000 tokens": 1000 * cpu_s / tokens,
        "ms a step": 1000 * wall_s / counted,
        "first_step_at": clock.first_at,
        "peak MB": int(peak.split()[1]) / 1024,
    }


def our_trainer(job: JobDir, model: Any, examples: Any) -> Any:
    from trainer.check import run_check
    from trainer.events import EventLog
    from trainer.export.witness import Witness
    from trainer.loop import LoopTrainer, Run
    from trainer.progress import Progress
    from trainer.sft import Supervised

    spec = job.read_spec()
    check = run_check(job, spec)
    progress = Progress(EventLog(job.events_path(1)), check, model, None, set(), Supervised())
    run = Run(job, spec, check, model, examples, None, Supervised())
    return LoopTrainer(run, Witness(examples, model, spec.max_length), progress)


def plain_trainer(job: JobDir, model: Any, examples: Any) -> Any:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    sequences = [sequence for number in range(len(examples)) for sequence in examples.sequences(number)]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(job.template / "tokenizer.json"), eos_token="</s>", pad_token="</s>"
    )
    return SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(job.checkpoints),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            num_train_epochs=50,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            max_length=None,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=7,
        ),
        train_dataset=Dataset.from_dict(
            {"input_ids": [s.ids for s in sequences], "labels": [s.labels for s in sequences]}
        ),
        processing_class=tokenizer,
    )


if __name__ == "__main__":
    main()
