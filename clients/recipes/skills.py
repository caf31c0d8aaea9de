"""Teach a model the calls of a set of skills, and see what it learnt: base against tuned on requests held out.

Place in the flow: skill files → training JSONL → fine-tuning job → a table. One rule: everything goes through the
unmodified OpenAI SDK, so the recipe runs against any server that speaks its API.

    python -m clients.recipes.skills --base-url http://127.0.0.1:8000/v1 --skills clients/recipes/demo_skills --model NAME
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from openai import APIError, OpenAI
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from clients.recipes.calls import Score, same_call, score
from clients.recipes.skill_files import SkillExample, SkillFileError, Split, read_folder, split

CONCURRENT_REQUESTS = 8
REPLY_TOKENS = 96
POLL_INTERVAL_S = 0.5
SHOWN_EXAMPLES = 6


def main(arguments: Sequence[str] | None = None) -> int:
    options = read_arguments(arguments)
    console = Console()
    try:
        parts = split(read_folder(options.skills), options.holdout, options.seed, options.values == "unseen")
    except (SkillFileError, ValueError, OSError) as error:
        console.print(f"[red]skills: {error}[/red]", highlight=False)
        return 2
    console.print(f"{len(parts.training)} requests to learn from, {len(parts.held_out)} held out")
    client = OpenAI(base_url=options.base_url, api_key=options.api_key, max_retries=4, timeout=600)
    try:
        return run(client, parts, options, console)
    except APIError as error:
        console.print(f"[red]skills: {options.base_url}: {error}[/red]", highlight=False)
        return 1


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="clients.recipes.skills", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY") or "none")
    parser.add_argument("--skills", type=Path, required=True, help="a folder of skill files (*.txt)")
    parser.add_argument("--model", required=True, help="the base to tune")
    parser.add_argument("--suffix", default="skills", help="goes into the tuned model's name")
    parser.add_argument("--holdout", type=float, default=0.15, help="share of each skill's requests kept for the test")
    parser.add_argument(
        "--values",
        choices=("unseen", "any"),
        default="unseen",
        help="unseen: hold out only requests whose argument values stand nowhere in the training file",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate-multiplier", type=float)
    parser.add_argument("--out", type=Path, help="where to keep training.jsonl, held_out.jsonl and report.json")
    return parser.parse_args(arguments)


def run(client: OpenAI, parts: Split, options: argparse.Namespace, console: Console) -> int:
    """The whole recipe; 0 when the job succeeded. Raises openai.APIError."""
    with tempfile.TemporaryDirectory() as scratch:
        out = options.out or Path(scratch)
        out.mkdir(parents=True, exist_ok=True)
        write_jsonl(out / "training.jsonl", parts.training)
        write_jsonl(out / "held_out.jsonl", parts.held_out)
        requests = [example.request for example in parts.held_out]
        before = ask_all(client, options.model, requests, "asking the base", console)
        tuned = tune(client, out / "training.jsonl", options, console)
        if tuned is None:
            return 1
        after = ask_all(client, tuned, requests, "asking the tuned model", console)
        report(console, parts.held_out, {options.model: before, tuned: after})
        if options.out:
            write_report(out / "report.json", parts.held_out, {options.model: before, tuned: after})
    return 0


def write_jsonl(path: Path, examples: Sequence[SkillExample]) -> None:
    """One conversation a line, in the form that OpenAI's fine-tuning takes."""
    with path.open("w", encoding="utf-8") as file:
        for example in examples:
            turns = [
                {"role": "user", "content": example.request},
                {"role": "assistant", "content": example.answer},
            ]
            file.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")


def ask_all(client: OpenAI, model: str, requests: Sequence[str], title: str, console: Console) -> list[str]:
    """The model's replies in order, greedily decoded, a few requests at a time. Raises openai.APIError."""
    with _progress(console) as progress, ThreadPoolExecutor(CONCURRENT_REQUESTS) as pool:
        task = progress.add_task(title, total=len(requests))
        replies = []
        for reply in pool.map(lambda request: ask(client, model, request), requests):
            replies.append(reply)
            progress.advance(task)
    return replies


