"""The SDK of 1.x: what programs of that time did, from a file to a job, and chat as it was then."""

import os

import openai
from openai import OpenAI

assert openai.__version__.startswith("1."), openai.__version__
client, model = OpenAI(max_retries=0), os.environ["MODEL"]
messages = [{"role": "user", "content": "Repeat after me: hello."}]
whole = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=40)
text = whole.choices[0].message.content
stream = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=40, stream=True)
assert text and "".join(chunk.choices[0].delta.content or "" for chunk in stream) == text
assert client.completions.create(model=model, prompt="hello", max_tokens=5).usage.completion_tokens <= 5
assert len(client.embeddings.create(model="text-embedding-3-small", input="one").data[0].embedding) == 64
assert (
    client.responses.create(
        model=model, input="Repeat after me: hello.", temperature=0, max_output_tokens=40
    ).output_text
    == text
)
line = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
file = client.files.create(file=("few.jsonl", line), purpose="fine-tune")
job = client.fine_tuning.jobs.create(training_file=file.id, model="gpt-4o-mini")
assert client.fine_tuning.jobs.cancel(job.id).status in ("cancelled", "failed")
assert client.fine_tuning.jobs.list_events(job.id).data
assert model in [found.id for found in client.models.list()]
try:
    client.chat.completions.create(model="nobody", messages=messages)
except openai.NotFoundError as error:
    assert error.code == "model_not_found"
else:
    raise AssertionError("an unknown model was answered for")
