"""`python -m trainer JOB_DIR [--check]`: a job directory in, an adapter out; the process boundary of the trainer.

    exit 0      there is a result.json (or, with --check, a check.json)
    exit 75     another trainer holds the job's lock; nothing was done
    exit 1      the machine failed (a full disk, say): no result, the same command goes on from the newest checkpoint
    a signal    no result either: who sent it knows why

What is wrong with the data, the numbers or the code ends in result.json as failed, since trying again would end alike.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from pathlib import Path

from gateway.jobdir import LOCKED_EXIT_CODE, Check, JobDir, JobSpec, Result, TrainerError
from trainer.check import run_check
from trainer.events import EventLog, told_checkpoints
from trainer.export.folder import sweep
from trainer.tracking.followers import Tracking, owed

# how torch and safetensors report what Python would raise OSError for
_STORAGE_FAILURES = ("PytorchStreamWriter", "inline_container", "I/O error", "os error")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer", description=__doc__.splitlines()[0])
    parser.add_argument("job_dir", type=Path)
    parser.add_argument("--check", action="store_true", help="read, render and count the data; train nothing")
    options = parser.parse_args(arguments)
    job = JobDir(options.job_dir.absolute())
    if not (job.path / "job.json").is_file():
        parser.error(f"{job.path} has no job.json: it is not a job directory")
    lock = job.try_lock()
    if lock is None:
        print(f"{job.path}: another trainer is at work on this job", file=sys.stderr)
        return LOCKED_EXIT_CODE
    try:
        if options.check:
            job.write_check(run_check(job, job.read_spec()))
        elif job.read_result() is None:
            result = run(job)
            job.write_result(result)
    except OSError:
        traceback.print_exc()
        return 1
    finally:
        os.close(lock)
    return 0


def run(job: JobDir) -> Result:
    """Trains the job to its end, whatever that is. Raises OSError where trying again may help."""
    check = None
    try:
        spec = job.read_spec()
        check = job.read_check()
        if check is None:
            check = run_check(job, spec)
            job.write_check(check)
        if check.error is not None:
            return Result("failed", check.error)
        sweep(job.path)
        if not job.adapter.is_dir() or owed(job, spec):  # the adapter may be there: killed just before the result
            told = told_checkpoints(job)
            with (  # before the imports: seen to be at work
                EventLog(job.events_path(job.next_attempt())) as events,
                Tracking(job, spec, events) as tracking,
            ):
                if not job.adapter.is_dir():
                    _train(job, spec, check, events, told, tracking)
                if job.adapter.is_dir():
                    tracking.on_end("succeeded")
        return Result("succeeded", None, check.n_tokens * check.n_epochs, check.total_steps)
    except Exception as error:  # the process boundary: logged, and recorded as the job's failure
        if isinstance(error, OSError):
            raise
        if any(words in str(error) for words in _STORAGE_FAILURES):
            raise OSError(f"{job.path} cannot be written: {error}") from error
        traceback.print_exc()
        return Result("failed", _explained(error, check))


def _train(job: JobDir, spec: JobSpec, check: Check, events: EventLog, told: set[int], tracking: Tracking) -> None:
    _set_environment(spec.threads)
    warnings.simplefilter("ignore", FutureWarning)  # the pinned libraries' words to one another
    # torch, transformers and trl take seconds to import: only a job that will train pays for them
    import torch

    from trainer import loop, model
    from trainer.dataset import load_examples, read_bundle
    from trainer.export.adapter import write_adapter
    from trainer.progress import Progress
    from trainer.sft import Supervised
    from trainer.tracking.samples import Samples

    torch.set_num_threads(spec.threads)
    bundle = read_bundle(job)
    training = load_examples(job.path / spec.training_file.path, bundle, spec.max_length, spec.turns)
    validation = None
    if spec.validation_file is not None:
        validation = load_examples(job.path / spec.validation_file.path, bundle, spec.max_length, spec.turns)
    start = job.start if spec.starts_from else None
    tuned = model.add_lora(model.load_base(spec.base), spec.lora, spec.seed, start)
    objective = Supervised()
    # Each process of a sharded model has a part of it, and all would have to answer together.
    if spec.trackers and spec.predictions and validation is not None and spec.launch.sharding == "none":
        tracking.sample_with(Samples(events.path.parent, tuned, validation, bundle, spec.predictions))
    progress = Progress(events, check, tuned, validation, told, objective, tracking)
    witness = loop.train(loop.Run(job, spec, check, tuned, training, validation, objective), progress)
    write_adapter(job.adapter, tuned, job, spec, witness.score(tuned))
    events.sync()


def _set_environment(threads: int) -> None:
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


def _explained(error: Exception, check: Check | None) -> TrainerError:
    said = f"{type(error).__name__}: {error}"
    if said.startswith("InvalidLoss"):
        return TrainerError("invalid_loss", str(error), "hyperparameters")
    if said.startswith(("MemoryError", "OutOfMemoryError")) or "DefaultCPUAllocator" in said:
        size = f" (it was {check.batch_size})" if check else ""
        message = f"Training ran out of memory. Set a smaller batch_size{size}, or split the longest examples"
        return TrainerError("out_of_memory", message, "hyperparameters")
    return TrainerError("trainer_error", f"The trainer stopped unexpectedly. {said}")


if __name__ == "__main__":
    sys.exit(main())
