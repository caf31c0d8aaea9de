"""The job directory: the one contract between gateway and trainer. A leaf: imports nothing of ours.

    job.json        the spec, written once by the gateway
    pause           written by the gateway: the trainer ends behind a checkpoint at its next step
    lock            flocked by the trainer for its whole life; holds its pid and start time as JSON
    data/           pinned copies (hard links) of the input files
    template/       the template bundle that prompts are rendered through: template.json, tokenizer.json
    check.json      what `python -m trainer JOB_DIR --check` found: counts, resolved hyperparameters, or the error
    examples/       the input files' conversations as token ids, written by the check (trainer/data/examples.py)
    attempts/N/events.jsonl     one file an attempt, one JSON object a line, keyed (attempt, seq)
    attempts/N/predictions.jsonl    what the model said at each evaluation, for the trackers: `Prediction`, one a line
    tracking/       how far each tracker was told, its errors, and what it keeps locally: `trainer/tracking`
    start/          where training goes on from: another adapter's adapter_model.safetensors and adapter_config.json
    checkpoints/step-N/         complete or absent: written beside, fsynced, renamed
    adapter/        what training made (see `ADAPTER_FILES`), also complete or absent
    result.json     written last: succeeded, or failed {code, message, param}

`python -m trainer JOB_DIR` runs by hand with no gateway alive. The trainer never writes outside this folder; what tells the
trackers writes to the places that the settings name for them.
"""

from __future__ import annotations

from gateway.jobdir.files import (
    fsync_folder,
    process_start_time,
    read_json,
    write_bytes,
    write_json,
)
from gateway.jobdir.folder import (
    ADAPTER_FILES,
    ADAPTER_GGUF,
    CHECK_RECORD,
    LOCKED_EXIT_CODE,
    PAUSED_EXIT_CODE,
    Holder,
    JobDir,
)
from gateway.jobdir.spec import (
    TRACKER_SECRETS,
    Auto,
    BaseRef,
    FileRef,
    Hyperparameters,
    JobSpec,
    Launch,
    Lora,
    Method,
    Options,
    Precision,
    Quantization,
    Scheduler,
    Sharding,
    Tracker,
    TrackerKind,
    TrainOn,
    Turns,
)
from gateway.jobdir.told import (
    Check,
    Event,
    Prediction,
    Result,
    TrainerError,
    out_of_memory_message,
    read_events,
)

__all__ = [
    "ADAPTER_FILES",
    "ADAPTER_GGUF",
    "CHECK_RECORD",
    "LOCKED_EXIT_CODE",
    "PAUSED_EXIT_CODE",
    "TRACKER_SECRETS",
    "Auto",
    "BaseRef",
    "Check",
    "Event",
    "FileRef",
    "Holder",
    "Hyperparameters",
    "JobDir",
    "JobSpec",
    "Launch",
    "Lora",
    "Method",
    "Options",
    "Precision",
    "Prediction",
    "Quantization",
    "Result",
    "Scheduler",
    "Sharding",
    "Tracker",
    "TrackerKind",
    "TrainOn",
    "TrainerError",
    "Turns",
    "fsync_folder",
    "out_of_memory_message",
    "process_start_time",
    "read_events",
    "read_json",
    "write_bytes",
    "write_json",
]
