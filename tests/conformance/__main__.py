"""`make conformance`: starts a gateway of its own, runs the SDK's tests and the programs against it, prints the counts.

python -m tests.conformance                 everything
python -m tests.conformance --sdk           the SDK's tests alone
python -m tests.conformance --sdk chat files    … of these resources
python -m tests.conformance --programs [NAME …] the programs alone
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.conformance import real_programs, sdk_suite
from tests.conformance.running import MODEL, start_gateway, upload
from tests.server import Server


def main() -> int:
    """0 where nothing failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance")
    parser.add_argument("--sdk", nargs="*", metavar="RESOURCE", choices=sdk_suite.RESOURCES)
    parser.add_argument("--programs", nargs="*", metavar="NAME", choices=real_programs.ALL)
    parser.add_argument("--verbose", action="store_true", help="print what pytest says of failures")
    asked = parser.parse_args()
    everything = asked.sdk is None and asked.programs is None
    began, failed = time.monotonic(), 0
    with tempfile.TemporaryDirectory(prefix="conformance-") as folder, start_gateway(Path(folder)) as gateway:
        if everything or asked.sdk is not None:
            failed += _run_sdk(gateway, asked.sdk or [], verbose=asked.verbose)
        if everything or asked.programs is not None:
            failed += _run_programs(gateway, asked.programs or list(real_programs.ALL))
    print(f"conformance: {time.monotonic() - began:.0f} s, {'all is well' if not failed else f'{failed} failed'}")
    return 1 if failed else 0


def _run_sdk(gateway: Server, selected: list[str], *, verbose: bool) -> int:
    outcome = sdk_suite.run(gateway.base_url, gateway.data / "tunegate.db", upload(gateway), selected)
    if verbose or (outcome.failed and len(outcome.failed) < 20):
        print(outcome.output)
    print(outcome.table())
    for reason, names in outcome.skipped.items():
        print(f"skipped {len(names)}: {reason}")
        print("\n".join(f"    {name}" for name in sorted({name.partition("[")[0] for name in names})))
    for name in outcome.failed:
        print(f"FAILED {name}")
    return len(outcome.failed)


def _run_programs(gateway: Server, names: list[str]) -> int:
    failed = 0
    for name in names:
        began = time.monotonic()
        said = real_programs.check(name, gateway.base_url, MODEL)
        print(f"{name:20}{'ok' if said is None else 'FAILED'} ({time.monotonic() - began:.1f} s)", flush=True)
        if said is not None:
            failed += 1
            print(said)
    return failed


if __name__ == "__main__":
    sys.exit(main())
