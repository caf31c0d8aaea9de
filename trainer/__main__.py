"""`python -m trainer JOB_DIR [--check]`: a job directory in, an adapter out; the process boundary of the trainer.

    exit 0      there is a result.json (or, with --check, a check.json)
    exit 75     another trainer holds the job's lock; nothing was done
    exit 76     paused: there was a file `pause` in the folder; the same command goes on from the checkpoint at that step
    exit 1      the machine failed (a full disk, say): no result, the same command goes on from the newest checkpoint
    a signal    no result either: who sent it knows why

What is wrong with the data, the numbers or the code ends in result.json as failed, since trying again would end alike.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from gateway.jobdir import (
    LOCKED_EXIT_CODE,
    PAUSED_EXIT_CODE,
    Check,
    JobDir,
    JobSpec,
    Result,
    TrainerError,
    out_of_memory_message,
)
from trainer.check import run_check
from trainer.checkpoints import steps_taken, take_as_result
from trainer.data.dataset import prepare_examples, read_bundle, stored_examples
from trainer.data.examples import Examples, StaleExamples
from trainer.events import EventLog, Silence, told_checkpoints
from trainer.export.folder import sweep
from trainer.processes.group import LostRanks, RankFailed, is_lost, threads_of_rank, train_together
from trainer.processes.libraries import import_libraries, set_environment
from trainer.stopping import Diverged, InvalidLoss, Paused
from trainer.tracking.followers import Tracking, owed

if TYPE_CHECKING:
    from trainer.processes.standby import Warmth

# how torch and safetensors report what Python would raise OSError for
_STORAGE_FAILURES = ("PytorchStreamWriter", "inline_container", "I/O error", "os error")
_MEMORY_FAILURES = ("DefaultCPUAllocator", "std::bad_alloc", "Cannot allocate memory", "(os error 12)")


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
        return work(job, check_only=options.check)
    finally:
        os.close(lock)


def work(job: JobDir, *, check_only: bool = False, warmth: Warmth | None = None) -> int:
    """The exit code. The caller holds the job's lock; `warmth` is what a standby has ready."""
    try:
        if check_only:
            job.write_check(run_check(job, job.read_spec()))
        elif job.read_result() is None:
            result = run(job, warmth)
            if result is None:
                return PAUSED_EXIT_CODE
            job.write_result(result)
    except OSError:
        traceback.print_exc()
        return 1
    return 0


