"""The real worker, which aborts as native code does: when an adapter is loaded whose folder holds a file named `crash`, and
when it is to compute the token POISON.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from gateway.llama_worker import native
from gateway.llama_worker.__main__ import main

POISON = 299


class CrashingContext(native.Context):
    def decode(
        self, ids: Sequence[int], positions: Sequence[int], sequences: Sequence[int], wanted: Sequence[bool]
    ) -> native.Floats:
        if POISON in ids:
            os.abort()
        return super().decode(ids, positions, sequences, wanted)


class CrashingModel(native.Model):
    def load_adapter(self, path: Path) -> native.Adapter:
        if (path.parent / "crash").exists():
            os.abort()
        return super().load_adapter(path)


if __name__ == "__main__":
    native.Context = CrashingContext  # type: ignore[misc]
    native.Model = CrashingModel  # type: ignore[misc]
    sys.exit(main())
