"""What a file trains, line by line: `python -m trainer.preview --bundle DIR --file FILE --max-length N [--limit N]`.

    {"line": 1, "n_tokens", "n_trained_tokens", "truncated", "sequences": [{"runs": [{"text", "trained", …}], …}]}
    {"line": 2, "problem": {"message", "field"}}
    {"summary": {…}}

Place in the flow: before a job, by hand or from the gateway. One rule: the very reading, checking and rendering that a job
does; only the first `limit` lines are shown, but all are counted, until the time is up. No torch.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Iterator, Set
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from gateway.chat.bundle import TEMPLATE_FILE, TOKENIZER_FILE, Bundle
from gateway.chat.render import IGNORED, TrainingSequence
from gateway.chat.tokenizer import Tokenizer
from gateway.jobdir import Hyperparameters, Turns
from trainer.check import resolve
from trainer.dataset import MIN_EXAMPLES, Survey, render_line
from trainer.jsonl import BadLine, read_jsonl

PROBLEMS_SHOWN = 200
_FIELDS = ("role", "content", "weight", "tool_calls", "tool_call_id", "function_call", "tools", "functions", "messages")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer.preview", description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, required=True, help="a folder with template.json and tokenizer.json")
    parser.add_argument("--file", type=Path, required=True, help="a training file (JSON lines)")
    parser.add_argument("--max-length", type=int, required=True, help="tokens that the model is trained on at once")
    parser.add_argument("--limit", type=int, default=20, help="lines to show; the others are only counted")
    parser.add_argument("--timeout-s", type=float, default=math.inf, help="when to stop reading")
    parser.add_argument("--turns", choices=("all", "last"), default="all", help="which of the assistant's are learnt")
    options = parser.parse_args(arguments)
    bundle = Bundle.from_files({name: (options.bundle / name).read_bytes() for name in (TEMPLATE_FILE, TOKENIZER_FILE)})
    for found in preview(options.file, bundle, options.max_length, options.limit, options.timeout_s, options.turns):
        print(json.dumps(found), flush=True)
    return 0


def preview(
    file: Path, bundle: Bundle, max_length: int, limit: int, timeout_s: float = math.inf, turns: Turns = "all"
) -> Iterator[dict[str, Any]]:
    """The first lines and every problem (up to a bound) as dicts, then the summary."""
    deadline = time.monotonic() + timeout_s
    survey, shown, complete = Survey(), 0, True
    for line in read_jsonl(file):
        if time.monotonic() > deadline:
            complete = False
            break
        found = render_line(line, bundle, max_length, turns)
        if isinstance(found, BadLine):
            survey.n_problems += 1
            if survey.n_problems <= PROBLEMS_SHOWN:
                yield {"line": found.number, "problem": {"message": found.reason, "field": _field(found.reason)}}
            continue
        survey.add(found)
        if shown < limit and not isinstance(line, BadLine):
            shown += 1
            yield {"line": line[0], **_example(found, bundle)}
    yield {"summary": _summary(survey, max_length, complete)}


def _field(reason: str) -> str | None:
    """Where in the line the problem is, as a path: its messages are counted from 1 in what is said, from 0 in a path."""
    field = next((name for name in _FIELDS if re.search(rf"\b{name}\b", reason)), None)
    if found := re.match(r"message (\d+)\b", reason):
        return f"messages[{int(found[1]) - 1}]" + (f".{field}" if field and field != "messages" else "")
    if found := re.match(r"messages\[(\d+)\]", reason):
        return found[0]
    return field


def _example(sequences: list[TrainingSequence], bundle: Bundle) -> dict[str, Any]:
    tokenizer = bundle.tokenizer
    controls = {tokenizer.added_ids[name] for name in bundle.controls.names}
    shown = [
        {
            "n_tokens": len(sequence.ids),
            "n_trained_tokens": _n_trained(sequence),
            "truncated": sequence.truncated,
            "runs": _runs(sequence, tokenizer, controls),
        }
        for sequence in sequences
    ]
    return {
        "n_tokens": sum(sequence["n_tokens"] for sequence in shown),
        "n_trained_tokens": sum(sequence["n_trained_tokens"] for sequence in shown),
        "truncated": any(sequence["truncated"] for sequence in shown),
        "sequences": shown,
    }


def _runs(sequence: TrainingSequence, tokenizer: Tokenizer, controls: Set[int]) -> list[dict[str, Any]]:
    """Neighbouring tokens alike: trained or not, control token or text."""
    runs = []
    pairs = zip(sequence.ids, sequence.labels, strict=True)
    alike = groupby(pairs, key=lambda pair: (pair[1] != IGNORED, pair[0] in controls))
    for (trained, control), tokens in alike:
        ids = [token_id for token_id, _ in tokens]
        text = b"".join(map(tokenizer.token_bytes, ids)).decode(errors="replace")
        runs.append({"text": text, "trained": trained, "control": control, "n_tokens": len(ids)})
    return runs


def _n_trained(sequence: TrainingSequence) -> int:
    return len(sequence.labels) - sequence.labels.count(IGNORED)


def _summary(survey: Survey, max_length: int, complete: bool) -> dict[str, Any]:
    """Counts, and what a job with every hyperparameter "auto" would do with the file."""
    counts = {name: value for name, value in asdict(survey).items() if name.startswith("n_")}
    error = None if survey.n_problems else survey.error("training", MIN_EXAMPLES)
    n_epochs, batch_size, _ = resolve(Hyperparameters(), survey.n_examples)
    return counts | {
        "complete": complete,
        "max_length": max_length,
        "error": error.message if error else None,
        "n_epochs": n_epochs,
        "batch_size": batch_size,
        "total_steps": n_epochs * math.ceil(survey.n_examples / batch_size),
    }


if __name__ == "__main__":
    sys.exit(main())
