"""Succeeded means servable: what is refused is never served, and of a cancel and a completion one wins."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.bases import PreparedBase
from gateway.engines.adapters import Adapter
from gateway.engines.control import EngineControl
from gateway.engines.engine import Engine
from gateway.engines.pool import ENSURE_TIMEOUT_S, Pool
from gateway.engines.witness import WitnessReport
from gateway.errors import EngineUnavailable
from gateway.jobs.barrier import VARIABLE
from gateway.jobs.names import checkpoint_name, model_name
from gateway.store import files as file_statements
from gateway.store import models as model_statements
from tests.engines.parts import as_adapter as adapter_in
from tests.engines.parts import with_other_weights, write_manifest
from tests.jobs.fake_trainer import Plan
from tests.jobs.parts import Workshop, open_workshop, until, with_bundle

pytestmark = pytest.mark.anyio


async def loaded(engine: Engine) -> set[str]:
    control = EngineControl(engine.endpoint)
    try:
        return {name for name, parent in (await control.models()).items() if parent is not None}
    finally:
        await control.close()


async def fail_with(shop: Workshop, code: str) -> str:
    """The message that the job failed with; nothing of it is served."""
    before = await loaded(shop.engine)
    ended = await shop.wait_for((await shop.create()).id, "failed")
    assert ended.error is not None and ended.error["code"] == code, ended.error
    assert ended.fine_tuned_model is None and ended.result_files == ()
    assert await shop.models() == []
    assert await loaded(shop.engine) == before
    assert set(shop.engine.adapters) == before
    return str(ended.error["message"])


async def test_an_adapter_whose_alpha_is_wrong_is_caught_by_the_witness(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path
) -> None:
    wrong = with_other_weights(adapter_in(adapter, "a"), tmp_path / "wrong", base, alpha=16.0)
    with_bundle(wrong.path, base.digest)
    async with open_workshop(tmp_path, base, engine, Plan(adapter=str(wrong.path))) as shop:
        assert "alpha" in await fail_with(shop, "adapter_not_servable")


async def test_an_adapter_with_a_file_too_many_is_refused(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path
) -> None:
    extended = shutil.copytree(adapter, tmp_path / "extended")
    (extended / "extra.py").write_text("print('never run')")
    async with open_workshop(tmp_path, base, engine, Plan(adapter=str(extended))) as shop:
        assert "extra.py" in await fail_with(shop, "adapter_not_servable")


async def test_an_adapter_of_another_base_is_refused(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path
) -> None:
    other = shutil.copytree(adapter, tmp_path / "other")
    write_manifest(other, "sha256:" + "0" * 64)
    async with open_workshop(tmp_path, base, engine, Plan(adapter=str(other))) as shop:
        assert "base" in await fail_with(shop, "adapter_not_servable")


async def test_an_adapter_whose_template_cannot_be_read_is_refused(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path
) -> None:
    spoiled = shutil.copytree(adapter, tmp_path / "spoiled")
    (spoiled / "template/template.json").write_text("{}")
    write_manifest(spoiled, base.digest)
    async with open_workshop(tmp_path, base, engine, Plan(adapter=str(spoiled))) as shop:
        assert "template" in await fail_with(shop, "adapter_not_servable")


async def test_a_trainer_that_says_succeeded_but_left_no_adapter_fails_the_job(
    tmp_path: Path, base: PreparedBase, engine: Engine
) -> None:
    async with open_workshop(tmp_path, base, engine, Plan()) as shop:
        assert "is not a folder" in await fail_with(shop, "adapter_not_servable")


async def test_names_follow_from_the_job_and_checkpoints_have_characters_of_their_own(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path
) -> None:
    async with open_workshop(tmp_path, base, engine, Plan(adapter=str(adapter))) as shop:
        job = await shop.wait_for((await shop.create(suffix="a:b/c")).id, "succeeded")
        names = [model_name(job, "local"), checkpoint_name(job, "local", 3), checkpoint_name(job, "local", 6)]
        assert names[0] == job.fine_tuned_model
        assert all(name.startswith("ft:tiny:local:a:b/c:") for name in names)
        tokens = [name.removeprefix("ft:tiny:local:a:b/c:").split(":")[0] for name in names]
        assert len(set(tokens)) == 3 and all(len(token) == 8 and token.isalnum() for token in tokens)


async def test_a_trained_job_waits_for_an_engine_that_is_not_there_yet(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path
) -> None:
    async with open_workshop(tmp_path, base, engine, Plan(adapter=str(adapter))) as shop:
        shop.engine_is_there = False
        job = await shop.create()
        await until((shop.folder_of(job.id).path / "result.json").exists)
        assert (await shop.job(job.id)).status == "running"
        shop.engine_is_there = True
        await shop.wait_for(job.id, "succeeded")


class Sleeping(Pool):
    """Sleeps, as while another job trains, until it was asked once."""

    asked = 0

    @property
    def asleep(self) -> bool:
        return self.asked == 1

    async def ensure_adapter(
        self, adapter: Adapter, witness: bool = True, timeout_s: float = ENSURE_TIMEOUT_S
    ) -> WitnessReport | None:
        self.asked += 1
        if self.asleep:
            raise EngineUnavailable("it sleeps while a job trains")
        return await super().ensure_adapter(adapter, witness, timeout_s)


async def test_a_trained_job_waits_for_an_engine_that_sleeps_for_another_job_however_long_that_trains(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path
) -> None:
    async with open_workshop(tmp_path, base, engine, Plan(adapter=str(adapter))) as shop:
        shop.pool = Sleeping("tiny", shop.pool.replicas)
        supervisor = shop.supervisor
        supervisor._publication = replace(supervisor._publication, engine_wait_s=0.0)
        job = await shop.wait_for((await shop.create()).id, "succeeded")
        assert shop.pool.asked > 1  # asleep the first time
        assert job.fine_tuned_model in [row.name for row in await shop.models()]


async def test_a_job_that_waits_for_its_engine_can_be_cancelled(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path
) -> None:
    async with open_workshop(tmp_path, base, engine, Plan(adapter=str(adapter))) as shop:
        shop.engine_is_there = False
        job = await shop.create()
        await until((shop.folder_of(job.id).path / "result.json").exists)
        assert (await shop.supervisor.cancel(job.id, "default")).status == "cancelled"
        shop.engine_is_there = True
        await shop.wait_for((await shop.create()).id, "succeeded")
        assert (await shop.job(job.id)).status == "cancelled"
        assert len(await shop.models()) == 1


async def test_a_cancel_just_before_the_commit_wins_and_the_adapter_is_never_servable(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    barrier = tmp_path / "barrier"
    monkeypatch.setenv(VARIABLE, f"before-publication-commit:{barrier}")
    before = await loaded(engine)
    async with open_workshop(tmp_path, base, engine, Plan(adapter=str(adapter))) as shop:
        job = await shop.create()
        await until(Path(f"{barrier}.reached").exists)
        assert await loaded(engine) != before, "the engine has it already"
        assert (await shop.supervisor.cancel(job.id, "default")).status == "cancelled"
        barrier.touch()
        await until(lambda: not shop.supervisor.busy)
        ended = await shop.job(job.id)
        assert ended.status == "cancelled" and ended.fine_tuned_model is None and ended.result_files == ()
        assert await shop.models() == [] and await loaded(engine) == before
        listed = await shop.store.read(lambda c: file_statements.select_files(c, now=0, limit=10))
        assert [file.purpose for file in listed.items] == ["fine-tune"], "no result file either"
        assert (await shop.messages(job.id))[-1] == "The job was cancelled"


async def test_a_cancel_that_comes_after_the_commit_changes_nothing(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path
) -> None:
    async with open_workshop(tmp_path, base, engine, Plan(adapter=str(adapter))) as shop:
        ended = await shop.wait_for((await shop.create()).id, "succeeded")
        assert await shop.supervisor.cancel(ended.id, "default") == ended == await shop.job(ended.id)
        assert len(await shop.models()) == 1


async def test_an_adapter_that_changes_nothing_succeeds_with_a_warning(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path
) -> None:
    idle = with_other_weights(adapter_in(adapter, "a"), tmp_path / "idle", base, strength=0.0)
    witness = json.loads((idle.path / "witness.json").read_text())
    for item in witness["items"]:
        item["tuned_logprobs"] = item["base_logprobs"]
    (idle.path / "witness.json").write_text(json.dumps(witness))
    with_bundle(idle.path, base.digest)
    async with open_workshop(tmp_path, base, engine, Plan(adapter=str(idle.path))) as shop:
        ended = await shop.wait_for((await shop.create()).id, "succeeded")
        warned = [event.message for event in await shop.events(ended.id) if event.level == "warn"]
        assert len(warned) == 1 and str(ended.fine_tuned_model) in warned[0]


async def test_the_files_of_a_deleted_model_go_at_the_next_start_and_its_name_is_not_given_again(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path
) -> None:
    async with open_workshop(tmp_path, base, engine, Plan(adapter=str(adapter))) as shop:
        names = [(await shop.wait_for((await shop.create()).id, "succeeded")).fine_tuned_model for _ in range(2)]
        (folder,) = shop.data_dir.adapters.iterdir()  # the same weights are kept once
        assert await shop.store.write(lambda c: model_statements.delete(c, "default", str(names[0])))
        assert not await shop.store.write(lambda c: model_statements.delete(c, "default", str(names[0])))
    async with open_workshop(tmp_path, base, engine) as shop:
        assert folder.is_dir(), "the other model still needs it"
        assert [row.name for row in await shop.models()] == names[1:]
        assert await shop.store.write(lambda c: model_statements.delete(c, "default", str(names[1])))
    async with open_workshop(tmp_path, base, engine) as shop:
        assert not folder.exists() and await shop.models() == []
