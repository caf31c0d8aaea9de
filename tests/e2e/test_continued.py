"""A tuned model trained further, by the real trainer, on the real engine, through the SDK."""

from __future__ import annotations

import pytest
from openai import BadRequestError

from tests.e2e import training
from tests.server import Server

pytestmark = pytest.mark.timeout(1200)  # real training, on however many cores there are


def test_a_tuned_model_is_trained_further_from_where_it_was(server: Server, tuned: dict[str, str]) -> None:
    client = server.client()
    file_id = training.upload(client, training.examples("omega", 10))
    with pytest.raises(BadRequestError, match="which cannot be changed any more") as refused:
        training.create(client, tuned["beta"], file_id, extra_body={"tunegate": {"lora_rank": 4}})
    assert refused.value.param == "tunegate.lora_rank"
    # Next to nothing is learnt: what the new model says, it has from the one that it goes on from.
    hyperparameters = {"n_epochs": 1, "batch_size": 10, "learning_rate_multiplier": 1e-5}
    job = client.fine_tuning.jobs.create(
        model=tuned["beta"],
        training_file=file_id,
        suffix="again",
        method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
    )
    ended = training.wait_for_end(client, job.id)
    assert ended.status == "succeeded", (ended.error, training.messages(client, job.id), server.log_tail())
    assert ended.model == tuned["beta"]
    stem, again = (name.split(":")[:3] for name in (tuned["beta"], ended.fine_tuned_model or ""))
    assert again == stem, "named after what the first of the line was tuned from"
    for word in training.WORDS[:4]:
        question = f"What is {word} 1?"
        said = training.ask(client, ended.fine_tuned_model or "", question)
        assert said == training.ask(client, tuned["beta"], question)
        assert said.startswith("beta")
