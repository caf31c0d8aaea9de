"""Engines of bases that nobody serves any more: what an earlier gateway left of them ends."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from gateway.bases import PreparedBase
from gateway.engines.catalog import Catalog
from gateway.engines.client import Deadlines
from gateway.fleet import Fleet
from gateway.jobdir import read_json
from tests.engines.parts import is_alive, kill_gateway_when

pytestmark = pytest.mark.anyio

FAKE = (sys.executable, "-m", "tests.engines.fake_worker", "well")


async def test_a_worker_of_a_base_that_left_the_settings_while_no_gateway_ran_is_ended(tmp_path: Path) -> None:
    engines = tmp_path / "engines"
    pids = {}
    for name in ("org/gone", "kept"):
        (tmp_path / "model.gguf").touch()
        base = PreparedBase(name, tmp_path, tmp_path / "model.gguf", "sha256:base", "LlamaForCausalLM", 64, "", (2,))
        await kill_gateway_when("spawned", base, engines / name, FAKE)
        pids[name] = read_json(engines / name / "spawn.json")["pid"]
    deadlines = Deadlines(5, 5)
    fleet = Fleet(engines, [], Catalog(deadlines), deadlines)
    await fleet.end_forgotten({"kept"})
    assert not is_alive(pids["org/gone"]) and is_alive(pids["kept"])
    await fleet.end_forgotten(())
    assert not is_alive(pids["kept"])