def ask(client: OpenAI, model: str, request: str) -> str:
    """One reply, streamed as a program in a hurry would. Raises openai.APIError."""
    chunks = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": request}],
        temperature=0,
        max_tokens=REPLY_TOKENS,
        stream=True,
    )
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def tune(client: OpenAI, training: Path, options: argparse.Namespace, console: Console) -> str | None:
    """The tuned model's name, or None when the job did not succeed. Raises openai.APIError."""
    with training.open("rb") as file:
        uploaded = client.files.create(file=file, purpose="fine-tune")
    hyperparameters: dict[str, Any] = {"n_epochs": options.epochs, "batch_size": options.batch_size}
    if options.learning_rate_multiplier is not None:
        hyperparameters["learning_rate_multiplier"] = options.learning_rate_multiplier
    method: Any = {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
    job = client.fine_tuning.jobs.create(
        model=options.model,
        training_file=uploaded.id,
        suffix=options.suffix,
        seed=options.seed,
        method=method,
    )
    console.print(f"job {job.id} with {uploaded.id}", highlight=False)
    started, seen = time.monotonic(), set[str]()
    with _progress(console) as progress:
        task = progress.add_task("fine-tuning", total=None)
        while job.status not in ("succeeded", "failed", "cancelled"):
            time.sleep(POLL_INTERVAL_S)
            job = client.fine_tuning.jobs.retrieve(job.id)
            for event in _new_events(client, job.id, seen):
                data = event.data if isinstance(event.data, dict) else {}
                if event.type == "metrics" and data.get("step"):
                    loss = data.get("train_loss")
                    title = "fine-tuning" if loss is None else f"fine-tuning, loss {loss:.3f}"
                    progress.update(task, completed=data["step"], total=data.get("total_steps"), description=title)
                else:
                    progress.console.print(f"  {event.message}", highlight=False, markup=False)
    console.print(f"{job.status} after {time.monotonic() - started:.0f} s: {job.fine_tuned_model}", highlight=False)
    if job.status != "succeeded" or not job.fine_tuned_model:
        reason = job.error.message if job.error else "no reason was given"
        console.print(f"[red]skills: the job {job.status}: {reason}[/red]", highlight=False)
        return None
    return job.fine_tuned_model


def report(console: Console, held_out: Sequence[SkillExample], replies: dict[str, list[str]]) -> None:
    """Prints the scores of each model, and a few requests with what each model said."""
    wanted = [example.answer for example in held_out]
    table = Table(title=f"{len(wanted)} held-out requests")
    for column in ("model", "exact match", "call match", "right function"):
        table.add_column(column, justify="left" if column == "model" else "right", overflow="fold")
    for model, said in replies.items():
        scored = score(said, wanted)
        table.add_row(model, f"{scored.exact:.0%}", f"{scored.call:.0%}", f"{scored.function:.0%}")
    console.print(table)
    examples = Table(title="A few of them")
    for column in ("request", "before", "after", ""):
        examples.add_column(column, overflow="fold")
    before, after = replies.values()
    step = max(1, len(wanted) // SHOWN_EXAMPLES)
    for index in range(0, len(wanted), step)[:SHOWN_EXAMPLES]:
        right = "right" if same_call(after[index], wanted[index]) else "wrong"
        examples.add_row(*(_escape(text) for text in (held_out[index].request, before[index], after[index])), right)
    console.print(examples)


def write_report(path: Path, held_out: Sequence[SkillExample], replies: dict[str, list[str]]) -> None:
    """Everything that was asked and said, with the scores, as JSON."""
    wanted = [example.answer for example in held_out]
    scores: dict[str, Score] = {model: score(said, wanted) for model, said in replies.items()}
    asked = [
        {"request": example.request, "wanted": example.answer} | {model: said[index] for model, said in replies.items()}
        for index, example in enumerate(held_out)
    ]
    content = {"scores": {model: vars(one) for model, one in scores.items()}, "held_out": asked}
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _new_events(client: OpenAI, job_id: str, seen: set[str]) -> list[Any]:
    """The events that were not seen yet, oldest first; pages back only as far as something is new."""
    fresh = []
    for event in client.fine_tuning.jobs.list_events(job_id, limit=100):
        if event.id in seen:
            break
        seen.add(event.id)
        fresh.append(event)
    return fresh[::-1]


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


if __name__ == "__main__":
    sys.exit(main())
