"""The real worker, which aborts as native code does: when an adapter is loaded whose folder holds a file named `crash`, and
when it is to compute the token POISON.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from gateway.llama_worker import adapters, native
from gateway.llama_worker.__main__ import main
from gateway.llama_worker.adapter_forms import Forms
from gateway.llama_worker.steady import AdapterForm

POISON = 299


class CrashingContext(native.Context):
    def decode(
        self, ids: Sequence[int], positions: Sequence[int], sequences: Sequence[int], wanted: Sequence[bool] | None
    ) -> native.Floats:
        if POISON in ids:
            os.abort()
        return super().decode(ids, positions, sequences, wanted)


class CrashingForms(Forms):
    def __init__(self, model: native.Model, path: Path, kind: AdapterForm, made: bytes | None = None) -> None:
        if (path.parent / "crash").exists():
            os.abort()
        super().__init__(model, path, kind, made)


if __name__ == "__main__":
    native.Context = CrashingContext  # type: ignore[misc]
    adapters.Forms = CrashingForms  # type: ignore[misc]
    sys.exit(main())
