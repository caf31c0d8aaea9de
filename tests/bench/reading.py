"""A large training file checked: how fast, and in how much memory.

    python -m tests.bench.reading [--gigabytes 1] [--threads 2] [--list]

The file is made of requests to an assistant with a context of about a page, as JSON lines (--list: as one JSON list), and is
checked as a job's is: read, validated, rendered in ChatML, stored. The tokenizer is a byte-level BPE of 8000 tokens, made
from this project's own text. Printed: MB/s, tokens/s, and the peak memory of the check's process and those it starts ("own":
without them). A twentieth of the file is checked first: the last line says whether memory grew with the file (by more than
32 MiB), and the exit code is 1 then.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from gateway.chat.bundle import Bundle, make_bundle
from gateway.jobdir import JobDir
from tests.bench.trainer import prepare
from tests.tiny_model import write_job

GROWTH_LIMIT_BYTES = 32 << 20
_ROOT = Path(__file__).parents[2]
_WORDS = (_ROOT / "README.md").read_text().split()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--list", action="store_true", help="one JSON list in place of a line an example")
    options = parser.parse_args()
    table = Table(title=f"A training file checked, {options.threads} processes")
    for name in ("file MB", "examples", "tokens", "s", "MB/s", "tokens/s", "peak MB", "own MB"):
        table.add_column(name, justify="right")
    peaks = []
    with tempfile.TemporaryDirectory() as folder:
        base = prepare(Path(folder) / "demo")
        for name, content in bundle().to_files().items():
            (base / name).write_bytes(content)
        for share in (0.05, 1.0):
            size = int(options.gigabytes * share * 1e9)
            file = write_file(Path(folder) / "train.jsonl", size, options.list)
            job = write_job(Path(folder) / f"job-{share}", base, file, max_length=1024)
            job.write_spec(replace(job.read_spec(), threads=options.threads))
            file.unlink()
            took_s, peak, own = check(job)
            found = job.read_check()
            assert found is not None and found.error is None, found
            peaks.append(peak)
            figures = (size / 1e6, found.n_examples, found.n_tokens, took_s, size / 1e6 / took_s)
            table.add_row(
                *(f"{figure:,.5g}" if figure < 1e5 else f"{figure:,.0f}" for figure in figures),
                f"{found.n_tokens / took_s:,.0f}",
                f"{peak / 1e6:.0f}",
                f"{own / 1e6:.0f}",
            )
            subprocess.run(["rm", "-r", str(job.path)], check=True)
    Console().print(table)
    grew = peaks[1] - peaks[0]
    print(f"Memory {'grew with the file' if grew > GROWTH_LIMIT_BYTES else 'is constant'}: {grew / 1e6:+.0f} MB")
    return int(grew > GROWTH_LIMIT_BYTES)


def bundle() -> Bundle:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = [path.read_text() for path in (_ROOT / "gateway").rglob("*.py")]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trained = trainers.BpeTrainer(
        vocab_size=8000,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(words, trained)
    return make_bundle("qwen-7b-chat", tokenizer.to_str().encode(), [0, 2])


def write_file(path: Path, size_bytes: int, as_list: bool = False) -> Path:
    """Examples until the file has that size."""
    draw = random.Random(0)
    written = 0
    with path.open("w") as file:
        file.write("[\n" if as_list else "")
        while written < size_bytes:
            context, reply = (" ".join(draw.choices(_WORDS, k=draw.randint(*of))) for of in ((20, 300), (5, 60)))
            turns = [{"role": "user", "content": context}, {"role": "assistant", "content": reply}]
            comma = ",\n" if as_list and written else ""
            written += file.write(comma + json.dumps({"messages": turns}) + ("" if as_list else "\n"))
        file.write("\n]\n" if as_list else "")
    return path


def check(job: JobDir) -> tuple[float, int, int]:
    """Seconds, the highest sum of all processes' memory, and that of the check's own; bytes."""
    began = time.monotonic()
    with (job.path / "trainer.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "trainer", str(job.path), "--check"], stderr=log)
        highest = [0, 0]
        watch = threading.Thread(target=_watch, args=(process, highest))
        watch.start()
        code = process.wait()
        watch.join()
    assert code == 0, (job.path / "trainer.log").read_text()
    return time.monotonic() - began, highest[0], highest[1]


def _watch(process: subprocess.Popen[bytes], highest: list[int]) -> None:
    while process.poll() is None:
        own = _resident_bytes(process.pid)
        total = own + sum(_resident_bytes(pid) for pid in _children(process.pid))
        highest[:] = max(highest[0], total), max(highest[1], own)
        time.sleep(0.05)


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _resident_bytes(pid: int) -> int:
    """Resident memory; what is shared between the processes counts in each."""
    try:
        line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    except (OSError, StopIteration):
        return 0
    return int(line.split()[1]) << 10


if __name__ == "__main__":
    sys.exit(main())
