"""A job from its creation to the model that it made, on a real store, a real engine and a trainer that is a real process."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from gateway.bases import PreparedBase
from gateway.engines.engine import Engine
from gateway.store import files as file_statements
from tests.jobs.fake_trainer import Plan
from tests.jobs.parts import open_workshop

pytestmark = pytest.mark.anyio


async def test_a_job_becomes_a_model_that_its_engine_serves(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path
) -> None:
    plan = Plan(adapter=str(adapter), checkpoint_adapters={"3": str(adapter), "6": str(adapter)})
    async with open_workshop(tmp_path, base, engine, plan) as shop:
        job = await shop.create(suffix="greeting", seed=7)
        assert job.status == "validating_files"
        ended = await shop.wait_for(job.id, "succeeded")
        name = ended.fine_tuned_model
        assert name is not None and name.startswith("ft:tiny:local:greeting:") and len(name.rsplit(":", 1)[1]) == 8
        assert ended.trained_tokens == 200 and ended.finished_at is not None and ended.error is None
        assert await shop.messages(job.id) == [
            f"Created fine-tuning job: {job.id}",
            f"Validating training file: {job.training_file}",
            "Files validated, moving job to queued state",
            "Fine-tuning job started",
            "Step 1/6: training loss=1.00",
            "Step 2/6: training loss=0.50",
            "Step 3/6: training loss=0.33",
            "Checkpoint created at step 3",
            "Step 4/6: training loss=0.25",
            "Step 5/6: training loss=0.20",
            "Step 6/6: training loss=0.17",
            "Checkpoint created at step 6",
            f"New fine-tuned model created: {name}",
            "The job has successfully completed",
        ]
        checkpoints = await shop.checkpoints(job.id)
        assert [c.step_number for c in checkpoints] == [3, 6]
        assert all(c.name.endswith(f":ckpt-step-{c.step_number}") for c in checkpoints)
        names = {name, *(c.name for c in checkpoints)}
        assert {row.name for row in await shop.models()} == names, "the checkpoints are servable too"
        for served in names:
            assert len(await shop.ask(served)) == 4
        assert engine.serves(shop.catalog.resolve(name, "default").engine_model)
        assert {pid for pid, _, _ in shop.steps(job.id)} == {shop.steps(job.id)[0][0]}


async def test_the_result_file_has_a_line_for_each_step(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path
) -> None:
    async with open_workshop(tmp_path, base, engine, Plan(adapter=str(adapter), steps=3)) as shop:
        ended = await shop.wait_for((await shop.create()).id, "succeeded")
        (file_id,) = ended.result_files
        file = await shop.store.read(lambda c: file_statements.select_file(c, file_id, now=0))
        assert file is not None and file.purpose == "fine-tune-results"
        rows = list(csv.reader(io.StringIO(shop.blobs.path(file.digest).read_text())))
        assert rows[0] == ["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"]
        assert rows[1:] == [["1", "1.0", "0.5", "", ""], ["2", "0.5", "0.5", "", ""], ["3", str(1 / 3), "0.5", "", ""]]


async def test_the_input_outlives_the_deletion_of_its_file(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path
) -> None:
    gate = tmp_path / "gate"
    async with open_workshop(tmp_path, base, engine, Plan(adapter=str(adapter), gate=str(gate))) as shop:
        job = await shop.create()
        file = await shop.store.write(lambda c: file_statements.delete_file(c, job.training_file, now=1))
        assert file is not None
        shop.blobs.path(file.digest).unlink()
        gate.touch()
        ended = await shop.wait_for(job.id, "succeeded")
        assert ended.check is not None and ended.check["n_examples"] == 12


async def test_one_job_runs_at_a_time_and_the_next_follows(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path
) -> None:
    gate = tmp_path / "gate"
    async with open_workshop(tmp_path, base, engine, Plan(adapter=str(adapter), gate=str(gate))) as shop:
        first = await shop.create()
        await shop.wait_for(first.id, "running")
        second, third = await shop.create(), await shop.create()
        for job in (second, third):
            await shop.wait_for(job.id, "queued")
        assert shop.steps(second.id) == []
        gate.touch()
        ended = [await shop.wait_for(job.id, "succeeded") for job in (first, second, third)]
        begun = [job.started_at for job in ended]
        assert None not in begun and begun == sorted(begun, key=lambda at: at or 0)


async def test_a_name_that_an_alias_asked_for_comes_back_in_the_models_name(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path
) -> None:
    async with open_workshop(tmp_path, base, engine, Plan(adapter=str(adapter))) as shop:
        ended = await shop.wait_for((await shop.create(model="gpt-4o-mini")).id, "succeeded")
        assert ended.base == "tiny" and ended.fine_tuned_model is not None
        assert ended.fine_tuned_model.startswith("ft:gpt-4o-mini:local::")


async def test_what_the_check_finds_fails_the_job_with_its_own_words(
    tmp_path: Path, base: PreparedBase, engine: Engine
) -> None:
    error = ["invalid_n_examples", "Training file has 7 example(s)", "training_file"]
    async with open_workshop(tmp_path, base, engine, Plan(check_error=error)) as shop:
        ended = await shop.wait_for((await shop.create()).id, "failed")
        assert ended.error == {"code": error[0], "message": error[1], "param": error[2]}
        assert (await shop.messages(ended.id))[-1] == "The job failed: Training file has 7 example(s)"
        assert ended.check is None and ended.started_at is None


async def test_a_check_that_crashes_fails_the_job_and_names_its_last_words(
    tmp_path: Path, base: PreparedBase, engine: Engine
) -> None:
    async with open_workshop(tmp_path, base, engine, Plan(check_crashes=True)) as shop:
        ended = await shop.wait_for((await shop.create()).id, "failed")
        assert ended.error is not None and ended.error["code"] == "file_check_failed"
        assert "SIGKILL" in ended.error["message"] and "the check met?[31m its end" in ended.error["message"]


async def test_bad_lines_are_events_before_the_job_fails(tmp_path: Path, base: PreparedBase, engine: Engine) -> None:
    bad = [f"Training file: Line {number}: is not JSON" for number in range(1, 21)]
    error = ["invalid_training_file", "The training file has 99 invalid example(s)", "training_file"]
    async with open_workshop(tmp_path, base, engine, Plan(check_error=error, problems=bad)) as shop:
        ended = await shop.wait_for((await shop.create()).id, "failed")
        assert ended.error is not None and ended.error["code"] == "invalid_training_file"
        told = [event.message for event in await shop.events(ended.id) if event.level == "error"]
        assert sorted(told) == sorted([*bad, f"The job failed: {error[1]}"])


async def test_what_the_check_notes_and_warns_of_are_events(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path
) -> None:
    plan = Plan(adapter=str(adapter), warnings=["3 example(s) were shortened"], notes=["12 examples"])
    async with open_workshop(tmp_path, base, engine, plan) as shop:
        ended = await shop.wait_for((await shop.create()).id, "succeeded")
        warned = [event.message for event in await shop.events(ended.id) if event.level == "warn"]
        assert warned == ["3 example(s) were shortened"]
        assert "12 examples" in [event.message for event in await shop.events(ended.id) if event.level == "info"]


async def test_a_trainer_that_fails_fails_the_job(tmp_path: Path, base: PreparedBase, engine: Engine) -> None:
    plan = Plan(fail=["invalid_loss", "The loss became nan at step 6", "hyperparameters"])
    async with open_workshop(tmp_path, base, engine, plan) as shop:
        ended = await shop.wait_for((await shop.create()).id, "failed")
        assert ended.error == {
            "code": "invalid_loss",
            "message": "The loss became nan at step 6",
            "param": "hyperparameters",
        }
        assert await shop.models() == [] and ended.result_files == ()


async def test_lines_that_are_no_events_and_numbers_that_are_none_cost_nothing(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path
) -> None:
    async with open_workshop(tmp_path, base, engine, Plan(adapter=str(adapter), broken_lines=True)) as shop:
        ended = await shop.wait_for((await shop.create()).id, "succeeded")
        metrics = [event for event in await shop.events(ended.id) if event.type == "metrics"]
        assert len(metrics) == 6
        assert all(event.data is not None and "train_loss" not in event.data for event in metrics)
