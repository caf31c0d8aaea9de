"""The frames of a stream as bytes."""

from __future__ import annotations

import orjson
import pytest

from gateway.llama_worker.fields import Limits
from gateway.llama_worker.scoring import Score
from gateway.llama_worker.wire import Choice, Reply, parse_completion

LIMITS = Limits(64, 4, 100)
CHOICE = {"text": "", "logprobs": None, "finish_reason": None, "stop_reason": None}


def reply(**fields: object) -> Reply:
    return Reply("cmpl-1", parse_completion({"model": 'a "base"', "prompt": [1], "stream": True, **fields}, LIMITS))


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (Choice(2, [77], []), {**CHOICE, "index": 2, "token_ids": [77]}),
        (Choice(0, [7, 8], []), {**CHOICE, "index": 0, "token_ids": [7, 8]}),
        (Choice(0, [7], [], "length"), {**CHOICE, "index": 0, "token_ids": [7], "finish_reason": "length"}),
        (
            Choice(1, [7], [], "stop", 7),
            {**CHOICE, "index": 1, "token_ids": [7], "finish_reason": "stop", "stop_reason": 7},
        ),
    ],
)
def test_a_frame_holds_what_one_step_gave_one_choice(choice: Choice, expected: dict[str, object]) -> None:
    frame = reply().frame(choice)

    assert frame.startswith(b"data: ") and frame.endswith(b"\n\n")
    body = orjson.loads(frame[6:])
    created = body.pop("created")
    assert type(created) is int
    assert body == {"id": "cmpl-1", "object": "text_completion", "model": 'a "base"', "choices": [expected]}


def test_frames_carry_the_log_probabilities_that_were_asked_for() -> None:
    body = orjson.loads(reply(logprobs=1).frame(Choice(0, [7], [Score(7, -0.5, 1, [(7, -0.5)])]))[6:])

    assert body["choices"][0]["logprobs"]["token_logprobs"] == [-0.5]
