"""Adapters from elsewhere, taken up one by one: one that is added again meanwhile is not lost, nor refused for another."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gateway.bases import PreparedBase
from gateway.engines.adapters import Adapter
from gateway.engines.pool import Pool
from gateway.engines.witness import WitnessReport
from gateway.jobs.imports import Imports
from tests.engines.parts import write_adapter
from tests.jobs.parts import Workshop, open_workshop, until, with_bundle

pytestmark = pytest.mark.anyio


class Everything(Pool):
    """Takes every adapter at once; while it takes the first, the name is added again."""

    def __init__(self, folder: Path, again: Path) -> None:
        super().__init__("tiny")
        self.folder, self.again = folder, again
        self.taken: list[str] = []
        self.dropped: list[str] = []

    async def ensure_adapter(
        self, adapter: Adapter, witness: bool = True, timeout_s: float = 1.0
    ) -> WitnessReport | None:
        self.taken.append(adapter.engine_name)
        if self.again.exists():
            place_again(self.folder, self.again)
        return None

    async def drop_adapter(self, engine_name: str) -> None:
        self.dropped.append(engine_name)


def place_again(folder: Path, again: Path) -> None:
    """As `tunegate models add` does it."""
    shutil.rmtree(folder / "place", ignore_errors=True)
    again.rename(folder / "place")


def write_import(folder: Path, base: PreparedBase, **options: Any) -> Path:
    adapter = with_bundle(write_adapter(folder / "adapter", base.digest, **options), base.digest)
    manifest = json.loads((adapter / "manifest.json").read_bytes())
    (adapter / "manifest.json").write_text(json.dumps(manifest | {"template_digest": "sha256:template"}))
    (folder / "import.json").write_text(json.dumps({"name": "mine", "base": "tiny", "created_at": 1}))
    return folder


@pytest.fixture
async def workshop(tmp_path: Path, base: PreparedBase) -> AsyncIterator[Workshop]:
    (tmp_path / "workshop").mkdir()
    async with open_workshop(tmp_path / "workshop", base, None) as workshop:
        yield workshop


async def test_a_name_that_is_added_again_while_it_is_taken_up_is_taken_up_again(
    workshop: Workshop, base: PreparedBase, tmp_path: Path
) -> None:
    write_import(tmp_path / "imports" / "place", base, seed=1)
    pool = Everything(tmp_path / "imports", write_import(tmp_path / "again", base, seed=2))
    imports = imports_of(workshop, tmp_path / "imports", pool)
    imports.start()
    try:
        await until(lambda: len(set(pool.taken)) == 2 and not (tmp_path / "imports" / "place").exists())
    finally:
        await imports.stop()
    (row,) = await workshop.models()
    assert row.name == "mine" and row.engine_name == pool.taken[-1]


async def test_an_old_version_is_dropped_when_requests_that_found_it_have_reached_it_and_not_when_it_is_back(
    workshop: Workshop, base: PreparedBase, tmp_path: Path
) -> None:
    pool = Everything(tmp_path / "imports", tmp_path / "none")
    imports = imports_of(workshop, pool.folder, pool, linger_s=3.0)
    imports.start()
    try:
        for number, seed in enumerate((1, 2, 1)):
            write_import(tmp_path / f"made{number}", base, seed=seed)
            pool.folder.mkdir(exist_ok=True)
            place_again(pool.folder, tmp_path / f"made{number}")
            await until(lambda: not (pool.folder / "place").exists())
            assert not pool.dropped, "there may be requests that found it and are being rendered"
        first, second, again = pool.taken
        assert again == first
        await until(lambda: pool.dropped)
    finally:
        await imports.stop()
    assert pool.dropped == [second]


async def test_what_was_wrong_with_one_is_not_held_against_the_next_of_its_name(
    workshop: Workshop, base: PreparedBase, tmp_path: Path
) -> None:
    write_import(tmp_path / "imports" / "place", base)
    (tmp_path / "imports" / "place" / "adapter" / "more.bin").touch()
    pool = Everything(tmp_path / "imports", tmp_path / "none")
    good = write_import(tmp_path / "again", base)

    def engines(name: str) -> Pool:
        """Asked for just before the files are looked at."""
        if good.exists():
            place_again(pool.folder, good)
            (pool.folder / "place" / "adapter").rename(tmp_path / "aside")  # as if it had been seen half removed
        else:
            (tmp_path / "aside").rename(pool.folder / "place" / "adapter")
        return pool

    imports = imports_of(workshop, pool.folder, engines)
    imports.start()
    try:
        await until(lambda: pool.taken)
    finally:
        await imports.stop()
    assert not list(pool.folder.glob("*/refused.txt"))


def imports_of(workshop: Workshop, folder: Path, engines: Any, linger_s: float = 0.0) -> Imports:
    of_name = engines if callable(engines) else lambda name: engines
    return Imports(workshop.store, folder, workshop.data_dir.adapters, "org", workshop.catalog, of_name, linger_s)
