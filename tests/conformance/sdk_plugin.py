"""Loaded into the SDK's own pytest (`-p sdk_plugin`): rows are put back before each test, outcomes are written down.

Runs where `tests` is the SDK's package, so its siblings are imported flat.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import seeds
from skips import reason_to_skip

_outcomes: dict[str, dict[str, str]] = {}


def pytest_configure(config: pytest.Config) -> None:
    config.stash["engine"] = seeds.connect(Path(os.environ["CONFORMANCE_DATABASE"]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if (reason := reason_to_skip(item.nodeid)) is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    with item.config.stash["engine"].begin() as connection:
        seeds.put(connection, os.environ["CONFORMANCE_FILE"])


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr or "")
        _outcomes[report.nodeid] = {"outcome": report.outcome, "reason": reason.removeprefix("Skipped: ")}


def pytest_sessionfinish() -> None:
    Path(os.environ["CONFORMANCE_REPORT"]).write_text(json.dumps(_outcomes))
