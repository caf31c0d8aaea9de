"""A preview in the terminal: fetched from a running server or made from a prepared base, and drawn in colour.

Place in the flow: `tunegate preview`, in a process of its own. One rule: what is in the file is a stranger's text, so that none
of its control characters reaches the terminal.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from rich.console import Console
from rich.text import Text

from gateway.bases import read_base
from gateway.errors import RequestError, TunegateError

if TYPE_CHECKING:
    from gateway.jobdir import TrainOn, Turns

TIMEOUT_S = 120.0
_JUDGED: Mapping[bool | None, str] = {True: " · desirable", False: " · undesirable"}
_STYLES = {(True, False): "bold green", (True, True): "bold magenta", (False, False): "dim", (False, True): "magenta"}


def fetch_preview(
    file: Path, model: str, limit: int, base_url: str, turns: Turns = "all", train_on: TrainOn = "assistant"
) -> dict[str, Any]:
    """What the server's model would be trained on. The file is uploaded for it, and deleted. Raises TunegateError."""
    address = base_url.rstrip("/").removesuffix("/v1")
    headers = {"Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY') or 'unused'}"}
    try:
        with httpx.Client(base_url=f"{address}/v1", headers=headers, timeout=TIMEOUT_S) as client:
            with file.open("rb") as content:
                upload = client.post("/files", files={"file": (file.name, content)}, data={"purpose": "fine-tune"})
            file_id = _told(upload)["id"]
            try:
                body = {
                    "training_file": file_id,
                    "model": model,
                    "limit": limit,
                    "tunegate": {"turns": turns, "train_on": train_on},
                }
                return _told(client.post("/fine_tuning/preview", json=body))
            finally:
                client.delete(f"/files/{file_id}")
    except httpx.HTTPError as error:
        raise TunegateError(
            f"cannot reach {address} ({type(error).__name__}): start the server with `tunegate serve`, or name its data "
            "folder with --data to preview without it"
        ) from error


def make_preview(
    file: Path, base: Path, limit: int, turns: Turns = "all", train_on: TrainOn = "assistant"
) -> dict[str, Any]:
    """The same for a prepared base's folder, without a server. Raises TunegateError."""
    prepared = read_base(base)
    command = [sys.executable, "-m", "trainer.preview", "--bundle", str(prepared.path), "--file", str(file.absolute())]
    command += ["--max-length", str(prepared.context_length), "--limit", str(limit)]
    command += ["--turns", turns, "--train-on", train_on]
    # Where our packages are: this may run anywhere, and as an installed command.
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()
        raise TunegateError(f"the preview failed: {reason[-1] if reason else f'exit code {done.returncode}'}")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {
        "model": prepared.name,
        "template": {"id": prepared.template, "version": None},
        "max_length": prepared.context_length,
        "data": found[:-1],
        "summary": found[-1]["summary"],
    }


def draw_preview(console: Console, preview: Mapping[str, Any]) -> None:
    """Each line with what is trained marked; then the counts. Without colours, trained text stands between ⟦ and ⟧."""
    brackets = not console.is_terminal or console.no_color
    for line in preview["data"]:
        _draw_line(console, line, brackets)
    _draw_summary(console, preview)


def _draw_line(console: Console, line: Mapping[str, Any], brackets: bool) -> None:
    if problem := line.get("problem"):
        console.print(Text(f"{_place(line)}: {_visible(problem['message'])}", "bold red"))
        return
    if line.get("dropped"):
        console.print(Text(f"{_place(line)}: dropped, since human and model do not take turns in it", "yellow"))
        return
    head = f"{_place(line)} · {_counted(line)}" + _JUDGED.get(line.get("desirable"), "")
    console.print(Text(head, "bold"), Text(" · shortened to fit", "yellow") if line["truncated"] else "", sep="")
    for number, sequence in enumerate(line["sequences"], start=1):
        if len(line["sequences"]) > 1:
            part = sequence.get("part") or f"sequence {number} of {len(line['sequences'])}"
            console.print(Text(f"  {part} · {_counted(sequence)}", "cyan"))
        console.print(_written(sequence["runs"], brackets), soft_wrap=True)
    console.print()


def _place(line: Mapping[str, Any]) -> str:
    return f"line {line['line']}" if line.get("item") is None else f"item {line['item']} (line {line['line']})"


def _written(runs: Sequence[Mapping[str, Any]], brackets: bool) -> Text:
    text, open_ = Text(), False
    for run in runs:
        trained = bool(run["trained"])
        if brackets and trained != open_:
            text.append("⟦" if trained else "⟧")
            open_ = trained
        text.append(_visible(run["text"]), _STYLES[trained, bool(run["control"])])
    if open_:
        text.append("⟧")
    return text


def _draw_summary(console: Console, preview: Mapping[str, Any]) -> None:
    summary, template = preview["summary"], preview["template"]
    console.print(
        Text(
            f"{summary['n_examples']} examples, {_counted(summary)}; at most {preview['max_length']} tokens at once; "
            f"template {template['id']}"
        )
    )
    if summary["form"]:
        counts = "".join(f"; {count} {remark}" for remark, count in sorted(summary["remarks"].items()))
        dropped = f"; {summary['n_dropped']} dropped" if summary["n_dropped"] else ""
        console.print(Text(f"{summary['form']}, for the method {' or '.join(summary['methods'])}{counts}{dropped}"))
    if not summary["complete"]:
        console.print(
            Text("the file is long: it was not read to its end, and the counts are of its first part", "yellow")
        )
    if summary["n_truncated"]:
        console.print(
            Text(f"too long, and shortened from their start: {_of(summary['n_truncated'], 'example')}", "yellow")
        )
    if summary["n_problems"]:
        unusable = _of(summary["n_problems"], "line")
        console.print(Text(f"{unusable} cannot be used: a job on this file would fail", "bold red"))
    elif summary["error"]:
        console.print(Text(summary["error"], "bold red"))
    else:
        console.print(
            Text(
                f"a job with the method {summary['method']} would take {_of(summary['total_steps'], 'step')}: "
                f"{_of(summary['n_epochs'], 'epoch')}, {_of(summary['batch_size'], 'example')} a step"
            )
        )


def is_usable(preview: Mapping[str, Any]) -> bool:
    """Whether a job on the file would pass its check, as far as it was read."""
    return not preview["summary"]["n_problems"] and not preview["summary"]["error"]


def _of(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _counted(counts: Mapping[str, Any]) -> str:
    return f"{counts['n_tokens']} tokens, {counts['n_trained_tokens']} trained"


def _told(response: httpx.Response) -> dict[str, Any]:
    """The body of an answer. Raises RequestError with the server's own words."""
    try:
        body = response.json()
    except ValueError:
        body = None
    if response.is_success and isinstance(body, dict):
        return body
    error = body.get("error") if isinstance(body, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    raise RequestError(str(message or f"{response.request.url} answered {response.status_code}"))


def _visible(text: str) -> str:
    """Control and direction characters as something that can be seen, all but newline and tab."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf") else _picture(c) for c in text)


def _picture(character: str) -> str:
    code = ord(character)
    return chr(0x2400 + code) if code < 0x20 else f"\\u{code:04x}"
