"""What `check.sh` runs once everything is installed: each step of the loop on a real vLLM, and how long it took."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from openai import OpenAI

ROOT = Path(__file__).resolve().parent.parent.parent
TOKENIZER = ROOT / "deploy" / "demo_model"
PORT = 8123
# Hidden size, layers, heads, intermediate size: some 900 million parameters, or 7 million.
LARGE, SMALL = (2048, 16, 32, 5632), (256, 6, 4, 704)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="a small model, and no options that only a GPU has")
    options = parser.parse_args()
    python = os.environ["TUNEGATE_VLLM"]
    with tempfile.TemporaryDirectory(prefix="tunegate-check-") as text:
        folder = Path(text)
        with timed("the model is made"):
            make_model(folder / "model", SMALL if options.cpu else LARGE)
        args = (
            ["--max-model-len", "1024"] if options.cpu else ["--enable-sleep-mode", "--gpu-memory-utilization", "0.5"]
        )
        (folder / "tunegate.toml").write_text(
            f'[bases.made]\npath = "{folder / "model"}"\ntemplate = "vicuna_v1.1"\n'
            f'[[engines]]\nkind = "vllm"\nmodel = "made"\npython = "{python}"\nargs = {json.dumps(args)}\n'
            f'[jobs]\nshare = "{"beside" if options.cpu else "sleep"}"\n'
        )
        with serving(folder):
            return run_loop(folder)


def make_model(folder: Path, size: tuple[int, int, int, int]) -> None:
    """A Llama of random weights in bfloat16, with the demo model's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, layers, heads, intermediate = size
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=intermediate,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)


@contextmanager
def serving(folder: Path) -> Iterator[None]:
    """The gateway, and with it vLLM, until the block ends."""
    command = [sys.executable, "-m", "gateway", "serve", "--port", str(PORT), "--data", str(folder / "data")]
    command += ["--config", str(folder / "tunegate.toml")]
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    try:
        with timed("vLLM is ready"):
            until(lambda: server.poll() is not None or is_ready(), 1200)
        if server.poll() is not None:
            sys.exit(f"the server ended:\n{(folder / 'server.log').read_text()[-4000:]}")
        yield
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


def run_loop(folder: Path) -> int:
    """Upload, job, chat; the exit code."""
    client = OpenAI(base_url=f"http://127.0.0.1:{PORT}/v1", api_key="unused", max_retries=0)
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"What is number {n}?"},
                {"role": "assistant", "content": "It is fine."},
            ]
        }
        for n in range(40)
    ]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    file = client.files.create(file=("train.jsonl", content), purpose="fine-tune")
    with timed("base: 64 tokens"):
        say(client, "made", 64)
    supervised = {"hyperparameters": {"n_epochs": 4, "batch_size": 8}}
    with timed("job: trained, loaded, verified"):
        job = client.fine_tuning.jobs.create(
            model="made", training_file=file.id, method={"type": "supervised", "supervised": supervised}
        )
        until(lambda: client.fine_tuning.jobs.retrieve(job.id).status in ("succeeded", "failed", "cancelled"), 1800)
    ended = client.fine_tuning.jobs.retrieve(job.id)
    for event in reversed(client.fine_tuning.jobs.list_events(job.id, limit=100).data):
        if event.type == "message":
            print(f"    {event.message}")
    if ended.status != "succeeded" or ended.fine_tuned_model is None:
        print((folder / "server.log").read_text()[-4000:], file=sys.stderr)
        return 1
    with timed("tuned: the first reply"):
        print(f"    {say(client, ended.fine_tuned_model, 16)!r}")
    with timed("tuned: 64 tokens"):
        say(client, ended.fine_tuned_model, 64)
    return 0


def say(client: OpenAI, model: str, max_tokens: int) -> str:
    reply = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "What is number 7?"}],
        temperature=0,
        max_tokens=max_tokens,
        extra_body={"ignore_eos": max_tokens > 16},
    )
    return reply.choices[0].message.content or ""


def is_ready() -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{PORT}/readyz", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def until(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            sys.exit(f"not within {timeout_s:g} s")
        time.sleep(0.2)


@contextmanager
def timed(what: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    print(f"{time.monotonic() - began:8.2f} s  {what}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
