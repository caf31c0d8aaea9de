"""What a file trains, line by line: `python -m trainer.preview --bundle DIR --file FILE --max-length N [--limit N]`.

    {"line": 1, "n_tokens", "n_trained_tokens", "truncated", "sequences": [{"runs": [{"text", "trained", …}], …}]}
    {"line": 2, …, "sequences": [{"part": "chosen", …}, {"part": "rejected", …}]}
    {"line": 3, "problem": {"message", "field"}}
    {"summary": {"form", "method", …}}

A line of a JSON list has an "item" beside the line that it begins on; one that is split is shown once for each piece, one
that is dropped as {"line": 4, "dropped": true}.

Place in the flow: before a job, by hand or from the gateway. One rule: the very reading, checking and rendering that a job
does; only the first `limit` lines are shown, but all are counted, until the time is up. No torch.
"""

from __future__ import annotations

import argparse
import json
import math
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
from gateway.jobdir import Hyperparameters
from trainer.auto import resolve
from trainer.data.dataset import file_form
from trainer.data.forms import Form
from trainer.data.jsonl import read_lines
from trainer.data.lines import BadLine, Line
from trainer.data.rendering import Conversation, Renderer, Rendering
from trainer.data.survey import MIN_EXAMPLES, Survey

PROBLEMS_SHOWN = 200


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer.preview", description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, required=True, help="a folder with template.json and tokenizer.json")
    parser.add_argument("--file", type=Path, required=True, help="a training file (JSON lines)")
    parser.add_argument("--max-length", type=int, required=True, help="tokens that the model is trained on at once")
    parser.add_argument("--limit", type=int, default=20, help="lines to show; the others are only counted")
    parser.add_argument("--timeout-s", type=float, default=math.inf, help="when to stop reading")
    parser.add_argument("--turns", choices=("all", "last"), default="all", help="which of the assistant's are learnt")
    parser.add_argument("--train-on", choices=("assistant", "all"), default="assistant", help="all: the prompts, too")
    options = parser.parse_args(arguments)
    bundle = Bundle.from_files({name: (options.bundle / name).read_bytes() for name in (TEMPLATE_FILE, TOKENIZER_FILE)})
    how = Rendering(bundle, options.max_length, options.turns, options.train_on)
    for found in preview(options.file, how, options.limit, options.timeout_s):
        print(json.dumps(found), flush=True)
    return 0


def preview(file: Path, how: Rendering, limit: int, timeout_s: float = math.inf) -> Iterator[dict[str, Any]]:
    """The first lines and every problem (up to a bound) as dicts, then the summary. The file's form tells the method."""
    deadline = time.monotonic() + timeout_s
    form = file_form(file)
    renderer, survey, shown, complete = Renderer(how, form), Survey(), 0, True
    for line in read_lines(file):
        if time.monotonic() > deadline:
            complete = False
            break
        found = renderer.render(line)
        survey.add(found)
        place: dict[str, Any] = {"line": line.number} | ({} if line.item is None else {"item": line.item})
        if isinstance(found, BadLine):
            if survey.n_problems <= PROBLEMS_SHOWN:
                yield place | {"problem": {"message": found.said, "field": found.field}}
        elif shown < limit and isinstance(line, Line):
            shown += 1
            yield from (place | _conversation(one, how.bundle, form) for one in found)
            if not found:
                yield place | {"dropped": True}
    yield {"summary": _summary(survey, how.max_length, form, complete)}


def _conversation(found: Conversation, bundle: Bundle, form: Form | None) -> dict[str, Any]:
    tokenizer = bundle.tokenizer
    controls = {tokenizer.added_ids[name] for name in bundle.controls.names}
    shown = [
        {
            "n_tokens": len(sequence.ids),
            "n_trained_tokens": _n_trained(sequence),
            "truncated": sequence.truncated,
            "runs": _runs(sequence, tokenizer, controls),
        }
        for sequence in found.sequences
    ]
    judged: dict[str, Any] = {}
    if form is not None and form.methods == ("kto",):
        judged["desirable"] = found.desirable
    elif form is not None and "kto" in form.methods:
        shown = [{"part": part, **sequence} for part, sequence in zip(("chosen", "rejected"), shown, strict=True)]
    return {
        "n_tokens": sum(len(sequence.ids) for sequence in found.sequences),
        "n_trained_tokens": sum(map(_n_trained, found.sequences)),
        "truncated": any(sequence.truncated for sequence in found.sequences),
        **judged,
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
        runs.append({"text": text, "trained": trained, "control": control, "n_tokens": len(ids), "token_ids": ids})
    return runs


def _n_trained(sequence: TrainingSequence) -> int:
    return len(sequence.labels) - sequence.labels.count(IGNORED)


def _summary(survey: Survey, max_length: int, form: Form | None, complete: bool) -> dict[str, Any]:
    """Counts, and what a job with every hyperparameter "auto" would do with the file."""
    counts = {name: value for name, value in asdict(survey).items() if name.startswith("n_")}
    error = None if survey.n_problems else survey.error("training", MIN_EXAMPLES)
    method = form.methods[0] if form else "supervised"
    chosen = resolve(Hyperparameters(), survey.n_examples, method)
    return counts | {
        "form": f"{form.name} ({form.keys})" if form else None,
        "method": method,
        "methods": list(form.methods) if form else [],
        "remarks": dict(survey.remarks),
        "complete": complete,
        "max_length": max_length,
        "error": error.message if error else None,
        "n_epochs": chosen.n_epochs,
        "batch_size": chosen.batch_size,
        "total_steps": chosen.total_steps(survey.n_examples),
    }


if __name__ == "__main__":
    sys.exit(main())
