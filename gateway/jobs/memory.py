"""Whether the kernel has killed somebody here for want of memory: the evidence for a trainer that was ended by SIGKILL.

The counter of our own control group (a trainer is in the same one), of version 2 or 1, else that of the whole machine.
Blocking, for microseconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class MemoryEvents:
    """`oom_kills()` before and after."""

    root: Path = Path("/")

    def oom_kills(self) -> int | None:
        """How many processes were killed so far; None where nothing tells."""
        for path in (*self._of_groups(), self.root / "proc/vmstat"):
            try:
                lines = [line.split() for line in path.read_text().splitlines()]
            except OSError:
                continue
            for words in lines:
                if len(words) == 2 and words[0] == "oom_kill" and words[1].isdigit():
                    return int(words[1])
        return None

    def _of_groups(self) -> list[Path]:
        try:
            lines = (self.root / "proc/self/cgroup").read_text().splitlines()
        except OSError:
            return []
        found = []
        for line in lines:
            _, controllers, group = line.split(":", 2)
            place = group.lstrip("/")
            if not controllers:
                found.append(self.root / "sys/fs/cgroup" / place / "memory.events")
            elif "memory" in controllers.split(","):
                found.append(self.root / "sys/fs/cgroup/memory" / place / "memory.oom_control")
        return found
