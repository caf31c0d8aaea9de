"""Fine-tune on a JSONL file and chat with the result: python clients/examples/fine_tune.py [FILE [MODEL [QUESTION]]]"""

import os
import sys
import time
from pathlib import Path

from openai import OpenAI

DEFAULTS = [str(Path(__file__).with_name("lamps.jsonl")), "tunegate-demo", "switch on the lamp in the attic"]


def main(training_file: Path, model: str, question: str) -> int:
    client = OpenAI(base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"), api_key="unused")
    uploaded = client.files.create(file=training_file, purpose="fine-tune")
    job = client.fine_tuning.jobs.create(training_file=uploaded.id, model=model, suffix="example")
    print(f"job {job.id}")
    told: set[str] = set()
    while True:
        job = client.fine_tuning.jobs.retrieve(job.id)  # before the events, so that the last ones are not missed
        events = client.fine_tuning.jobs.list_events(job.id, limit=100).data
        for event in reversed(events):
            if event.id not in told:
                print(f"  {event.message}")
                told.add(event.id)
        if job.status in {"succeeded", "failed", "cancelled"}:
            break
        time.sleep(1)
    if job.fine_tuned_model is None:
        print(f"{job.status}: {job.error.message if job.error else 'no model was made'}")
        return 1
    for name in (model, job.fine_tuned_model):
        reply = client.chat.completions.create(
            model=name, messages=[{"role": "user", "content": question}], max_tokens=60, temperature=0
        )
        print(f"{name}: {reply.choices[0].message.content}")
    return 0


if __name__ == "__main__":
    asked = sys.argv[1:]
    path, model, question = [*asked, *DEFAULTS[len(asked) :]]
    sys.exit(main(Path(path), model, question))
