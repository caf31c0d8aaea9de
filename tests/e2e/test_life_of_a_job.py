"""The unmodified SDK, in its strict mode, walks a job's whole life on real parts; nothing here is a fake."""

from __future__ import annotations

import asyncio
import csv
import io

import pytest
from openai import AsyncOpenAI, BadRequestError, NotFoundError

from tests.conftest import ALIAS
from tests.e2e import training
from tests.server import Server

pytestmark = pytest.mark.timeout(1200)  # real training, on however many cores there are


@pytest.mark.parametrize("base", ["tunegate-demo", ALIAS])
def test_the_sdk_walks_the_whole_life_of_a_job(server: Server, base: str) -> None:
    client = server.client()
    content = training.jsonl(training.examples("gamma"))
    file = client.files.create(file=("train.jsonl", content), purpose="fine-tune")
    assert file.status == "processed"
    assert client.files.content(file.id).read() == content
    validation = training.upload(client, training.examples("gamma", 12))

    job = training.create(
        client, base, file.id, suffix="life", seed=7, validation_file=validation, metadata={"team": "a"}, n_epochs=3
    )
    assert job.status == "validating_files"
    assert job.error is None
    assert job.fine_tuned_model is None
    assert job.seed == 7
    assert job.metadata == {"team": "a"}

    ended = training.wait_for_end(client, job.id)
    assert ended.status == "succeeded", (ended.error, training.messages(client, job.id))
    assert ended.fine_tuned_model is not None
    assert ended.fine_tuned_model.startswith(f"ft:{base}:local:life:")
    assert ended.trained_tokens is not None
    assert ended.trained_tokens > 0
    assert ended.finished_at is not None
    assert ended.finished_at >= ended.created_at
    assert ended.method is not None
    assert ended.method.supervised is not None
    hyperparameters = ended.method.supervised.hyperparameters
    assert hyperparameters is not None
    assert (hyperparameters.n_epochs, hyperparameters.batch_size) == (3, 4)
    assert isinstance(hyperparameters.learning_rate_multiplier, float | int), "auto was resolved and written back"

    said = training.messages(client, job.id)
    expected = [
        f"Created fine-tuning job: {job.id}",
        f"Validating training file: {file.id} and validation file: {validation}",
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
        f"New fine-tuned model created: {ended.fine_tuned_model}",
        "The job has successfully completed",
    ]
    assert [message for message in said if message in expected] == expected
    metrics = [event for event in client.fine_tuning.jobs.list_events(job.id, limit=100) if event.type == "metrics"]
    assert len(metrics) == 18, "24 examples in batches of 4, three times"
    assert len({event.id for event in metrics}) == 18
    final = client.fine_tuning.jobs.list_events(job.id, limit=100).data
    assert final[0].message == "The job has successfully completed", "newest first"

    checkpoints = client.fine_tuning.jobs.checkpoints.list(job.id).data
    assert [checkpoint.step_number for checkpoint in checkpoints] == [18, 12, 6]
    assert all(checkpoint.metrics.train_loss is not None for checkpoint in checkpoints)
    assert all(checkpoint.metrics.full_valid_loss is not None for checkpoint in checkpoints)

    (result_id,) = ended.result_files
    rows = list(csv.DictReader(io.StringIO(client.files.content(result_id).text)))
    assert list(rows[0]) == ["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"]
    assert [int(row["step"]) for row in rows] == list(range(1, 19))
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])

    tuned = ended.fine_tuned_model
    whole = training.ask(client, tuned, "What is cedar 2?")
    stream = client.chat.completions.create(
        model=tuned,
        messages=[{"role": "user", "content": "What is cedar 2?"}],
        temperature=0,
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole
    assert chunks[-1].usage is not None
    assert whole != training.ask(client, base, "What is cedar 2?")
    for checkpoint in checkpoints:
        assert isinstance(training.ask(client, checkpoint.fine_tuned_model_checkpoint, "What is cedar 2?"), str)

    assert tuned in [model.id for model in client.models.list()]
    assert client.models.retrieve(tuned).owned_by
    assert client.models.delete(tuned).deleted
    assert tuned not in [model.id for model in client.models.list()]
    with pytest.raises(NotFoundError):
        training.ask(client, tuned, "What is cedar 2?")
    assert client.models.delete(tuned).deleted  # as often as one likes
    with pytest.raises(NotFoundError):
        client.models.delete("ft:nobody::0")
    assert client.fine_tuning.jobs.retrieve(job.id).status == "succeeded"
    assert client.files.delete(file.id).deleted
    with pytest.raises(NotFoundError):
        client.files.retrieve(file.id)


def test_a_running_job_is_cancelled_and_stays_cancelled(server: Server) -> None:
    client = server.client()
    file_id = training.upload(client, training.examples("delta"))
    job = training.create(client, "tunegate-demo", file_id, n_epochs=50)
    training.wait_for(client, job.id, {"running"})
    cancelled = client.fine_tuning.jobs.cancel(job.id)
    assert cancelled.status == "cancelled"
    assert cancelled.finished_at is not None
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    after = training.create(client, "tunegate-demo", file_id, n_epochs=1)
    assert training.wait_for_end(client, after.id).status == "succeeded"
    ended = client.fine_tuning.jobs.retrieve(job.id)
    assert (ended.status, ended.fine_tuned_model) == ("cancelled", None)
    with pytest.raises(BadRequestError):
        client.fine_tuning.jobs.cancel(after.id)


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (training.jsonl(training.examples("x", 9)), "invalid_n_examples", "9 example(s), but must have at least 10"),
        (training.jsonl(training.examples("x", 12)) + b'{"messages": [\n', "invalid_training_file", "13"),
        (
            training.jsonl(
                [*training.examples("x", 12), {"messages": [{"role": "user", "content": "nobody answers"}]}]
            ),
            "invalid_training_file",
            "assistant",
        ),
    ],
)
def test_a_bad_training_file_fails_its_job_and_says_where(
    server: Server, content: bytes, code: str, words: str
) -> None:
    client = server.client()
    job = training.create(client, "tunegate-demo", training.upload(client, content))
    ended = training.wait_for_end(client, job.id)
    assert ended.status == "failed"
    assert ended.error is not None
    assert (ended.error.code, ended.error.param) == (code, "training_file")
    assert words in ended.error.message


def test_tuned_models_answer_as_they_were_trained_and_never_mix(server: Server, tuned: dict[str, str]) -> None:
    """Chats in flight with two adapters and the base: each equals what it gives alone."""
    client = server.client()
    questions = [f"What is {word} {n}?" for n, word in enumerate(training.WORDS[:6])]
    models = ["tunegate-demo", *tuned.values()]
    alone = {(model, question): training.ask(client, model, question) for model in models for question in questions}
    for prefix, model in tuned.items():
        assert all(alone[model, question].startswith(prefix) for question in questions), alone

    async def together() -> dict[tuple[str, str], str]:
        async with AsyncOpenAI(base_url=server.base_url, api_key="unused", max_retries=0) as sdk:

            async def one(model: str, question: str) -> str:
                stream = await sdk.chat.completions.create(
                    model=model,
                    messages=[{"role": "user", "content": question}],
                    temperature=0,
                    max_tokens=12,
                    stream=True,
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            replies = await asyncio.gather(*(one(model, question) for model, question in alone))
        return dict(zip(alone, replies, strict=True))

    assert asyncio.run(together()) == alone