def run(job: JobDir, warmth: Warmth | None = None, rank: int | None = None) -> Result | None:
    """Trains the job to its end, whatever that is, or until it is paused (None). OSError where trying again may help.

    With `rank` as one of several processes (see `rank`); a job for several is handed to `group` where it is None.
    """
    spec, check = None, None
    try:
        spec = job.read_spec()
        check = job.read_check()
        if check is None:
            check = run_check(job, spec)
            job.write_check(check)
        if check.error is not None:
            return Result("failed", check.error)
        if rank is None:
            sweep(job.path)
        if rank is None and spec.launch.processes > 1 and not job.adapter.is_dir():
            train_together(job, spec)
            if not job.adapter.is_dir():
                return None  # all of them ended well, and without a result: paused
        elif not job.adapter.is_dir() or owed(job, spec):  # the adapter may be there: killed just before the result
            told = told_checkpoints(job)
            with (  # before the imports: seen to be at work
                Silence() if rank else EventLog(job.events_path(job.next_attempt())) as events,
                Tracking(job, () if rank else spec.trackers, events) as tracking,
            ):
                if not job.adapter.is_dir():
                    _train(job, spec, check, events, told, tracking, warmth, rank)
                if job.adapter.is_dir():
                    tracking.on_end("succeeded")
        steps = steps_taken(job)  # fewer than all where it stopped early
        return Result("succeeded", None, check.n_tokens * check.n_epochs * steps // check.total_steps, steps)
    except Paused as paused:
        print(f"{job.path}: {paused}", file=sys.stderr)
        return None
    except RankFailed as failed:
        return Result("failed", failed.error)
    except Exception as error:  # the process boundary: logged, and recorded as the job's failure
        if not _is_out_of_memory(error):
            if isinstance(error, OSError):
                raise
            if rank is not None and is_lost(error):
                raise LostRanks(str(error)) from error
            if any(words in str(error) for words in _STORAGE_FAILURES):
                raise OSError(f"{job.path} cannot be written: {error}") from error
        traceback.print_exc()
        return Result("failed", _explained(error, spec, check))


def _train(
    job: JobDir,
    spec: JobSpec,
    check: Check,
    events: EventLog,
    told: set[int],
    tracking: Tracking,
    warmth: Warmth | None,
    rank: int | None,
) -> None:
    threads = spec.threads if rank is None else threads_of_rank(spec)
    # torch, transformers and peft take seconds to import: only a job that will train pays for them
    if warmth is None:
        set_environment(threads)
        sharded = spec.launch.sharding in ("zero2", "zero3")
        import_libraries(quantised=spec.options.quantization != "none", sharded=sharded)
    else:
        warmth.wait()
    import torch

    from trainer import arithmetic, loop, model
    from trainer.methods import make_objective
    from trainer.methods.reference import freeze_reference
    from trainer.processes.distributed import ALONE, join
    from trainer.progress import Progress
    from trainer.tracking.samples import Samples

    torch.set_num_threads(threads)
    ranks = ALONE if rank is None else join(spec.launch.sharding)
    training, validation = _examples(job, spec)
    numbers = arithmetic.choose(spec.options)
    start = job.start if spec.starts_from is not None else None
    base = warmth.take(spec.base) if warmth is not None and numbers == arithmetic.EXACT else None
    tuned = model.add_lora(base or model.load_base(spec.base, numbers), spec.lora, spec.seed, start)
    if start is not None and spec.method in ("dpo", "kto"):
        freeze_reference(tuned)
    objective = make_objective(spec, check, training)
    # Each process of several may have a part of the model, and all would have to answer together.
    if spec.trackers and spec.predictions and validation is not None and spec.launch.processes == 1:
        tracking.sample_with(Samples(events.path.parent, tuned, validation, read_bundle(job), spec.predictions))
    progress = Progress(events, check, tuned, validation, told, objective, job, spec.options, tracking, ranks)
    run = loop.Run(job, spec, check, tuned, training, validation, objective, numbers, ranks=ranks)
    trained = loop.train(run, progress)
    if ranks.is_first:
        take_as_result(job, trained)
    events.sync()


def _examples(job: JobDir, spec: JobSpec) -> tuple[Examples, Examples | None]:
    """As the check stored them; written again where they are not there, or are of another version."""
    try:
        return stored_examples(job, spec)
    except StaleExamples:
        prepare_examples(job, spec)
        return stored_examples(job, spec)


def _is_out_of_memory(error: Exception) -> bool:
    """As Python, numpy, the kernel and torch (on a CPU, on a GPU) say it."""
    return (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or type(error).__name__ == "OutOfMemoryError"
        or any(words in str(error) for words in _MEMORY_FAILURES)
    )


def _explained(error: Exception, spec: JobSpec | None, check: Check | None) -> TrainerError:
    if isinstance(error, InvalidLoss):
        return TrainerError("invalid_loss", str(error), "hyperparameters")
    if isinstance(error, Diverged):
        return TrainerError("training_diverged", str(error), "hyperparameters")
    if type(error).__name__ == "UnsupportedOption":
        return TrainerError("unsupported_option", str(error), "method")
    if _is_out_of_memory(error):
        return TrainerError("out_of_memory", out_of_memory_message(spec, check), "hyperparameters")
    return TrainerError("trainer_error", f"The trainer stopped unexpectedly. {type(error).__name__}: {error}")


def leave(code: int) -> NoReturn:
    """Ends this process as it is: taking torch's objects apart one by one takes as long as some steps, and somebody waits."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
