"""Adapters that come and go while the worker runs, and files that it must refuse."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from gateway.llama_worker.native import Context, ContextSize, Model, NativeLog
from gateway.llama_worker.scoring import score_rows
from tests.llama_worker.conftest import SLOW
from tests.llama_worker.running import RunningWorker, prompt, running
from tests.tiny_gguf import Shape, write_tiny_gguf, write_tiny_lora


def test_an_adapter_is_listed_with_its_parent_while_it_is_loaded(
    worker: RunningWorker, adapter_folders: dict[str, Path]
) -> None:
    assert worker.load("guest", adapter_folders["red"]).text.startswith("Success")
    listed = {entry["id"]: entry for entry in worker.client.get("/v1/models").json()["data"]}
    assert listed["guest"]["parent"] == "base"
    assert listed["guest"]["root"] == str(adapter_folders["red"])
    assert listed["base"]["parent"] is None
    assert listed["base"]["max_model_len"] == 512
    assert worker.ids(model="guest") == worker.ids(model="red") != worker.ids()
    assert worker.unload("guest").status_code == 200
    assert worker.post(model="guest").status_code == 404
    assert "guest" not in worker.client.get("/v1/models").text


@pytest.mark.parametrize("name", ["red", "base"])
def test_a_name_in_use_is_refused(worker: RunningWorker, adapter_folders: dict[str, Path], name: str) -> None:
    response = worker.load(name, adapter_folders["blue"])
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "lora_name"


def test_an_unknown_name_cannot_be_unloaded(worker: RunningWorker) -> None:
    assert worker.unload("nobody").status_code == 404
    assert worker.unload("base").status_code == 404


@pytest.mark.parametrize("path", [None, "", "relative/folder", 5, "/a\0b"])
def test_a_path_that_is_not_absolute_is_refused(worker: RunningWorker, path: object) -> None:
    response = worker.client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": path})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "lora_path"


def test_a_missing_file_is_not_found(worker: RunningWorker, tmp_path: Path) -> None:
    assert worker.load("x", tmp_path).status_code == 404
    assert worker.load("x", tmp_path / "nowhere").status_code == 404


def test_files_that_llama_cpp_refuses_hurt_nobody(
    worker: RunningWorker, adapter_folders: dict[str, Path], tiny_model: Path, tmp_path: Path
) -> None:
    good = (adapter_folders["red"] / "adapter.gguf").read_bytes()
    before = worker.ids(max_tokens=40)
    bad = {
        "empty": b"",
        "text": b"not a GGUF file at all",
        "truncated header": good[:100],
        "truncated data": good[: len(good) * 3 // 4],
        "a model": tiny_model.read_bytes(),
    }
    for name, content in bad.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "adapter.gguf").write_bytes(content)
        response = worker.load("x", folder)
        assert response.status_code == 400, name
        assert response.json()["error"]["param"] == "lora_path"
    write_tiny_lora(tmp_path / "wrong shape" / "adapter.gguf", Shape(hidden=128))
    assert worker.load("x", tmp_path / "wrong shape").status_code == 400
    write_tiny_lora(tmp_path / "more layers" / "adapter.gguf", Shape(layers=3))
    assert worker.load("x", tmp_path / "more layers").status_code == 400
    assert worker.ids(max_tokens=40) == before
    assert worker.post(model="x").status_code == 404


def test_an_adapter_that_makes_no_numbers_fails_its_own_requests_only(worker: RunningWorker, tmp_path: Path) -> None:
    write_tiny_lora(tmp_path / "adapter.gguf", strength=float("nan"))
    assert worker.load("broken", tmp_path).status_code == 200
    good = {"max_tokens": 300, "ignore_eos": True}
    alone = worker.ids(**good)
    with ThreadPoolExecutor(2) as pool:
        running_reply = pool.submit(worker.ids, **good)
        failed = worker.post(model="broken")
    assert failed.status_code == 500
    assert "not finite" in failed.json()["error"]["message"]
    assert running_reply.result() == alone
    assert worker.unload("broken").status_code == 200


def test_unload_waits_for_the_requests_that_run_and_refuses_new_ones(
    slow_worker: RunningWorker, tmp_path: Path
) -> None:
    write_tiny_lora(tmp_path / "adapter.gguf", SLOW, strength=0.1)
    assert slow_worker.load("guest", tmp_path).status_code == 200
    fields = {"model": "guest", "max_tokens": 400, "ignore_eos": True}
    alone = slow_worker.ids(**fields)
    with ThreadPoolExecutor(2) as pool:
        reply = pool.submit(slow_worker.ids, **fields)
        slow_worker.wait_metric("sequences_running", 1, timeout_s=10)
        gone = pool.submit(slow_worker.unload, "guest")
        slow_worker.wait_metric("adapters", 0, timeout_s=10)
        assert not gone.done()
        assert slow_worker.post(model="guest").status_code == 404
        assert slow_worker.load("guest", tmp_path).status_code == 400
        assert reply.result() == alone
        assert gone.result().status_code == 200
    assert slow_worker.load("guest", tmp_path).status_code == 200
    assert slow_worker.unload("guest").status_code == 200


def test_eight_streams_of_one_adapter_have_the_numbers_of_one_alone(worker: RunningWorker) -> None:
    # Not the tokens only: numbers that differ between one row and several differ by 1e-2 here, and flip tokens elsewhere.
    requests = [
        {"model": "red", "prompt": prompt(15 + 20 * salt, salt), "max_tokens": 60, "logprobs": 0} for salt in range(8)
    ]
    alone = [worker.complete(**fields)["choices"][0] for fields in requests]
    for _ in range(3):
        with ThreadPoolExecutor(8) as pool:
            together = [body["choices"][0] for body in pool.map(lambda fields: worker.complete(**fields), requests)]
        for one, other in zip(alone, together, strict=True):
            assert one["token_ids"] == other["token_ids"]
            assert one["logprobs"]["token_logprobs"] == pytest.approx(other["logprobs"]["token_logprobs"], abs=1e-4)


@pytest.mark.parametrize(("rank", "alpha"), [(4, 8.0), (16, 4.0), (3, 8.0), (8, 0.0)])
def test_an_adapter_has_the_strength_that_its_file_says(tmp_path: Path, rank: int, alpha: float) -> None:
    # An f16 model: no quantised activations, so the same adapter loaded plainly must agree closely.
    model_path = write_tiny_gguf(tmp_path / "model.gguf", q4_0=False)
    adapter_path = write_tiny_lora(tmp_path / "tuned" / "adapter.gguf", rank=rank, alpha=alpha, strength=0.2)
    ids = prompt(40)
    model = Model(model_path, NativeLog())
    context = Context(model, ContextSize(64, 1, 64), threads=1)
    everything = (ids, range(40), [0] * 40, [True] * 40)
    base = score_rows(context.decode(*everything)[:-1], ids[1:], 0)
    context.clear(0)
    adapter = model.load_adapter(adapter_path)
    context.use_adapter(adapter)
    expected = np.array([score.logprob for score in score_rows(context.decode(*everything)[:-1], ids[1:], 0)])
    context.close()
    adapter.close()
    model.close()
    assert np.abs(expected - [score.logprob for score in base]).max() > 0.1
    with running(tmp_path / "worker", model_path) as worker:
        assert worker.load("tuned", adapter_path.parent).status_code == 200
        entries = worker.complete(model="tuned", prompt=ids, prompt_logprobs=0, max_tokens=1)["choices"][0]
        served = [
            entry[str(token)]["logprob"] for token, entry in zip(ids[1:], entries["prompt_logprobs"][1:], strict=True)
        ]
    assert np.abs(np.array(served) - expected).max() < 0.01


def test_more_adapters_than_fit_in_memory_are_all_served(tiny_model: Path, tmp_path: Path) -> None:
    names = [f"adapter-{index}" for index in range(9)]
    for seed, name in enumerate(names):
        write_tiny_lora(tmp_path / name / "adapter.gguf", seed=seed)
    with running(tmp_path / "worker", tiny_model, "--max-adapters", "3", "--max-seqs", "6") as worker:
        for name in names:
            assert worker.load(name, tmp_path / name).status_code == 200
        first = {name: worker.ids(model=name, max_tokens=20) for name in names}
        assert len({tuple(ids) for ids in first.values()}) == len(names)
        assert worker.metric("adapters") == 9
        assert worker.metric("adapters_in_memory") == 3
        requests = [{"model": name, "max_tokens": 20} for name in names * 2]
        assert worker.ids_together(requests) == [first[name] for name in names * 2]
        assert worker.metric("adapters_in_memory") <= 3
        for name in names:
            assert worker.unload(name).status_code == 200
        assert worker.metric("adapters_in_memory") == 0
        assert len(worker.client.get("/v1/models").json()["data"]) == 1


def test_a_file_that_changed_is_refused_instead_of_being_served(tiny_model: Path, tmp_path: Path) -> None:
    for seed, name in enumerate(("one", "two"), start=1):
        write_tiny_lora(tmp_path / name / "adapter.gguf", seed=seed)
    with running(tmp_path / "worker", tiny_model, "--max-adapters", "1") as worker:
        for name in ("one", "two"):
            assert worker.load(name, tmp_path / name).status_code == 200
        write_tiny_lora(tmp_path / "one" / "adapter.gguf", seed=3)
        response = worker.post(model="one")
        assert response.status_code == 500
        assert "has changed" in response.json()["error"]["message"]
        (tmp_path / "one" / "adapter.gguf").unlink()
        assert worker.post(model="one").status_code == 500
        assert len(worker.ids(model="two")) == 6


def test_a_name_that_comes_back_as_another_adapter_shares_nothing_with_the_first(
    tiny_model: Path, tmp_path: Path
) -> None:
    for seed, name in enumerate(("first", "second"), start=1):
        write_tiny_lora(tmp_path / name / "adapter.gguf", seed=seed)
    ids = prompt(120)
    with running(tmp_path / "worker", tiny_model) as worker:
        replies = []
        for name in ("first", "second", "first"):
            assert worker.load("tuned", tmp_path / name).status_code == 200
            body = worker.complete(model="tuned", prompt=ids)
            assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
            replies.append(body["choices"][0]["token_ids"])
            assert worker.unload("tuned").status_code == 200
        assert replies[0] == replies[2] != replies[1]


def test_a_thousand_adapters_are_registered_and_any_of_them_answers(tiny_model: Path, tmp_path: Path) -> None:
    for seed in range(8):
        write_tiny_lora(tmp_path / f"adapter-{seed}" / "adapter.gguf", seed=seed, rank=1)
    with running(tmp_path / "worker", tiny_model, "--max-adapters", "16") as worker:
        with ThreadPoolExecutor(8) as pool:
            folders = [tmp_path / f"adapter-{index % 8}" for index in range(1000)]
            names = [f"name-{index}" for index in range(1000)]
            assert {response.status_code for response in pool.map(worker.load, names, folders)} == {200}
        assert worker.metric("adapters") == 1000
        assert worker.metric("adapters_in_memory") == 16
        assert len(worker.client.get("/v1/models").json()["data"]) == 1001
        expected = [worker.ids(model=f"name-{index}", max_tokens=12) for index in range(8)]
        for index in (0, 999, 500, 7, 1, 250):
            assert worker.ids(model=f"name-{index}", max_tokens=12) == expected[index % 8]


@pytest.mark.parametrize("what", ["gone", "another"])
def test_a_file_that_goes_before_the_first_reply_ends_that_reply_alone(tmp_path: Path, what: str) -> None:
    # Under f16 weights: decode steps have a form of their own there, which is made of the file when it is first needed.
    file = write_tiny_lora(tmp_path / "x" / "adapter.gguf", seed=1)
    with running(tmp_path / "worker", write_tiny_gguf(tmp_path / "model.gguf", q4_0=False)) as worker:
        assert worker.load("x", tmp_path / "x").status_code == 200
        file.unlink()
        if what == "another":
            write_tiny_lora(file, seed=2)
        for _ in range(4):
            response = worker.post(model="x")
            assert response.status_code == 500 and "adapter.gguf" in response.json()["error"]["message"]
        assert worker.post().status_code == 200
        assert worker.process.poll() is None
