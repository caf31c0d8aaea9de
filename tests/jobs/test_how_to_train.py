"""Methods, options and integrations as clients ask for them: what is taken, what is refused, and what the SDK is told. Pure."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, fields
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.fine_tuning import FineTuningJob

from gateway.errors import RequestError
from gateway.jobdir import Lora, Options
from gateway.jobs.options import LORA_FIELDS, OPTION_FIELDS
from gateway.wire.fine_tuning import job_object, parse_create
from gateway.wire.training_options import OPTIONS
from tests.jobs.test_wire import AUTO, JOB, MINIMAL

INNER = "method.supervised.hyperparameters"
WANDB = {"project": "lamps", "name": "first", "entity": "home", "tags": ["a", "b"]}
EVERY_OPTION = {
    "lora_rank": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.1,
    "lora_target_modules": ["v_proj", "q_proj", "q_proj"],
    "use_rslora": True,
    "quantization": "nf4",
    "precision": "f32",
    "max_length": 128,
    "train_on": "all",
    "packing": True,
    "lr_scheduler": "linear",
    "warmup_ratio": 0,
    "weight_decay": 0.01,
    "early_stopping_patience": 2,
    "checkpoint_steps": 10,
}


def supervised(**hyperparameters: Any) -> dict[str, Any]:
    return {"method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}}


def dpo(**hyperparameters: Any) -> dict[str, Any]:
    return {"method": {"type": "dpo", "dpo": {"hyperparameters": hyperparameters}}}


def refusal(**body: Any) -> RequestError:
    with pytest.raises(RequestError) as refused:
        parse_create(MINIMAL | body)
    assert refused.value.status == 400 and len(refused.value.message) < 400
    return refused.value


def test_dpo_is_asked_for_as_openai_does() -> None:
    how = parse_create(MINIMAL | dpo(beta=0.2, n_epochs=2)).how
    assert (how.method, how.options) == ("dpo", {})
    assert how.hyperparameters == AUTO | {"beta": 0.2, "n_epochs": 2}
    assert parse_create({**MINIMAL, "method": {"type": "dpo"}}).how.hyperparameters == AUTO | {"beta": "auto"}
    older = {**MINIMAL, "method": {"type": "dpo"}, "hyperparameters": {"n_epochs": 7}}
    assert parse_create(older).how.hyperparameters["n_epochs"] == 7


@pytest.mark.parametrize("variant", ["kto", "orpo"])
def test_kto_and_orpo_are_asked_for_beside_openais_method(variant: str) -> None:
    for method in ({}, {"method": None}, {"method": {"type": "dpo"}}):
        how = parse_create(MINIMAL | method | {"tunegate": {"method": variant}}).how
        assert (how.method, how.hyperparameters["beta"]) == (variant, "auto")
    how = parse_create(MINIMAL | dpo(beta=2, lora_rank=4) | {"tunegate": {"method": variant}}).how
    assert (how.hyperparameters["beta"], how.options) == (2.0, {"lora_rank": 4})


def test_only_the_block_that_the_type_names_is_read() -> None:
    """The SDK's own tests send all of them, and another's may hold anything."""
    nonsense = {"hyperparameters": {"n_epochs": -1}, "x": 1}
    how = parse_create({**MINIMAL, "method": {"type": "supervised", "dpo": nonsense, "reinforcement": nonsense}}).how
    assert how.method == "supervised"
    how = parse_create({**MINIMAL, "method": {"type": "dpo", "supervised": nonsense, "reinforcement": 5}}).how
    assert how.method == "dpo"


def test_every_option_is_taken_in_both_places_and_kept_as_job_json_has_it() -> None:
    validation = {"validation_file": "file-2"}
    kept = EVERY_OPTION | {"lora_target_modules": "q_proj,v_proj", "warmup_ratio": 0.0}
    inside = parse_create(MINIMAL | validation | supervised(**EVERY_OPTION)).how
    beside = parse_create(MINIMAL | validation | {"tunegate": EVERY_OPTION}).how
    both = parse_create(MINIMAL | validation | supervised(**EVERY_OPTION) | {"tunegate": EVERY_OPTION}).how
    assert inside.options == beside.options == both.options == kept
    assert inside.places["packing"] == f"{INNER}.packing" and beside.places["packing"] == "tunegate.packing"
    assert set(kept) == set(OPTIONS), "each option is tried here"
    nulls = dict.fromkeys([*OPTIONS, "method", "tracking", "turns", "chat_template_kwargs"])
    assert parse_create(MINIMAL | {"tunegate": nulls}) == parse_create(MINIMAL)


def test_every_option_has_its_place_in_job_json() -> None:
    assert set(OPTIONS) == {*LORA_FIELDS, *OPTION_FIELDS, "max_length"}
    assert set(LORA_FIELDS.values()) == {field.name for field in fields(Lora)}
    assert set(OPTION_FIELDS.values()) == {field.name for field in fields(Options)}


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("lora_rank", [0, 513, 8.0, True, "8"]),
        ("lora_alpha", [0, 4097, 0.5]),
        ("lora_dropout", [-0.1, 1, math.nan, "0"]),
        ("lora_target_modules", ["", [], "q proj", ["a.b"], [1], ["x" * 101], ["a"] * 65, {}, "a," * 70]),
        ("use_rslora", [1, "yes"]),
        ("quantization", ["q4", 4, ["nf4"]]),
        ("precision", ["float32", "int8"]),
        ("max_length", [15, 2**25]),
        ("train_on", ["user"]),
        ("packing", ["false"]),
        ("lr_scheduler", ["polynomial"]),
        ("warmup_ratio", [-1, 1.01, math.inf]),
        ("weight_decay", [-0.01, 2]),
        ("early_stopping_patience", [0, 1001]),
        ("checkpoint_steps", [0, 1_000_001]),
    ],
)
def test_what_is_out_of_bounds_is_refused_in_either_place(name: str, values: list[Any]) -> None:
    for value in values:
        assert refusal(**supervised(**{name: value})).param == f"{INNER}.{name}"
        error = refusal(tunegate={name: value})
        assert error.param == f"tunegate.{name}" and "it must be" in error.message
    assert name in OPTIONS


@pytest.mark.parametrize("beta", [0, -1, 2.01, "high", True, math.nan])
def test_beta_is_above_0_and_at_most_2(beta: Any) -> None:
    error = refusal(**dpo(beta=beta))
    assert error.param == "method.dpo.hyperparameters.beta"
    assert "'auto' or a number greater than 0 and at most 2" in error.message


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"method": {"type": "reinforcement", "reinforcement": {"grader": {}}}}, "method.type"),
        ({"method": {"type": "kto"}}, "method.type"),
        ({"method": {"type": "dpo", "kto": {}}}, "method.kto"),
        ({"method": {"type": "dpo", "dpo": []}}, "method.dpo"),
        ({"method": {"type": "dpo", "dpo": {"hyperparameters": 1}}}, "method.dpo.hyperparameters"),
        ({"tunegate": {"method": "dpo"}}, "tunegate.method"),
        ({"tunegate": {"method": ["kto"]}}, "tunegate.method"),
        ({"tunegate": {"method": "kto"}, "method": {"type": "supervised"}}, "tunegate.method"),
        ({"tunegate": {"rank": 8}}, "tunegate.rank"),
        ({"hyperparameters": {"lora_rank": 8}}, "hyperparameters.lora_rank"),
        (supervised(beta=0.1), f"{INNER}.beta"),
        ({"tunegate": {"method": "kto"}, "hyperparameters": {"beta": 0.1}}, "hyperparameters.beta"),
        (supervised(lora_rank=8) | {"tunegate": {"lora_rank": 16}}, "tunegate.lora_rank"),
        (dpo(packing=True), "method.dpo.hyperparameters.packing"),
        ({"tunegate": {"method": "orpo", "packing": True}}, "tunegate.packing"),
        ({"tunegate": {"method": "kto", "train_on": "all"}}, "tunegate.train_on"),
        ({"tunegate": {"method": "kto", "turns": "last"}}, "tunegate.turns"),
        ({"tunegate": {"train_on": "all", "turns": "last"}}, "tunegate.train_on"),
        ({"tunegate": {"early_stopping_patience": 2}}, "tunegate.early_stopping_patience"),
        (supervised(early_stopping_patience=2), f"{INNER}.early_stopping_patience"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    assert refusal(**body).param == param


def test_what_is_off_may_be_said_with_every_method() -> None:
    how = parse_create(MINIMAL | {"tunegate": {"method": "kto", "packing": False, "train_on": "assistant"}}).how
    assert how.options == {"packing": False, "train_on": "assistant"}


def test_integrations_are_kept_for_the_trainer() -> None:
    wandb = {"type": "wandb", "wandb": WANDB}
    asked = parse_create({**MINIMAL, "integrations": [wandb], "tunegate": {"tracking": ["mlflow", "tensorboard"]}})
    assert asked.integrations == (wandb, {"type": "mlflow"}, {"type": "tensorboard"})
    least = parse_create({**MINIMAL, "integrations": [{"type": "wandb", "wandb": {"project": "p"}}]})
    assert least.integrations[0]["wandb"] == {"project": "p", "name": None, "entity": None, "tags": []}
    assert parse_create({**MINIMAL, "integrations": []}).integrations == ()


@pytest.mark.parametrize(
    ("item", "param"),
    [
        ("wandb", "integrations[0]"),
        ({}, "integrations[0].type"),
        ({"type": "mlflow"}, "integrations[0].type"),
        ({"type": "wandb"}, "integrations[0].wandb"),
        ({"type": "wandb", "wandb": {}}, "integrations[0].wandb.project"),
        ({"type": "wandb", "wandb": {"project": "a/b"}}, "integrations[0].wandb.project"),
        ({"type": "wandb", "wandb": {"project": "x" * 129}}, "integrations[0].wandb.project"),
        ({"type": "wandb", "wandb": {"project": "p", "name": 1}}, "integrations[0].wandb.name"),
        ({"type": "wandb", "wandb": {"project": "p", "entity": "a\nb"}}, "integrations[0].wandb.entity"),
        ({"type": "wandb", "wandb": {"project": "p", "tags": "a"}}, "integrations[0].wandb.tags"),
        ({"type": "wandb", "wandb": {"project": "p", "tags": [""]}}, "integrations[0].wandb.tags"),
        ({"type": "wandb", "wandb": {"project": "p", "tags": ["\0"]}}, "integrations[0].wandb.tags"),
        ({"type": "wandb", "wandb": {"project": "p", "tags": ["a"] * 33}}, "integrations[0].wandb.tags"),
        ({"type": "wandb", "wandb": {"project": "p", "api_key": "s3cret"}}, "integrations[0].wandb.api_key"),
    ],
)
def test_a_bad_integration_is_refused_by_name(item: Any, param: str) -> None:
    error = refusal(integrations=[item])
    assert error.param == param and "s3cret" not in error.message


def test_what_else_cannot_be_told_of_the_training_is_refused() -> None:
    assert refusal(integrations=[{"type": "wandb", "wandb": WANDB}] * 6).param == "integrations"
    for tracking in ("mlflow", ["wandb"], [1], {}):
        assert refusal(tunegate={"tracking": tracking}).param == "tunegate.tracking"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
NAMES = ["type", "supervised", "dpo", "hyperparameters", "wandb", "project", "tags", "tracking", "beta", *OPTIONS]
NEARLY = st.recursive(
    JSON | st.sampled_from(["dpo", "supervised", "wandb", "kto", "auto", "all", "none", 1, 0.5, True]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from([*NAMES, "method"]), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=200, derandomize=True, database=None, deadline=None)
@given(body=st.dictionaries(st.sampled_from(["method", "hyperparameters", "integrations", "tunegate"]), NEARLY))
def test_whatever_is_sent_is_taken_or_refused_by_name_and_never_a_fault_of_ours(body: dict[str, Any]) -> None:
    try:
        asked = parse_create(MINIMAL | body)
    except RequestError as error:
        assert error.param and error.param.partition(".")[0].partition("[")[0] in body
    else:
        assert json.loads(json.dumps(asdict(asked.how))) == asdict(asked.how), "what is taken can be kept as JSON"


def shown(**changes: Any) -> tuple[FineTuningJob, dict[str, Any]]:
    raw = job_object(type(JOB)(**{**vars(JOB), **changes}), "local")
    return FineTuningJob.model_validate(raw, strict=True), raw


@pytest.mark.parametrize("method", ["dpo", "kto", "orpo"])
def test_a_job_on_preferences_is_shown_as_dpo(method: str) -> None:
    asked = AUTO | {"beta": "auto"}
    job, raw = shown(method=method, hyperparameters=asked)
    assert raw["hyperparameters"] == {} and raw["method"] == {"type": "dpo", "dpo": {"hyperparameters": asked}}
    assert raw["tunegate"].get("method") == (None if method == "dpo" else method)
    check = {"error": None, "n_epochs": 1, "batch_size": 8, "learning_rate_multiplier": 0.5, "beta": 0.1}
    job, raw = shown(method=method, hyperparameters=asked, check=check)
    assert job.method is not None and job.method.dpo is not None and job.method.dpo.hyperparameters is not None
    assert job.method.dpo.hyperparameters.beta == 0.1 and job.method.supervised is None


def test_the_sdk_is_shown_the_integrations_that_it_knows() -> None:
    job, raw = shown(integrations=({"type": "wandb", "wandb": WANDB}, {"type": "mlflow"}))
    assert job.integrations is not None and [item.wandb.model_dump() for item in job.integrations] == [WANDB]
    assert raw["tunegate"]["tracking"] == ["mlflow"]


def test_an_estimate_is_shown_until_the_job_is_over_or_paused() -> None:
    for status in ("validating_files", "queued", "running"):
        assert shown(status=status, estimated_finish=9)[0].estimated_finish == 9
    assert shown(status="queued", pause="paused", estimated_finish=9)[0].estimated_finish is None
    assert shown(status="cancelled", estimated_finish=9)[0].estimated_finish is None
