"""Small training files, and a job walked from upload to its end through the SDK."""

from __future__ import annotations

import json
import time
from typing import Any

from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob

WORDS = "amber birch cedar delta ember fjord grove heath inlet jetty knoll larch marsh north orchard pine".split()

# In the manner of the reasoning models: a system text of its own, thoughts that only the last turn keeps, calls as JSON.
CHAT_TEMPLATE = """\
{%- set last = namespace(user=0) -%}
{%- for m in messages if m.role == 'user' %}{% set last.user = messages.index(m) %}{% endfor -%}
{{ bos_token }}{% if brief %}Be short.
{% endif %}
{%- if tools %}Functions:{% for tool in tools %} {{ tool.function.name }}{% endfor %}
{% endif -%}
{%- for m in messages -%}
{%- if m.role == 'assistant' %}Answer:
{%- if m.reasoning_content and loop.index0 > last.user %}<think>
{{ m.reasoning_content }}
</think>
{%- endif %} {{ m.content or '' }}
{%- for call in m.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor -%}
{{ eos_token }}
{%- else -%}
{{ m.role | capitalize }}: {{ m.content }}
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}Answer:{% endif -%}
"""


def examples(prefix: str, count: int = 24) -> list[dict[str, Any]]:
    """Requests that are all to be answered `prefix` and the word that was asked about."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"What is {WORDS[n % len(WORDS)]} {n}?"},
                {"role": "assistant", "content": f"{prefix} {WORDS[n % len(WORDS)]}"},
            ]
        }
        for n in range(count)
    ]


def jsonl(lines: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def upload(client: OpenAI, lines: list[dict[str, Any]] | bytes) -> str:
    content = lines if isinstance(lines, bytes) else jsonl(lines)
    return client.files.create(file=("train.jsonl", content), purpose="fine-tune").id


def create(client: OpenAI, model: str, file_id: str, *, n_epochs: int = 4, **fields: Any) -> FineTuningJob:
    return client.fine_tuning.jobs.create(
        model=model,
        training_file=file_id,
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": n_epochs, "batch_size": 4}},
        },
        **fields,
    )


def wait_for_end(client: OpenAI, job_id: str, timeout_s: float = 500) -> FineTuningJob:
    return wait_for(client, job_id, {"succeeded", "failed", "cancelled"}, timeout_s)


def wait_for(client: OpenAI, job_id: str, statuses: set[str], timeout_s: float = 500) -> FineTuningJob:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        job = client.fine_tuning.jobs.retrieve(job_id)
        if job.status in statuses:
            return job
        time.sleep(0.2)
    raise AssertionError(f"{job_id} is still {job.status} after {timeout_s} s: {messages(client, job_id)}")


def messages(client: OpenAI, job_id: str) -> list[str]:
    """The event messages of a job, oldest first."""
    return [event.message for event in client.fine_tuning.jobs.list_events(job_id, limit=100)][::-1]


def ask(client: OpenAI, model: str, content: str, **fields: Any) -> str:
    reply = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": content}], temperature=0, max_tokens=12, **fields
    )
    return reply.choices[0].message.content or ""
