"""A gateway's jobs and engine in a process that is there to be killed. SIGTERM ends it, and its engine, in order.

    python -m tests.jobs.killed_gateway SPEC_JSON

The spec: {"folder", "plan": Plan's fields, "base": PreparedBase's fields, "create": whether to create a job}. It says the
job's id on stdout once the job is acknowledged.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path
from typing import Any

from gateway.bases import PreparedBase
from tests.jobs.fake_trainer import Plan
from tests.jobs.parts import Workshop


async def main(spec: dict[str, Any]) -> None:
    paths = {name: Path(spec["base"][name]) for name in ("path", "gguf")}
    base = PreparedBase(**{**spec["base"], **paths, "eos_token_ids": (2,)})
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    shop = Workshop(Path(spec["folder"]), base, None, Plan(**spec["plan"]), {})
    await shop.serve_rows()
    await shop.engine.start()
    await shop.supervisor.start()
    if spec["create"]:
        job = await shop.create(key="the only one")
        print(job.id, flush=True)
    await ended.wait()
    await shop.close()
    await shop.engine.stop()


asyncio.run(main(json.loads(sys.argv[1])))
