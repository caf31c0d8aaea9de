"""Our own worker as a process to start: llama.cpp on a prepared GGUF."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gateway.engines.spawn import WorkerFailed, WorkerFolder

if TYPE_CHECKING:
    from gateway.engines.control import EngineControl

LLAMA_COMMAND = (sys.executable, "-m", "gateway.llama_worker")


def huge_pages(environment: Mapping[str, str]) -> dict[str, str]:
    """The variable that has glibc ask for huge pages, unless `environment` has a wish of its own.

    A step streams all weights, and with small pages it waits for their addresses (5 to 12% of it). glibc reads this when a
    process starts, so the worker cannot do it for itself; another C library ignores it.
    """
    tunables = environment.get("GLIBC_TUNABLES", "")
    if "glibc.malloc.hugetlb" in tunables:
        return {}
    return {"GLIBC_TUNABLES": f"{tunables}:glibc.malloc.hugetlb=1".removeprefix(":")}


@dataclass(frozen=True)
class LlamaLaunch:
    """A llama worker; see `Launch`."""

    served_name: str
    model: Path
    base_digest: str
    context: int | None = None  # tokens a sequence; None: what the model was trained for
    max_seqs: int = 8
    threads: int | None = None  # None: the worker chooses
    prefix_cache_mib: int = 512
    adapters_in_memory: int = 16
    command: tuple[str, ...] = LLAMA_COMMAND

    @property
    def tells_port(self) -> bool:
        return True

    def fingerprint(self) -> dict[str, Any]:
        return {
            "command": list(self.command),
            "served_name": self.served_name,
            "model": str(self.model),
            "base_digest": self.base_digest,
            "context": self.context,
            "max_seqs": self.max_seqs,
            "threads": self.threads,
            "prefix_cache_mib": self.prefix_cache_mib,
            "adapters_in_memory": self.adapters_in_memory,
        }

    def argv(self, folder: WorkerFolder, port: int) -> list[str]:
        argv = [*self.command, "--model", str(self.model), "--served-name", self.served_name]
        argv += ["--key-file", str(folder.key), "--ready-file", str(folder.ready_file)]
        argv += ["--max-seqs", str(self.max_seqs)]
        argv += ["--cache-mib", str(self.prefix_cache_mib), "--max-adapters", str(self.adapters_in_memory)]
        if self.context is not None:
            argv += ["--ctx", str(self.context)]
        if self.threads is not None:
            argv += ["--threads", str(self.threads)]
        return argv

    def environment(self, key: str) -> Mapping[str, str]:
        return huge_pages(os.environ)

    async def greet(self, control: EngineControl, timeout_s: float) -> dict[str, Any]:
        version = await control.version(timeout_s)
        await control.health(timeout_s)
        found = version.get("base_digest")
        if found != self.base_digest:
            raise WorkerFailed(f"serves a base with digest {found}; it should be {self.base_digest}")
        return version
