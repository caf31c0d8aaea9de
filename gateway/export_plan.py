"""What an export is made of: a tuned model's adapter, the base that it was trained on, and how to call the trainer for it.

Place in the flow: `tunegate export`, or `exports` for a client → **this** → `python -m trainer.export`, a process of its own.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from gateway.errors import RequestError


@dataclass(frozen=True)
class ExportPlan:
    """`kind` is the type of the weights; None: the default of `to`."""

    model: str
    base: Path  # the prepared base's folder
    adapter: Path
    to: str
    kind: str | None

    def command(self, out: Path) -> list[str]:
        command = [sys.executable, "-m", "trainer.export", "--name", self.model, "--to", self.to, "--out", str(out)]
        command += ["--base", str(self.base), "--adapter", str(self.adapter)]
        return command if self.kind is None else [*command, "--type", self.kind]

    def filename(self, *, one_file: bool) -> str:
        """A name for what is made, without folders; a folder in one file is an archive."""
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", self.model).strip("-.")[:160] or "model"
        if self.to == "gguf":
            return f"{stem}.{self.kind or 'f16'}.gguf"
        kind = "" if self.kind is None else f".{self.kind}"
        return f"{stem}{kind}.{self.to}{'.tar' if one_file else ''}"


def refuse_base(name: str, folder: Path | None = None) -> RequestError:
    """For a model that nothing was trained into."""
    where = "" if folder is None else f" Its files are in {folder}."
    return RequestError(
        f"'{name}' is a base: nothing was trained into it that could be merged. Exported are tuned models (ft:…).{where}",
        param="model",
    )
