"""On how many processes a job trains: the operator's setting → `launch` in job.json.

The launcher starts one process for each job, whatever this says: `python -m trainer JOB_DIR` takes the job's lock, and for a
job with several processes it becomes the agent of `torchrun --standalone` and starts, watches and ends them as one. So the
gateway sees one trainer, with one lock, one log and one exit code; and another way to launch (a cluster's, say) needs only a
launcher with the same two methods, `train` and `check`.
"""

from __future__ import annotations

from importlib.util import find_spec

from gateway.errors import SettingsError
from gateway.jobdir import Launch, Method
from gateway.settings import JobSettings

_WHOLE_BATCH_METHODS: tuple[Method, ...] = ("kto",)


def read_launch(settings: JobSettings) -> Launch:
    """What the settings say. SettingsError where they do not fit together, or a package is not there."""
    launch = Launch(settings.processes, settings.sharding)
    if launch.sharding != "none" and not is_group(launch):
        raise SettingsError(
            f"[jobs] sharding is '{launch.sharding}', which splits a model over several processes, but processes is "
            f"{launch.processes}. Set processes to the number of GPUs, or leave sharding out"
        )
    if launch.sharding in ("zero2", "zero3") and find_spec("deepspeed") is None:
        raise SettingsError(
            f"[jobs] sharding is '{launch.sharding}', which needs DeepSpeed. Install it with `pip install "
            "'tunegate[deepspeed]'`, or set sharding to 'fsdp', which needs nothing more"
        )
    return launch


def launch_for(launch: Launch, method: Method) -> Launch:
    """How a job of this method is launched: kto's loss looks at a whole batch at once, so one process trains it."""
    return Launch() if method in _WHOLE_BATCH_METHODS else launch


def is_group(launch: Launch) -> bool:
    """Whether several processes train the job together."""
    return launch.processes > 1
