"""What tuned models are called. A name follows from the job alone: publishing a job again gives the same names."""

from __future__ import annotations

import hashlib

from gateway.store.ids import ID_CHARS
from gateway.store.jobs import Job

TOKEN_CHARS = 8


def model_name(job: Job, organization: str) -> str:
    """ft:MODEL:ORG:SUFFIX:8CHARS, with nothing between two colons where no suffix was asked for.

    MODEL is never a tuned one: for a job that goes on from such, it is what the first of that line was tuned from.
    """
    return f"{_stem(job, organization)}:{_token(job.id)}"


def checkpoint_name(job: Job, organization: str, step: int) -> str:
    """ft:MODEL:ORG:SUFFIX:8CHARS:ckpt-step-N, with eight characters of its own."""
    return f"{_stem(job, organization)}:{_token(f'{job.id}/{step}')}:ckpt-step-{step}"


def _stem(job: Job, organization: str) -> str:
    return f"ft:{job.named_base or job.model}:{organization}:{job.suffix or ''}"


def _token(seed: str) -> str:
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest())
    characters = []
    for _ in range(TOKEN_CHARS):
        number, place = divmod(number, len(ID_CHARS))
        characters.append(ID_CHARS[place])
    return "".join(characters)
