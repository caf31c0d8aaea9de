"""`make parity`: every template with every tokenizer at every edge, beside the oracles. The last line has the counts."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from gateway.chat.registry import refused_templates
from tests.parity.matrix import Row, expected_refusals, run
from tests.parity.oracles import Finding, Spoil
from tests.parity.sdist import SdistUnavailable
from tests.parity.vocabularies import refused_vocabularies

_SHOWN = 25


def main(arguments: list[str] | None = None, spoil: Spoil | None = None) -> int:
    """0 when nothing differs and all that is refused is known to be. `spoil` plants an error in what is learnt."""
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__)
    parser.add_argument("--only", default="", help="subjects that hold this text")
    parser.add_argument("--quick", action="store_true", help="small tokenizers only")
    options = parser.parse_args(arguments)
    console = Console(width=150)
    began = time.monotonic()
    try:
        rows = list(_told(run(options.only, quick=options.quick, spoil=spoil), console))
    except SdistUnavailable as error:
        console.print(f"[red]{error}[/red]")
        return 2
    console.print(_table(rows))
    refusals = _print_refusals(rows, console, quick=options.quick)
    differing = [(row, finding) for row in rows for finding in row.findings if finding.verdict == "different"]
    for row, finding in differing[:_SHOWN]:
        console.print(
            f"[red]{row.oracle} · {finding.subject} · {finding.case}[/red] {finding.detail}",
            markup=True,
            highlight=False,
        )
    if len(differing) > _SHOWN:
        console.print(f"[red]and {len(differing) - _SHOWN} more[/red]")
    counts = Counter(finding.verdict for row in rows for finding in row.findings)
    unexpected = refusals - expected_refusals()
    for subject, case in sorted(unexpected)[:_SHOWN]:
        console.print(
            f"[red]refused, and not on the list of what cannot be done: {subject} · {case}[/red]", highlight=False
        )
    failed = bool(differing or unexpected)
    print(
        f"parity: {counts['same']} same, {counts['different']} different, {counts['refused']} refused with a reason "
        f"({len(unexpected)} unexpected), {len({row.subject for row in rows})} subjects, {time.monotonic() - began:.0f} s: "
        f"{'FAILED' if failed else 'passed'}"
    )
    return 1 if failed else 0


def _told(rows: Iterator[Row], console: Console) -> Iterator[Row]:
    for row in rows:
        if console.is_terminal:
            console.print(f"{row.oracle} · {row.subject} · {row.tokenizer}", end="\r", style="dim")
        yield row


def _table(rows: list[Row]) -> Table:
    table = Table(title="Ids beside the oracles'", title_justify="left")
    for name in ("oracle", "subject", "tokenizers"):
        table.add_column(name, overflow="fold")
    for name in ("same", "different", "refused"):
        table.add_column(name, justify="right")
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.oracle, row.subject), []).append(row)
    for (oracle, subject), held in groups.items():
        counts = Counter(finding.verdict for row in held for finding in row.findings)
        style = "red" if counts["different"] else None
        numbers = [str(counts[verdict]) for verdict in ("same", "different", "refused")]
        table.add_row(oracle, subject, ", ".join(row.tokenizer for row in held), *numbers, style=style)
    return table


def _print_refusals(rows: list[Row], console: Console, *, quick: bool) -> set[tuple[str, str]]:
    """What cannot be done, by name and with the reason. Gives (subject, reason's kind) of each."""
    found: dict[tuple[str, str], list[Finding]] = {}
    for row in rows:
        for finding in row.findings:
            if finding.verdict == "refused":
                found.setdefault((row.subject, finding.detail), []).append(finding)
    console.print("\nRefused, with the reason:")
    for name, reason in refused_templates().items():
        console.print(f"  fastchat template {name}: {reason}", highlight=False, markup=False)
    if not quick:
        for name, reason in refused_vocabularies().items():
            console.print(f"  vocabulary {name}: {reason}", highlight=False, markup=False)
    by_reason: dict[str, set[str]] = {}
    for subject, detail in found:
        by_reason.setdefault(detail.replace(f"'{subject}' ", ""), set()).add(subject)
    for reason, subjects in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        console.print(f"  {reason}: {', '.join(sorted(subjects))}", highlight=False, markup=False)
    return {(subject, finding.case) for (subject, _), held in found.items() for finding in held}


if __name__ == "__main__":
    sys.exit(main())
