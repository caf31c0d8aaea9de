"""Exports for clients, run by the real trainer on a tiny model: what becomes of the file, and what is left of a failure."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.datastructures import State

from gateway.access import ANYBODY, Caller, Limits
from gateway.bases import read_base
from gateway.engines.catalog import Base, Catalog, TunedModel
from gateway.engines.client import Deadlines
from gateway.engines.kinds import llama_engine
from gateway.errors import RateLimited, RequestError, TunegateError
from gateway.export_plan import ExportPlan
from gateway.exports import LOST, MAX_WAITING, Exports
from gateway.routes.exports import routes
from gateway.settings import Settings
from gateway.store import files as statements
from gateway.store.blobs import Blobs
from gateway.store.database import Store
from gateway.store.files import File
from gateway.store.models import ModelRow, insert_model
from gateway.wire.exports import TYPES, check_form, parse_export
from tests.engines.parts import pool_of
from tests.jobs.parts import base_bundle, until
from tests.jobs.test_routes import tell
from tests.server import ROOT
from tests.tiny_model import write_tiny_model
from tests.trainer.tuned_models import tune
from trainer.export.checkpoint import DTYPES
from trainer.export.prepare import prepare
from trainer.export.quantise import PLAIN_TYPE
from trainer.export.quantise import TYPES as QUANTISED

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> ExportPlan:
    root = tmp_path_factory.mktemp("tuned")
    prepare(write_tiny_model(root / "source"), "vicuna_v1.1", root / "base", threads=1)
    tune(root / "base", root / "adapter")
    return ExportPlan("ft:tiny:org::abc", root / "base", root / "adapter", "gguf", "q8_0")


class Runner:
    """A store, its blobs and the exports over both."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.store, self.blobs = Store.open(data / "tunegate.db"), Blobs(data / "blobs")
        self.exports = Exports(self.store, self.blobs, data / "exports")

    async def file(self, file_id: str) -> File | None:
        return await self.store.read(lambda c: statements.select_file(c, file_id, now=int(time.time())))

    async def when(self, file_id: str, condition: Callable[[File], object], timeout_s: float = 60) -> File:
        async with asyncio.timeout(timeout_s):
            while True:
                file = await self.file(file_id)
                assert file is not None
                if condition(file):
                    return file
                await asyncio.sleep(0.05)

    async def end_of(self, file_id: str) -> File:
        file = await self.when(file_id, lambda file: file.status != "uploaded")
        await until(lambda: not list(self.data.glob(f"exports/{file_id}")))
        return file

    def sizes(self) -> list[int]:
        return sorted(path.stat().st_size for path in self.blobs.folder.glob("??/*") if path.parent.name != "tmp")


@pytest.fixture
async def runner(tmp_path: Path) -> AsyncIterator[Runner]:
    runner = Runner(tmp_path)
    await runner.exports.open()
    yield runner
    await runner.exports.stop()
    runner.store.close()


def with_storage(limit_bytes: int) -> Caller:
    return Caller(limits=Limits(storage_bytes=limit_bytes))


async def test_a_file_is_there_at_once_and_has_its_bytes_in_the_end(runner: Runner, plan: ExportPlan) -> None:
    begun = await runner.exports.begin(ANYBODY, plan, 3600, "key")
    assert (begun.status, begun.size_bytes, begun.purpose) == ("uploaded", 0, "fine-tune-results")
    assert begun.filename == "ft-tiny-org-abc.q8_0.gguf"
    assert begun.expires_at == begun.created_at + 3600
    again = await runner.exports.begin(ANYBODY, plan, 3600, "key")
    assert again.id == begun.id, "one Idempotency-Key, one export"
    made = await runner.end_of(begun.id)
    assert (made.status, made.status_details) == ("processed", None)
    assert runner.sizes() == [made.size_bytes] and made.size_bytes > 100_000
    assert runner.blobs.path(made.digest).read_bytes()[:4] == b"GGUF"


async def test_what_went_wrong_is_told_and_the_next_one_is_made(
    runner: Runner, plan: ExportPlan, tmp_path: Path
) -> None:
    tune(plan.base, tmp_path / "untrained" / "adapter", strength=0.0)
    untrained = ExportPlan("untrained", plan.base, tmp_path / "untrained" / "adapter", "gguf", None)
    bad = await runner.exports.begin(ANYBODY, untrained, 3600)
    large = await runner.exports.begin(
        with_storage(200_000), ExportPlan("x", plan.base, plan.adapter, "gguf", "f16"), 3600
    )
    good = await runner.exports.begin(ANYBODY, ExportPlan("y", plan.base, plan.adapter, "adapter", None), 3600)
    failed, refused, made = [await runner.end_of(file.id) for file in (bad, large, good)]
    assert failed.status == refused.status == "error" and made.status == "processed"
    assert "the merge changes nothing: none of the 14 weights" in (failed.status_details or "")
    assert "over what this key may store" in (refused.status_details or "")
    assert made.filename == "y.adapter.tar"
    assert runner.sizes()[-1] == made.size_bytes and runner.sizes()[:-1] in ([], [0])
    with pytest.raises(RequestError, match="over what this key may store"):
        await runner.exports.begin(with_storage(made.size_bytes), plan, 3600)


