"""The real worker, which aborts as native code does when an adapter is loaded whose folder holds a file named `crash`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from gateway.llama_worker import native
from gateway.llama_worker.__main__ import main


class CrashingModel(native.Model):
    def load_adapter(self, path: Path) -> native.Adapter:
        if (path.parent / "crash").exists():
            os.abort()
        return super().load_adapter(path)


if __name__ == "__main__":
    native.Model = CrashingModel  # type: ignore[misc]
    sys.exit(main())
