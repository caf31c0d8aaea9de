"""torch and what stands on it, imported for training: all that a job needs, and not what takes a second for nothing.

Place in the flow: before the first import of torch, by the trainer and by the standby. One rule: what is left out here is
left out for whoever asks whether it is there while it imports, and is there again afterwards.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# By whom it is imported without being asked for: PEFT (a second, most of it torch's compiler), TRL through rich logging.
_QUANTISING, _TRACKING = "bitsandbytes", "wandb"


def set_environment(threads: int) -> None:
    """Before torch is imported: no network, no telemetry, a fixed number of threads.

    Threads that wait must sleep: spinning, two of them beside a busy engine on two cores made a step 20 times slower.
    """
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "MKL_NUM_THREADS": str(threads),
    }


def import_libraries(*, quantised: bool = False) -> None:
    """Imports the training loop; with `quantised`, so that PEFT knows bitsandbytes' layers."""
    warnings.simplefilter("ignore", FutureWarning)  # the pinned libraries' words to one another
    with _left_out(_TRACKING, *(() if quantised else (_QUANTISING,))):
        from trainer.export import adapter  # noqa: F401


@contextmanager
def _left_out(*names: str) -> Iterator[None]:
    """Within, these packages cannot be found; one that is imported already stays."""
    hidden = [name for name in names if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # as the import system has it: a module that is not there
    try:
        yield
    finally:
        for name in hidden:
            sys.modules.pop(name, None)
