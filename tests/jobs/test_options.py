"""What a job asks for, held against its base and engine when it is created; through the SDK, in strict mode."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any, cast

import pytest

from gateway.bases import PreparedBase
from gateway.engines.engine import Engine
from gateway.jobs.target_modules import linear_modules
from tests.jobs.fake_trainer import Plan
from tests.jobs.parts import Workshop, open_workshop
from tests.jobs.test_how_to_train import EVERY_OPTION, WANDB
from tests.jobs.test_routes import front_door, refused

pytestmark = pytest.mark.anyio

LINEAR = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")


def waits(folder: Path) -> Plan:
    return Plan(gate=str(folder / "never"))


async def ask(shop: Workshop, client: Any, **fields: Any) -> Any:
    return await client.fine_tuning.jobs.create(model="tiny", training_file=await shop.upload(), **fields)


async def test_what_was_asked_for_reaches_the_trainer_and_is_shown(
    tmp_path: Path, base: PreparedBase, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        sys.modules, "bitsandbytes", math
    )  # there, whether or not it is installed: nothing imports it here
    async with open_workshop(tmp_path, base, engine, waits(tmp_path)) as shop, front_door(shop) as client:
        job = await ask(
            shop,
            client,
            validation_file=await shop.upload(),
            integrations=[{"type": "wandb", "wandb": WANDB}],
            extra_body={"tunegate": EVERY_OPTION | {"tracking": ["tensorboard"]}},
        )
        spec = shop.folder_of(job.id).read_spec()
        assert (spec.lora.rank, spec.lora.alpha, spec.lora.dropout, spec.lora.use_rslora) == (8, 16, 0.1, True)
        assert (spec.lora.target_modules, spec.max_length, spec.method) == ("q_proj,v_proj", 128, "supervised")
        options = spec.options
        assert (options.quantization, options.precision, options.train_on) == ("nf4", "f32", "all")
        assert (options.scheduler, options.warmup_ratio, options.weight_decay) == ("linear", 0, 0.01)
        assert (options.packing, options.early_stopping_patience, options.checkpoint_steps) == (True, 2, 10)
        assert spec.integrations == ({"type": "wandb", "wandb": WANDB}, {"type": "tensorboard"})
        said = EVERY_OPTION | {"lora_target_modules": "q_proj,v_proj", "tracking": ["tensorboard"]}
        again = await client.fine_tuning.jobs.retrieve(job.id)
        assert cast("Any", again).tunegate == cast("Any", job).tunegate == said
        assert again.integrations is not None and again.integrations[0].wandb.project == "lamps"
        await client.fine_tuning.jobs.cancel(job.id)


async def test_what_was_not_asked_for_is_shown_as_it_was_decided(
    tmp_path: Path, base: PreparedBase, engine: Engine
) -> None:
    async with open_workshop(tmp_path, base, engine, waits(tmp_path)) as shop, front_door(shop) as client:
        job = await ask(shop, client, method={"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.5}}})
        shown = cast("Any", job).tunegate
        assert (shown["lora_rank"], shown["lora_alpha"], shown["lora_target_modules"]) == (16, 32, "all-linear")
        assert (shown["precision"], shown["lr_scheduler"], shown["packing"]) == ("auto", "cosine", False)
        assert shown["max_length"] == engine.max_model_len and "checkpoint_steps" not in shown
        spec = shop.folder_of(job.id).read_spec()
        assert (spec.method, spec.hyperparameters.beta, spec.lora.rank) == ("dpo", 0.5, 16)
        assert job.method is not None and job.method.type == "dpo" and job.hyperparameters.n_epochs is None
        await client.fine_tuning.jobs.cancel(job.id)


async def test_a_job_that_an_earlier_version_kept_is_shown_with_what_is_known_of_it(
    tmp_path: Path, base: PreparedBase, engine: Engine
) -> None:
    async with open_workshop(tmp_path, base, engine, waits(tmp_path)) as shop, front_door(shop) as client:
        job = await ask(shop, client, extra_body={"tunegate": {"turns": "last"}})
        old = "UPDATE jobs SET options = NULL, integrations = NULL"
        await shop.store.write(lambda connection: connection.exec_driver_sql(old))
        again = await client.fine_tuning.jobs.retrieve(job.id)
        assert cast("Any", again).tunegate == {"turns": "last"} and again.integrations == []
        await client.fine_tuning.jobs.cancel(job.id)


async def test_what_the_server_has_no_package_for_is_refused_before_the_job_is_there(
    tmp_path: Path, base: PreparedBase, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as Python has it of what cannot be imported
    async with open_workshop(tmp_path, base, engine, waits(tmp_path)) as shop, front_door(shop) as client:
        error = await refused(ask(shop, client, extra_body={"tunegate": {"quantization": "nf4"}}))
        assert (error["status"], error["param"]) == (400, "tunegate.quantization")
        assert "bitsandbytes" in error["message"] and list(shop.data_dir.jobs.iterdir()) == []
        plain = await ask(shop, client, extra_body={"tunegate": {"quantization": "none"}})
        await client.fine_tuning.jobs.cancel(plain.id)


async def test_what_the_base_or_its_engine_cannot_do_is_refused_where_it_was_said(
    tmp_path: Path, base: PreparedBase, engine: Engine
) -> None:
    async with open_workshop(tmp_path, base, engine) as shop, front_door(shop) as client:
        beyond = await refused(ask(shop, client, extra_body={"tunegate": {"max_length": engine.max_model_len + 1}}))
        assert (beyond["status"], beyond["param"]) == (400, "tunegate.max_length")
        assert f"a context of {engine.max_model_len} tokens" in beyond["message"]
        modules = {"lora_target_modules": ["q_proj", "lm_head", "w1"]}
        method: Any = {"type": "supervised", "supervised": {"hyperparameters": modules}}
        unknown = await refused(ask(shop, client, method=method))
        assert unknown["param"] == "method.supervised.hyperparameters.lora_target_modules"
        assert "names lm_head, w1" in unknown["message"] and ", ".join(LINEAR) in unknown["message"]
        engine.max_lora_rank = 8
        try:
            high = await refused(ask(shop, client, extra_body={"tunegate": {"lora_rank": 9}}))
            least = await ask(shop, client, extra_body={"tunegate": {"lora_rank": 8}})
        finally:
            engine.max_lora_rank = None
        assert high["param"] == "tunegate.lora_rank" and "lora_rank of 8 or less" in high["message"]
        assert [path.name for path in shop.data_dir.jobs.iterdir()] == [least.id], "what was refused leaves no folder"
        await client.fine_tuning.jobs.cancel(least.id)


async def test_one_idempotency_key_stands_for_one_way_to_train(
    tmp_path: Path, base: PreparedBase, engine: Engine
) -> None:
    async with open_workshop(tmp_path, base, engine, waits(tmp_path)) as shop, front_door(shop) as client:
        jobs, file_id = client.fine_tuning.jobs, await shop.upload()
        wandb: Any = [{"type": "wandb", "wandb": {"project": "p"}}]

        async def again(**changes: Any) -> Any:
            same: dict[str, Any] = {"integrations": wandb, "extra_body": {"tunegate": {"lora_rank": 8}}}
            body = {"model": "tiny", "training_file": file_id, "extra_headers": {"Idempotency-Key": "one"}}
            return await jobs.create(**body | same | changes)

        job = await again()
        assert (await again()).id == job.id
        assert (await refused(again(integrations=[])))["param"] == "integrations"
        assert (await refused(again(extra_body={"tunegate": {"lora_rank": 4}})))["param"] == "tunegate"
        assert (await refused(again(extra_body={"tunegate": {"lora_rank": 8, "method": "kto"}})))["param"] == "method"
        await jobs.cancel(job.id)


async def test_a_base_whose_weights_cannot_be_read_has_no_list_to_be_held_against(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    assert linear_modules(PreparedBase("tiny", tmp_path, None, "", "x", 256, "x", (2,), hf=tmp_path)) is None