async def test_a_file_that_is_deleted_ends_its_export_and_those_that_wait_are_bounded(
    runner: Runner, plan: ExportPlan
) -> None:
    slow = ExportPlan("slow", plan.base, plan.adapter, "hf", None)
    first = await runner.exports.begin(ANYBODY, slow, 3600)
    file = await runner.when(first.id, lambda file: file.status_details)
    assert (file.status_details or "").startswith("merging (f16)")
    waiting = [await runner.exports.begin(ANYBODY, slow, 3600) for _ in range(MAX_WAITING)]
    with pytest.raises(RateLimited, match="exports are waiting"):
        await runner.exports.begin(ANYBODY, slow, 3600)
    for deleted in (*waiting, first):
        await runner.store.write(partial(statements.delete_file, file_id=deleted.id, now=1))
        runner.exports.cancel(deleted.id)
    await until(lambda: not list((runner.data / "exports").iterdir()))
    assert (await runner.end_of((await runner.exports.begin(ANYBODY, plan, 3600)).id)).status == "processed"


async def test_a_gateway_that_is_killed_leaves_nothing_half(plan: ExportPlan, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.killed_export", str(tmp_path), str(plan.base), str(plan.adapter)]
    gateway = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=subprocess.PIPE)
    assert gateway.stdout is not None
    file_id = (await gateway.stdout.readline()).decode().strip()
    assert file_id.startswith("file-")
    gateway.kill()
    await gateway.wait()
    assert list((tmp_path / "exports" / file_id).iterdir()), "it was at work"
    await until(lambda: not processes_in(tmp_path / "exports"))
    runner = Runner(tmp_path)
    await runner.exports.open()
    file = await runner.file(file_id)
    assert file is not None and (file.status, file.status_details) == ("error", LOST)
    assert not (tmp_path / "exports").exists()
    await runner.exports.stop()
    runner.store.close()


async def test_a_project_that_may_ask_anothers_model_may_not_take_its_weights(
    runner: Runner, plan: ExportPlan, tmp_path: Path
) -> None:
    prepared = read_base(plan.base)
    catalog = Catalog(Deadlines(10, 10))
    pool = pool_of(llama_engine(prepared, tmp_path / "engine"))
    catalog.add_base(Base("tiny", base_bundle(), pool, "tiny", 64, 1, prepared))
    state = State({"settings": Settings(), "store": runner.store, "catalog": catalog, "exports": runner.exports})
    app = Starlette(routes=routes, exception_handlers={TunegateError: tell})
    app.state = state
    for name, owner in (("ours", "default"), ("theirs", "other")):
        row = ModelRow(
            name, 1, "tiny", f"sha256:{name}", str(plan.adapter), name, "sha256:0", None, "x", project_id=owner
        )
        await runner.store.write(partial(insert_model, model=row))
        catalog.publish(TunedModel(name, "tiny", base_bundle(), name, 1, "x", frozenset({owner, "default"})))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        refused = await http.post("/v1/models/theirs/export", json={"to": "adapter"})
        assert (refused.status_code, refused.json()["error"]["param"]) == (403, "model")
        begun = await http.post("/v1/models/ours/export", json={"to": "adapter"})
        assert begun.status_code == 200 and begun.json()["filename"] == "ours.adapter.tar"
    assert (await runner.end_of(begun.json()["id"])).status == "processed"
    catalog.close()


def processes_in(folder: Path) -> list[str]:
    """The processes that work in or under a folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                place = os.readlink(entry / "cwd")
            except OSError:
                continue
            if place.startswith(str(folder)):
                found.append(entry.name)
    return found


def test_the_types_are_those_that_the_trainer_makes() -> None:
    assert {"hf": tuple(DTYPES), "gguf": tuple(QUANTISED), "adapter": ()} == TYPES
    assert TYPES["gguf"][0] == PLAIN_TYPE


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "you must provide 'to'"),
        ({"to": "onnx"}, "'to' must be one of hf, gguf, adapter, not 'onnx'"),
        ({"to": "hf", "type": "q4_0"}, "'type' must be one of f32, f16, bf16 for 'hf', not 'q4_0'"),
        ({"to": "adapter", "type": "f16"}, "exported as it was trained: leave it out"),
        ({"to": "gguf", "quality": 1}, "quality"),
        ({"to": "gguf", "expires_after": {"anchor": "created_at", "seconds": 1}}, "from 3600"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_by_name(body: dict[str, object], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        parse_export(body)


def test_every_type_is_taken() -> None:
    for to, kinds in TYPES.items():
        for kind in (None, *kinds):
            check_form(to, kind)
