"""Rendering on several processes: the same, in the same order; and nobody is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import cycle
from pathlib import Path

import pytest

from gateway.chat.bundle import Bundle, make_bundle
from gateway.chat.registry import template_named
from gateway.jobdir import process_start_time
from tests.tiny_tokenizers import byte_level
from trainer.data.forms import FORMS
from trainer.data.lines import BadLine, Raw
from trainer.data.rendering import Renderer, Rendering
from trainer.data.survey import render_chunk
from trainer.data.workers import render_in_parallel

ENDLESS = """
import sys
from itertools import repeat
from tests.trainer.test_workers import chunk_of, rendering_of
from trainer.data.forms import FORMS
from trainer.data.workers import render_in_parallel
for _ in render_in_parallel(rendering_of(), FORMS[-1], repeat(chunk_of(0)), 2):
    print("one", flush=True)
"""


def rendering_of() -> Rendering:
    assert template_named("vicuna_v1.1")
    return Rendering(make_bundle("vicuna_v1.1", byte_level(), [0]), 1000)


def chunk_of(number: int) -> list[Raw | BadLine]:
    turns = [{"role": "user", "content": f"Say {number}."}, {"role": "assistant", "content": f"{number} it is."}]
    return [
        Raw(1 + 2 * number, json.dumps({"messages": turns}).encode()),
        Raw(2 + 2 * number, b"{" if number == 7 else b"[]"),
    ]


def test_chunks_come_back_in_order_as_one_process_renders_them() -> None:
    rendering, chunks = rendering_of(), [chunk_of(number) for number in range(9)]
    renderer = Renderer(rendering, FORMS[-1])
    alone = [render_chunk(renderer, chunk) for chunk in chunks]
    shared = list(render_in_parallel(rendering, FORMS[-1], chunks, 2))
    for (survey, examples), (expected, same) in zip(shared, alone, strict=True):
        assert survey == expected and survey.n_problems == 1
        assert (examples.ids.tolist(), len(examples)) == (same.ids.tolist(), len(same))


def test_a_check_that_is_killed_leaves_no_worker() -> None:
    root = Path(__file__).parents[2]
    process = subprocess.Popen([sys.executable, "-c", ENDLESS], stdout=subprocess.PIPE, cwd=root)
    assert process.stdout is not None and process.stdout.readline()
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 20
    while any(process_start_time(pid) is not None for pid in children):
        assert time.monotonic() < deadline, "a worker works on for nobody"
        time.sleep(0.05)


def test_a_worker_that_dies_is_told() -> None:
    rendering = rendering_of()
    found = render_in_parallel(rendering, FORMS[-1], cycle([chunk_of(0)]), 1)
    next(found)
    me = os.getpid()
    (worker,) = (
        int(pid)
        for pid in Path(f"/proc/{me}/task/{me}/children").read_text().split()
        if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(ChildProcessError, match="too little memory"):
        for _ in found:
            pass


def test_a_bundle_can_be_made_again_from_what_a_worker_is_sent() -> None:
    bundle = rendering_of().bundle
    assert Bundle.from_files(bundle.to_files()).digest == bundle.digest
