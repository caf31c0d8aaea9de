"""How much memory a job will take at its peak, told before it starts; and how much the machine has.

Place in the flow: check. Pure but for reading the base's config.json and the kernel's files. Imports no torch, so it counts
by hand what torch will hold: it is an estimate, meant to be a little high.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway.jobdir import BaseRef, JobSpec
from trainer.export.tensors import text_config

TOKENS_A_PASS = 16_384  # that may go through the model at once; a larger batch comes in passes
_PROCESS_BYTES = 700 << 20  # torch, transformers, trl and peft, imported
_GPU_PROCESS_BYTES = 800 << 20  # the CUDA context and its libraries' workspaces
_ADAPTER_BYTES = 16  # a trained parameter: itself, its gradient and Adam's two, in float32
_WEIGHT_BYTES = {"none": 0.0, "nf4": 0.56, "int8": 1.05}  # of a linear layer; none: that of the precision
_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Shape:
    """What of a model's config.json its memory follows from. All are sizes but `n_layers` and `n_params`."""

    hidden: int
    inner: int
    attention: int  # of all query heads
    keys: int  # of all key heads
    n_layers: int
    vocabulary: int
    n_params: int

    @classmethod
    def from_config(cls, raw: dict[str, Any]) -> Shape:
        config = text_config(raw)
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        head = int(config.get("head_dim") or hidden // heads)
        keys = head * int(config.get("num_key_value_heads") or heads)
        inner, layers = int(config["intermediate_size"]), int(config["num_hidden_layers"])
        vocabulary = int(config["vocab_size"])
        shape = cls(hidden, inner, head * heads, keys, layers, vocabulary, 0)
        tables = 1 if config.get("tie_word_embeddings") else 2
        linear = layers * sum(rows * columns for rows, columns in shape.linear().values())
        return cls(hidden, inner, head * heads, keys, layers, vocabulary, linear + tables * vocabulary * hidden)

    def linear(self) -> dict[str, tuple[int, int]]:
        """(in, out) of each linear layer of a block."""
        ways = (
            (self.hidden, self.attention),
            (self.hidden, self.keys),
            (self.hidden, self.keys),
            (self.attention, self.hidden),
            (self.hidden, self.inner),
            (self.hidden, self.inner),
            (self.inner, self.hidden),
        )
        return dict(zip(_LINEAR, ways, strict=True))


def read_shape(base: BaseRef) -> Shape | None:
    """None for a base whose config.json is of no kind that is known here."""
    folder = Path(base.path) / base.hf if base.hf else Path(base.path)
    try:
        return Shape.from_config(json.loads((folder / "config.json").read_bytes()))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def memory_bytes(shape: Shape, spec: JobSpec, batch_size: int, longest: int, trained_share: float, on_gpu: bool) -> int:
    """Of the trainer at its peak: on the GPU where there is one, else in the machine's memory.

    `longest` is the tokens of the longest conversation, both sequences of a preference pair together; `trained_share` is
    how many of all tokens are learnt, since only those have logits.
    """
    half = spec.options.precision in ("bf16", "fp16") or (spec.options.precision == "auto" and on_gpu)
    number = 2 if half else 4
    tokens = max(longest, min(batch_size * longest, TOKENS_A_PASS))
    return int(
        (_GPU_PROCESS_BYTES if on_gpu else _PROCESS_BYTES)
        + _weights(shape, spec, number)
        + _ADAPTER_BYTES * _trained_parameters(shape, spec)
        + tokens * (shape.n_layers * _activations(shape) * number + min(1.0, 2 * trained_share) * _head(shape))
    )


def machine_bytes() -> tuple[int, bool]:
    """(memory of the GPU, True), or (the machine's, or what its control group may have, False)."""
    if (gpu := _gpu_bytes()) is not None:
        return gpu, True
    total = next(
        int(line.split()[1]) << 10 for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line
    )
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        return min(total, int(limit)) if limit.isdigit() else total, False
    except OSError:
        return total, False


def _weights(shape: Shape, spec: JobSpec, number: int) -> float:
    linear = shape.n_layers * sum(rows * columns for rows, columns in shape.linear().values())
    quantised = _WEIGHT_BYTES[spec.options.quantization] or number
    return linear * quantised + (shape.n_params - linear) * number


def _trained_parameters(shape: Shape, spec: JobSpec) -> int:
    names = spec.lora.target_modules
    asked = _LINEAR if names == "all-linear" else tuple(name.strip() for name in names.split(","))
    layers = (ways for name, ways in shape.linear().items() if name in asked)
    return shape.n_layers * spec.lora.rank * sum(rows + columns for rows, columns in layers)


def _activations(shape: Shape) -> int:
    """Numbers that a token leaves in a block for the way back."""
    return 8 * shape.hidden + 3 * shape.attention + 3 * shape.keys + 5 * shape.inner


def _head(shape: Shape) -> int:
    """Bytes of a trained token's logits: themselves, their exponentials and their gradient, in float32."""
    return 3 * 4 * shape.vocabulary


def _gpu_bytes() -> int | None:
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    try:
        done = subprocess.run(
            [command, "--query-gpu=memory.total", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=10,
        )
        return int(done.stdout.splitlines()[0]) << 20 if done.returncode == 0 else None
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError):
        return None
