"""The worker as a process: how it starts, proves itself, says that it is ready, and ends."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from gateway.llama_worker.__main__ import default_context, default_threads
from tests.llama_worker.running import RunningWorker, request, running


def test_the_ready_file_tells_who_serves_where(tiny_model: Path, tmp_path: Path) -> None:
    with running(tmp_path, tiny_model, "--max-seqs", "3", "--ctx", "256", "--threads", "1") as worker:
        ready = worker.ready()
        assert ready["pid"] == worker.process.pid
        text = Path(f"/proc/{worker.process.pid}/stat").read_text()
        assert ready["start_time"] == int(text.rsplit(")", 1)[1].split()[19])
        assert httpx.get(f"http://127.0.0.1:{ready['port']}/health").status_code == 200
        version = worker.client.get("/version").json()
        assert version["kind"] == "llama"
        assert version["base_digest"] == "sha256:" + hashlib.sha256(tiny_model.read_bytes()).hexdigest()
        assert (version["max_model_len"], version["max_num_seqs"]) == (256, 3)
        assert version["mode"] == {"name": "default", "use_extra_bufts": True, "threads": 1, "fastest": False}
        assert version["llama_cpp"]
        assert ready["version"] == version["version"]
        assert len(worker.complete(n=3)["choices"]) == 3
        assert not list(tmp_path.glob(".ready*"))


def test_a_mode_that_crashes_is_passed_over(tiny_model: Path, tmp_path: Path) -> None:
    with running(tmp_path, tiny_model, environment={"TUNEGATE_TEST_PROOF_CRASH": "default"}) as worker:
        assert worker.client.get("/version").json()["mode"]["name"] == "no-extra-buffers"
        assert "mode default: it was killed by SIGABRT" in worker.log_file.read_text()
        assert len(worker.ids()) == 6


def test_no_working_mode_ends_with_advice(tiny_model: Path, tmp_path: Path) -> None:
    both = {"TUNEGATE_TEST_PROOF_CRASH": "default,no-extra-buffers"}
    worker = RunningWorker(tmp_path, tiny_model, environment=both)
    assert worker.process.wait(30) == 1
    worker.close()
    assert "CMAKE_ARGS" in worker.log_file.read_text()
    assert not worker.ready_file.exists()


@pytest.mark.parametrize("content", [b"", b"no model", None])
def test_a_file_that_is_no_model_ends_with_its_name(tmp_path: Path, content: bytes | None) -> None:
    model = tmp_path / "model.gguf"
    if content is not None:
        model.write_bytes(content)
    worker = RunningWorker(tmp_path / "worker", model)
    assert worker.process.wait(30) == 1
    worker.close()
    assert str(model) in worker.log_file.read_text()
    assert not worker.ready_file.exists()


def test_an_address_that_others_can_reach_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    worker = RunningWorker(tmp_path, tiny_model, "--host", "0.0.0.0")
    assert worker.process.wait(30) == 2
    worker.close()
    assert "not a loopback address" in worker.log_file.read_text()


def test_a_taken_port_ends_the_start(tiny_model: Path, tmp_path: Path, worker: RunningWorker) -> None:
    second = RunningWorker(tmp_path, tiny_model, "--port", str(worker.ready()["port"]))
    assert second.process.wait(30) == 1
    second.close()
    assert "Address already in use" in second.log_file.read_text()


def test_sigterm_lets_what_runs_finish(slow_model: Path, tmp_path: Path) -> None:
    with running(tmp_path, slow_model) as worker, ThreadPoolExecutor(1) as pool:
        reply = pool.submit(worker.ids, max_tokens=60, ignore_eos=True)
        worker.wait_metric("prompt_tokens_total", 4, timeout_s=10)
        worker.process.send_signal(signal.SIGTERM)
        assert len(reply.result()) == 60
        assert worker.process.wait(10) == 0


def test_sigterm_refuses_what_is_new_and_ends_what_outlasts_the_grace(slow_model: Path, tmp_path: Path) -> None:
    with running(tmp_path, slow_model) as worker:
        body = request(prompt=[1, 2, 3], max_tokens=4000, ignore_eos=True, stream=True)
        with worker.client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            worker.process.terminate()  # the reply would take much longer than the grace of 5 s
            deadline = time.monotonic() + 4
            while (refused := worker.post()).status_code == 200:
                assert time.monotonic() < deadline
            assert refused.status_code == 503
            assert "retry-after" in refused.headers
            assert worker.client.get("/health").status_code == 503
            payloads = [line.removeprefix("data: ") for line in lines if line]
        assert "shutting down" in json.loads(payloads[-1])["error"]["message"]  # and no [DONE]
        assert worker.process.wait(10) == 0


def test_an_idle_worker_ends_at_once(tiny_model: Path, tmp_path: Path) -> None:
    with running(tmp_path, tiny_model) as worker:
        worker.ids()
        started = time.monotonic()
        worker.process.terminate()
        assert worker.process.wait(10) == 0
        assert time.monotonic() - started < 3


def test_a_kill_leaves_no_process_behind(slow_model: Path, tmp_path: Path) -> None:
    with running(tmp_path, slow_model) as worker:
        body = request(prompt=[1, 2, 3], max_tokens=4000, ignore_eos=True, stream=True)
        with worker.client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            assert psutil.Process(worker.process.pid).children(recursive=True) == []
            worker.process.kill()
            with pytest.raises(httpx.TransportError):
                list(lines)
        assert worker.process.wait(5) == -signal.SIGKILL
    marker = str(worker.ready_file)
    assert [other for other in psutil.process_iter(["cmdline"]) if marker in (other.info["cmdline"] or [])] == []


def test_a_kill_during_the_proof_takes_the_child_along(slow_model: Path, tmp_path: Path) -> None:
    worker = RunningWorker(tmp_path, slow_model)
    parent = psutil.Process(worker.process.pid)
    deadline = time.monotonic() + 10
    while not (children := parent.children()):
        assert time.monotonic() < deadline
        assert worker.process.poll() is None
    worker.process.kill()
    worker.process.wait()
    worker.close()
    deadline = time.monotonic() + 3
    while any(_runs(child) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_empty_key_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    key_file = tmp_path / "empty"
    key_file.write_text("\n")
    worker = RunningWorker(tmp_path, tiny_model, "--key-file", str(key_file))
    assert worker.process.wait(30) == 1
    worker.close()
    assert "is empty" in worker.log_file.read_text()


def test_the_context_is_halved_until_all_sequences_fit() -> None:
    assert default_context(2048, 6 * 2**10, sequences=8) == 2048
    assert default_context(131_072, 32 * 2**10, sequences=8) == 8192
    assert default_context(131_072, 2**30, sequences=8) == 512


def test_a_small_model_gets_no_more_threads_than_it_has_work_for() -> None:
    assert [default_threads(size * 2**20, cores=4) for size in (4, 40, 4000)] == [1, 2, 4]


def test_importing_the_package_loads_no_llama_cpp() -> None:
    code = "import sys, gateway.llama_worker; sys.exit('llama_cpp' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, check=False).returncode == 0


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)  # dead already, where nobody has collected it
    except psutil.NoSuchProcess:
        return False
