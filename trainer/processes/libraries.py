"""torch and what stands on it, imported for training: what the job needs, and not what takes seconds for nothing.

Place in the flow: before the first import of torch, by the trainer and by the standby. One rule: a package that only some
jobs use is not there for a job that does not.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
import warnings

# What PEFT, accelerate and TRL import because it is installed, half a second to two seconds each:
_QUANTISING = ("bitsandbytes",)  # when LoRA layers are made
_SHARDING = ("deepspeed",)  # when the model is looked at
_TRACKING = ("wandb", "mlflow", "comet_ml", "trackio")  # only while TRL itself is imported


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


def import_libraries(*, quantised: bool = False, sharded: bool = False) -> None:
    """Imports the training loop; what is neither `quantised` nor `sharded` never sees those packages."""
    warnings.simplefilter("ignore", FutureWarning)  # the pinned libraries' words to one another
    _leave_out(*(() if quantised else _QUANTISING), *(() if sharded else _SHARDING))
    hidden = _leave_out(*_TRACKING)
    for name in ("trainer.loop", "trainer.methods", "trainer.methods.reference", "trainer.methods.sft"):
        importlib.import_module(name)
    for name in hidden:
        del sys.modules[name]
    gc.freeze()  # a million objects that stay: the collector need not look at them again, 0.2 s each time


def _leave_out(*names: str) -> list[str]:
    """As if these packages were not installed; those that are imported already stay."""
    hidden = [name for name in names if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # so the import system says that it is not there
    return hidden
