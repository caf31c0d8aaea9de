"""Jobs that go on from a tuned model or a checkpoint: its adapter, its bundle, its links, and what the new model is called."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from gateway.bases import PreparedBase
from gateway.chat.bundle import make_bundle
from gateway.engines.catalog import TunedModel
from gateway.engines.engine import Engine
from gateway.errors import Forbidden, ModelNotFound, RequestError
from gateway.store import models as model_statements
from gateway.store.jobs import Job
from tests.jobs.fake_trainer import Plan
from tests.jobs.parts import Workshop, base_bundle, open_workshop
from tests.jobs.test_routes import front_door, refused
from tests.tiny_tokenizers import sentencepiece_like

pytestmark = pytest.mark.anyio


async def first_model(shop: Workshop, **fields: Any) -> str:
    ended = await shop.wait_for((await shop.create(**fields)).id, "succeeded")
    assert ended.fine_tuned_model is not None
    return ended.fine_tuned_model


async def delete(shop: Workshop, name: str) -> None:
    """As the route does it."""
    assert await shop.store.write(lambda c: model_statements.delete(c, "default", name))
    shop.catalog.withdraw(name)


def inodes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in folder.iterdir() if path.is_file()}


async def test_training_goes_on_from_a_model_and_from_a_checkpoint(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path
) -> None:
    plan = Plan(adapter=str(adapter), checkpoint_adapters={"3": str(adapter)})
    async with open_workshop(tmp_path, base, engine, plan) as shop, front_door(shop) as client:
        first = await first_model(shop, model="gpt-4o-mini", suffix="one")
        checkpoint = next(row.name for row in await shop.models() if row.step_number == 3)
        assert checkpoint.endswith(":ckpt-step-3")
        kept = inodes(Path((await shop.models())[0].adapter_path))
        for start in (first, checkpoint):
            job = await client.fine_tuning.jobs.create(
                model=start, training_file=await shop.upload(), suffix="two", extra_body={"tunegate": {"lora_rank": 4}}
            )
            assert job.model == start, "what was asked for"
            spec = shop.folder_of(job.id).read_spec()
            assert (spec.starts_from, spec.base.name, spec.template_digest) == (start, "tiny", base_bundle().digest)
            assert (spec.lora.rank, spec.lora.alpha, spec.lora.target_modules) == (4, 8, "q_proj")
            assert cast("Any", job).tunegate["lora_target_modules"] == "q_proj"
            linked = inodes(shop.folder_of(job.id).start)
            assert set(linked) == {"adapter_model.safetensors", "adapter_config.json"}
            assert linked.items() <= kept.items(), "hard links: nothing is copied, and deleting the model takes nothing"
            await delete(shop, start)
            ended = await shop.wait_for(job.id, "succeeded")
            assert (ended.fine_tuned_model or "").startswith("ft:gpt-4o-mini:local:two:"), "never ft:ft:"
            assert f"Training goes on from {start}" in await shop.messages(job.id)
        third = await first_model(shop, model=ended.fine_tuned_model, suffix="three")
        assert third.startswith("ft:gpt-4o-mini:local:three:")


async def test_what_the_adapter_has_cannot_be_asked_for_otherwise(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path
) -> None:
    async with open_workshop(tmp_path, base, engine, Plan(adapter=str(adapter))) as shop, front_door(shop) as client:
        model, file_id = await first_model(shop), await shop.upload()
        others = {"lora_rank": 8, "lora_alpha": 16, "lora_target_modules": "all-linear", "use_rslora": True}
        for name, value in others.items():
            call = client.fine_tuning.jobs.create(
                model=model, training_file=file_id, extra_body={"tunegate": {name: value}}
            )
            error = await refused(call)
            assert (error["status"], error["param"]) == (400, f"tunegate.{name}")
            assert "which cannot be changed any more" in error["message"]
        engine.max_lora_rank = 2
        try:
            error = await refused(client.fine_tuning.jobs.create(model=model, training_file=file_id))
        finally:
            engine.max_lora_rank = None
        assert error["param"] == "model" and "has rank 4" in error["message"]
        asked = {"lora_rank": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj"], "lora_dropout": 0.1}
        job = await shop.create(model=model, training_file=file_id, tunegate=asked)
        assert shop.folder_of(job.id).read_spec().lora.dropout == 0.1, "dropout is of the training, not of the adapter"


async def test_the_bundle_is_the_models_whatever_its_base_is_rendered_through_today(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path
) -> None:
    async with open_workshop(tmp_path, base, engine, Plan(adapter=str(adapter))) as shop:
        model = await first_model(shop)
        shop.catalog.rebundle("tiny", make_bundle("alpaca", sentencepiece_like(), [2]))
        job = await shop.create(model=model)
        of_base = await shop.create()
        digests = [shop.folder_of(j.id).read_spec().template_digest for j in (job, of_base)]
        assert digests[0] == base_bundle().digest != digests[1]


async def test_only_a_model_that_is_whole_and_that_the_project_sees_is_trained_further(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path
) -> None:
    async with open_workshop(tmp_path, base, engine, Plan(adapter=str(adapter))) as shop:
        model = await first_model(shop)
        request = shop.request(model=model, training_file=await shop.upload())
        with pytest.raises(ModelNotFound):
            await shop.supervisor.create(request, None, "another")
        folders = len(list(shop.data_dir.jobs.iterdir()))
        weights = Path((await shop.models())[0].adapter_path) / "adapter_model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.unlink()
        weights.write_bytes(content)
        with pytest.raises(
            RequestError, match=r"cannot be trained further: adapter_model\.safetensors has digest"
        ) as error:
            await shop.supervisor.create(request, None, "default")
        assert error.value.param == "model"
        weights.unlink()
        with pytest.raises(RequestError, match="cannot be trained further: the adapter lacks"):
            await shop.supervisor.create(request, None, "default")
        assert len(list(shop.data_dir.jobs.iterdir())) == folders, "what was refused leaves no folder"


async def test_a_project_that_may_ask_anothers_model_may_not_train_it_further(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path
) -> None:
    async with open_workshop(tmp_path, base, engine, Plan(adapter=str(adapter))) as shop:
        model = await first_model(shop)
        shop.catalog.show(model, frozenset({"default", "guest"}))  # as a permission does it
        request = shop.request(model=model, training_file=await shop.upload(project_id="guest"))
        with pytest.raises(Forbidden, match="belongs to another project, which alone trains it further") as error:
            await shop.supervisor.create(request, None, "guest")
        assert error.value.param == "model"


async def test_a_model_from_elsewhere_is_trained_further_under_its_bases_name(
    tmp_path: Path, base: PreparedBase, engine: Engine, adapter: Path
) -> None:
    async with open_workshop(tmp_path, base, engine, Plan(adapter=str(adapter))) as shop:
        await first_model(shop, model="gpt-4o-mini")
        row = replace((await shop.models())[0], name="mine", job_id=None)
        await shop.store.write(lambda c: model_statements.insert_model(c, row))
        shop.catalog.publish(TunedModel("mine", "tiny", base_bundle(), row.engine_name, 1, "local"))
        job: Job = await shop.create(model="mine")
        assert (job.model, job.named_base) == ("mine", "tiny")
