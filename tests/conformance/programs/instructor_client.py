"""instructor: a typed reply, held to its schema by the server."""

import os
from typing import Literal

import instructor
from openai import OpenAI
from pydantic import BaseModel


class Answer(BaseModel):
    place: Literal["Paris", "Rome"]
    sunny: bool


client = instructor.from_openai(OpenAI(), mode=instructor.Mode.JSON_SCHEMA)
answer = client.chat.completions.create(
    model=os.environ["MODEL"], response_model=Answer, messages=[{"role": "user", "content": "Where, and is it sunny?"}]
)
assert answer.place in ("Paris", "Rome") and answer.sunny in (True, False), answer
