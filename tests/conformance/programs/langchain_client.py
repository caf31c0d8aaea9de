"""langchain-openai: chat whole and streamed, a form held to, and the responses API, which newer versions start with."""

import os
from typing import Literal

from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class Answer(BaseModel):
    place: Literal["Paris", "Rome"]


model = os.environ["MODEL"]
chat = ChatOpenAI(model=model, temperature=0, max_tokens=40)
whole = chat.invoke("Repeat after me: hello.")
assert whole.content and whole.usage_metadata["output_tokens"] > 0, whole
streamed = list(chat.stream("Repeat after me: hello."))
assert "".join(chunk.content for chunk in streamed) == whole.content, streamed
answer = ChatOpenAI(model=model).with_structured_output(Answer, method="json_schema").invoke("Name a place.")
assert answer.place in ("Paris", "Rome"), answer
responses = ChatOpenAI(model=model, temperature=0, max_tokens=40, use_responses_api=True)
assert responses.invoke("Repeat after me: hello.").text == whole.content
assert "".join(chunk.text for chunk in responses.stream("Repeat after me: hello.")) == whole.content
