"""A gateway that is there to be killed: starts an engine, says so on stdout, and waits.

    python -m tests.engines.killed_gateway SPEC_JSON

The spec: {"base": PreparedBase's fields, "folder", "command", "adapters": [Adapter's fields], "until": "spawned" | "ready"}.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from gateway.bases import PreparedBase
from gateway.engines.adapters import Adapter
from gateway.engines.kinds import llama_engine
from tests.engines.parts import QUICK, until


async def main(spec: dict[str, Any]) -> None:
    paths = {name: Path(spec["base"][name]) for name in ("path", "gguf")}
    base = PreparedBase(**{**spec["base"], **paths, "eos_token_ids": (2,)})
    engine = llama_engine(base, Path(spec["folder"]), command=tuple(spec["command"]), timings=QUICK)
    engine.set_desired(Adapter(**{**adapter, "path": Path(adapter["path"])}) for adapter in spec["adapters"])
    await engine.start()
    if spec["until"] == "ready":
        await engine.wait_ready(60)
    else:
        await until((Path(spec["folder"]) / "spawn.json").exists)
    print(engine.pid or "spawned", flush=True)
    await asyncio.sleep(600)


asyncio.run(main(json.loads(sys.argv[1])))
