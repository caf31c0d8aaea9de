"""The training loop beside plain TRL: the same base, ids, batch size, steps and precision, each in a process of its own.

    python -m tests.bench.trainer.against_trl JOB_DIR KIND

is that process. Plain TRL is its SFTTrainer as it comes, on the same ids and labels (its own collator, order and fused LM
head). The first epoch warms up, the second is measured: all its tokens, once each, whatever their order.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gateway.jobdir import Hyperparameters, JobDir, Lora
from tests.tiny_model import write_job
from trainer.processes.libraries import import_libraries, set_environment

DEMO_MODEL = Path(__file__).parents[3] / "deploy" / "demo_model"
KINDS = ("tunegate", "plain TRL")
BATCH_SIZE = 8


@dataclass(frozen=True)
class Figures:
    """Of one process."""

    tokens_per_s: float
    cpu_s_per_1000_tokens: float
    peak_mb: float
    first_step_at: float  # unix seconds


def prepare(out: Path) -> Path:
    """The demo model as the gateway makes it ready."""
    command = [sys.executable, "-m", "trainer.export.prepare", "--source", str(DEMO_MODEL), "--out", str(out)]
    subprocess.run([*command, "--template", "vicuna_v1.1"], check=True, capture_output=True)
    return out


def write_demo_job(folder: Path, base: Path, examples: int, threads: int) -> JobDir:
    """Two epochs over short notes of 2 to 14 words."""
    draw = random.Random(0)
    words = "milk bread call the dentist at noon kitchen hall office garden".split()
    lines = []
    for _ in range(examples):
        note = " ".join(draw.choices(words, k=draw.randint(2, 14)))
        turns = [
            {"role": "user", "content": f"Write down: {note}"},
            {"role": "assistant", "content": f'note(text="{note}")'},
        ]
        lines.append(json.dumps({"messages": turns}))
    folder.parent.mkdir(exist_ok=True)
    file = folder.parent / "train.jsonl"
    file.write_text("\n".join(lines))
    asked = Hyperparameters(2, BATCH_SIZE, 1.0)
    job = write_job(folder, base, file, hyperparameters=asked, lora=Lora(), max_length=1024)
    job.write_spec(replace(job.read_spec(), threads=threads))
    return job


def in_a_process(kind: str, job: JobDir) -> tuple[Figures, float]:
    """Its figures, and the seconds from its start to the end of its first optimizer step."""
    command = [sys.executable, "-m", "tests.bench.trainer.against_trl", str(job.path), kind]
    began = time.time()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    figures = Figures(**json.loads(done.stdout.splitlines()[-1]))
    return figures, figures.first_step_at - began


def measure(kind: str, job: JobDir) -> Figures:
    """In the process that is measured."""
    spec = job.read_spec()
    if kind == "tunegate":
        set_environment(spec.threads)
        import_libraries()
    else:
        os.environ |= {"OMP_NUM_THREADS": str(spec.threads), "HF_HUB_OFFLINE": "1"}
    import torch
    from transformers import TrainerCallback

    from trainer.check import run_check
    from trainer.data.dataset import stored_examples
    from trainer.model import add_lora, load_base

    torch.set_num_threads(spec.threads)
    check = run_check(job, spec)
    examples, _ = stored_examples(job, spec)
    model = add_lora(load_base(spec.base), spec.lora, spec.seed)
    steps = check.total_steps

    class Clock(TrainerCallback):
        """When each step ended."""

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
    first = steps // 2 - 1
    wall_s, cpu_s = clock.wall[steps - 1] - clock.wall[first], clock.cpu[steps - 1] - clock.cpu[first]
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return Figures(check.n_tokens / wall_s, 1000 * cpu_s / check.n_tokens, int(peak.split()[1]) / 1024, clock.first_at)


def our_trainer(job: JobDir, model: Any, examples: Any) -> Any:
    from trainer.events import EventLog
    from trainer.export.witness import Witness
    from trainer.loop import LoopTrainer, Run
    from trainer.methods.sft import Supervised
    from trainer.progress import Progress

    spec, check = job.read_spec(), job.read_check()
    if check is None:
        from trainer.check import run_check

        check = run_check(job, spec)
    progress = Progress(EventLog(job.events_path(1)), check, model, None, set(), Supervised())
    run = Run(job, spec, check, model, examples, None, Supervised())
    return LoopTrainer(run, Witness(examples, spec.max_length), progress)


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
            num_train_epochs=2,
            per_device_train_batch_size=BATCH_SIZE,
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
            {"input_ids": [list(s.ids) for s in sequences], "labels": [list(s.labels) for s in sequences]}
        ),
        processing_class=tokenizer,
    )


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[2], JobDir(sys.argv[1])).__dict__))
