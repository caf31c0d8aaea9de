"""Which mode of llama.cpp works on this CPU, found out in a child process that may crash.

llama.cpp picks its kernels by the CPU it finds, and some of them crash: with AMX, decoding two tokens or more of a
q4_0 model. Its rule: the worker decodes nothing in its own process that a child has not decoded before it. `prove` runs
in the worker, the rest (`python -m gateway.llama_worker.proof MODEL MODE THREADS`) in the child.
"""

from __future__ import annotations

import ctypes
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

TIMEOUT_S = 600.0  # a large model read from a cold disk
CRASH_VARIABLE = "TUNEGATE_TEST_PROOF_CRASH"  # tests: the child aborts in the modes named here, comma-separated
PROMPT_TOKENS = 33
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Mode:
    """A way to run llama.cpp."""

    name: str
    use_extra_bufts: bool  # weights repacked for this CPU's wide instructions: faster, and where AMX crashes


# In the order of preference.
MODES = (Mode("default", use_extra_bufts=True), Mode("no-extra-buffers", use_extra_bufts=False))


class NoWorkingMode(RuntimeError):
    """llama.cpp cannot decode this model here in any mode."""


def prove(model_path: Path, threads: int) -> Mode:
    """The first mode in which a child decodes the model; NoWorkingMode with what each did."""
    outcomes = []
    for mode in MODES:
        started = time.monotonic()
        outcome = _try(model_path, mode, threads)
        if outcome is None:
            log.info("llama.cpp proved itself in mode %s in %.2f s", mode.name, time.monotonic() - started)
            return mode
        log.warning("llama.cpp failed in mode %s: %s", mode.name, outcome)
        outcomes.append(f"mode {mode.name}: {outcome}")
    raise NoWorkingMode(
        f"llama.cpp cannot decode {model_path} on this machine ({'; '.join(outcomes)}). If the file is sound, rebuild "
        "llama-cpp-python for this CPU: CMAKE_ARGS='-DGGML_NATIVE=OFF' pip install --force-reinstall --no-cache-dir "
        "--no-binary llama-cpp-python llama-cpp-python"
    )


def _try(model_path: Path, mode: Mode, threads: int) -> str | None:
    """None when the child decoded, else what happened to it, in words."""
    command = [sys.executable, "-m", __spec__.name, str(model_path), mode.name, str(threads)]
    try:
        child = subprocess.run(command, capture_output=True, timeout=TIMEOUT_S, stdin=subprocess.DEVNULL, check=False)
    except subprocess.TimeoutExpired:
        return f"no answer within {TIMEOUT_S:.0f} s"
    if child.returncode == 0:
        return None
    if child.returncode < 0:
        return f"it was killed by {signal.Signals(-child.returncode).name}"
    last_lines = child.stderr.decode(errors="replace").strip().splitlines()[-1:]
    return f"exit code {child.returncode}: {' '.join(last_lines)}"


def _decode(model_path: Path, mode: Mode, threads: int) -> None:
    """Decodes a prompt, a token and two sequences at once; raises, or takes the process down, if that does not work."""
    import numpy as np

    from gateway.llama_worker.native import Context, ContextSize, Model, NativeError, NativeLog

    model = Model(model_path, NativeLog(), mode.use_extra_bufts)
    context = Context(model, ContextSize(context=PROMPT_TOKENS + 2, sequences=2, batch=PROMPT_TOKENS), threads)
    ids = [position % model.vocab_size for position in range(PROMPT_TOKENS)]
    batches: list[tuple[list[int], list[int], list[int]]] = [
        (ids, list(range(PROMPT_TOKENS)), [0] * PROMPT_TOKENS),
        ([1], [PROMPT_TOKENS], [0]),
        ([1, 1], [PROMPT_TOKENS + 1, 0], [0, 1]),
    ]
    for batch_ids, positions, sequences in batches:
        logits = context.decode(batch_ids, positions, sequences, [True] * len(batch_ids))
        if not np.isfinite(logits).all():
            raise NativeError("the logits are not finite numbers")
    context.close()
    model.close()


def main(arguments: list[str]) -> int:
    """The child: exit code 0 when the mode works."""
    model_path, mode_name, threads = arguments
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # never outlives the worker
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if mode_name in os.environ.get(CRASH_VARIABLE, "").split(","):
        os.abort()
    _decode(Path(model_path), next(mode for mode in MODES if mode.name == mode_name), int(threads))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
