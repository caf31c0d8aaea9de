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

import fcntl
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

LOCKED_EXIT_CODE = 75  # EX_TEMPFAIL: another trainer holds the lock; nothing was done
PAUSED_EXIT_CODE = 76  # `pause` was there: the trainer ended behind a checkpoint
CHECK_RECORD = "check.process.json"  # which process checks the job's files, as the gateway started it
# What a tracker may need of the environment that no log and no message may show.
TRACKER_SECRETS: dict[str, tuple[str, ...]] = {
    "wandb": ("WANDB_API_KEY",),
    "mlflow": ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"),
    "tensorboard": (),
}
ADAPTER_GGUF = "adapter.gguf"  # for a llama worker: an adapter of a base that vLLM serves has none
ADAPTER_FILES = (
    "adapter_model.safetensors",
    "adapter_config.json",
    ADAPTER_GGUF,
    "manifest.json",
    "witness.json",
    "template/template.json",
    "template/tokenizer.json",
)

Auto = Literal["auto"]
Turns = Literal["all", "last"]
TrainOn = Literal["assistant", "all"]
Method = Literal["supervised", "dpo", "kto", "orpo"]
Precision = Literal["auto", "f32", "bf16", "fp16"]
Quantization = Literal["none", "nf4", "int8"]
Scheduler = Literal["cosine", "linear", "constant"]
Sharding = Literal["none", "fsdp", "zero2", "zero3"]
TrackerKind = Literal["wandb", "tensorboard", "mlflow"]


@dataclass(frozen=True)
class BaseRef:
    """The prepared base that is trained on: `path` is its folder, and in it `gguf`, the quantised file that is served, or
    `hf`, the folder as on Hugging Face that vLLM serves."""

    name: str
    path: str
    gguf: str | None
    digest: str  # of what is served, "sha256:…"
    hf: str | None = None


@dataclass(frozen=True)
class FileRef:
    """An input file, pinned in `data/`; `path` is relative to the job directory."""

    file_id: str
    filename: str
    digest: str
    path: str


@dataclass(frozen=True)
class Hyperparameters:
    """As the client asked; "auto" is resolved by the trainer's check and written to check.json."""

    n_epochs: int | Auto = "auto"
    batch_size: int | Auto = "auto"
    learning_rate_multiplier: float | Auto = "auto"
    beta: float | Auto = "auto"  # of dpo, kto and orpo


@dataclass(frozen=True)
class Lora:
    """`target_modules` is "all-linear", or the modules' last names with commas between them."""

    rank: int = 16
    alpha: int | float = 32  # the update is multiplied by alpha / rank, by alpha / sqrt(rank) with rsLoRA
    dropout: float = 0.0
    target_modules: str = "all-linear"
    use_rslora: bool = False


@dataclass(frozen=True)
class Options:
    """How to train, beyond OpenAI's hyperparameters."""

    precision: Precision = "auto"  # of the computing; auto: bf16 on a GPU that has it, else f32
    quantization: Quantization = "none"  # of the base while it is trained on, through bitsandbytes
    train_on: TrainOn = "assistant"
    packing: bool = False  # several conversations in one row, which do not see one another
    scheduler: Scheduler = "cosine"
    warmup_ratio: float = 0.05  # of all steps
    weight_decay: float = 0.0
    early_stopping_patience: int | None = (
        None  # full validations without a better loss; the best checkpoint is the result
    )
    checkpoint_steps: int | None = None  # a checkpoint every so many steps, beside the one at each epoch's end


@dataclass(frozen=True)
class Launch:
    """On how many processes of one machine a job trains, and how they share the model."""

    processes: int = 1
    sharding: Sharding = "none"


@dataclass(frozen=True)
class Tracker:
    """Where else a job's steps are told. The place is the operator's, never a client's; no field holds a secret."""

    kind: TrackerKind
    place: str = (
        ""  # TensorBoard: a folder. MLflow: a tracking URI. W&B: a server's URL. "" is the tracker's own default
    )
    project: str = "tunegate"  # W&B's project, MLflow's experiment
    name: str | None = None  # of the run; None: the job's id
    entity: str | None = None  # W&B's user or team
    tags: tuple[str, ...] = ()
    offline: bool = False  # W&B: into files, for `wandb sync`


@dataclass(frozen=True)
class JobSpec:
    """job.json. `max_length` is the context in tokens; `threads` is fixed so that a run can be repeated bit for bit."""

    job_id: str
    model: str
    created_at: int
    base: BaseRef
    training_file: FileRef
    validation_file: FileRef | None
    seed: int
    threads: int
    max_length: int
    template_digest: str
    method: Method = "supervised"
    hyperparameters: Hyperparameters = field(default_factory=Hyperparameters)
    lora: Lora = field(default_factory=Lora)
    options: Options = field(default_factory=Options)
    turns: Turns = "all"  # which of the assistant's are learnt
    starts_from: str | None = None  # the tuned model or checkpoint whose adapter is in start/
    launch: Launch = field(default_factory=Launch)
    integrations: tuple[dict[str, Any], ...] = ()  # as the client sent them; never a secret
    trackers: tuple[Tracker, ...] = ()  # those of the integrations and of the settings, one of a kind
    predictions: int = 0  # how many validation prompts are answered at each evaluation, for the trackers

    @property
    def needs_keys(self) -> bool:
        """Whether the trainer's environment must hold a tracker's key."""
        return any(TRACKER_SECRETS[tracker.kind] for tracker in self.trackers)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> JobSpec:
        validation = raw.get("validation_file")
        return cls(
            **{
                **raw,
                "base": BaseRef(**raw["base"]),
                "training_file": FileRef(**raw["training_file"]),
                "validation_file": FileRef(**validation) if validation else None,
                "hyperparameters": Hyperparameters(**raw["hyperparameters"]),
                "lora": Lora(**raw["lora"]),
                "options": Options(**raw.get("options", {})),
                "launch": Launch(**raw.get("launch", {})),
                "integrations": tuple(raw.get("integrations", ())),
                "trackers": tuple(Tracker(**{**t, "tags": tuple(t["tags"])}) for t in raw.get("trackers", ())),
            }
        )


@dataclass(frozen=True)
class TrainerError:
    """Why a job failed, as OpenAI's job.error has it."""

    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True)
class Check:
    """check.json: the data was read, rendered and counted; `error` is set when it cannot be trained on."""

    error: TrainerError | None = None
    n_examples: int = 0
    n_validation_examples: int = 0
    n_tokens: int = 0  # of one epoch, prompts included
    n_trained_tokens: int = 0  # of one epoch, labels other than -100
    n_truncated: int = 0
    n_epochs: int = 0
    batch_size: int = 0
    learning_rate_multiplier: float = 0.0
    beta: float | None = None  # where the method has one
    total_steps: int = 0
    estimated_memory_bytes: int = 0  # of the trainer at its peak
    notes: tuple[str, ...] = ()  # what was found, to be told: the form of the data, counts, the estimate
    warnings: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()  # the first bad lines, each with its number and field

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Check:
        error = raw.get("error")
        lists = {name: tuple(raw.get(name, ())) for name in ("notes", "warnings", "problems")}
        return cls(**{**raw, **lists, "error": TrainerError(**error) if error else None})


@dataclass(frozen=True)
class Result:
    """result.json, written last."""

    status: Literal["succeeded", "failed"]
    error: TrainerError | None = None
    trained_tokens: int = 0  # over all epochs
    steps: int = 0

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Result:
        error = raw.get("error")
        return cls(**{**raw, "error": TrainerError(**error) if error else None})


@dataclass(frozen=True)
class Event:
    """One line of events.jsonl.

    `type` is "message", "metrics" (data: step, total_steps, train_loss, train_mean_token_accuracy and, where measured,
    valid_loss, valid_mean_token_accuracy, full_valid_loss, full_valid_mean_token_accuracy), "checkpoint" (data: step and
    the same metrics; the folder is complete) or "progress" (data: estimated_finish, unix seconds; not shown to clients).
    """

    seq: int
    created_at: int
    type: Literal["message", "metrics", "checkpoint", "progress"]
    message: str
    level: Literal["info", "warn", "error"] = "info"
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prediction:
    """One line of predictions.jsonl: a validation prompt, the reply in the file, and the model's own as it was at `step`."""

    step: int
    prompt: str
    expected: str
    predicted: str


@dataclass(frozen=True)
class Holder:
    """Who holds the lock: a pid that is only trusted together with the start time of its process."""

    pid: int
    start_time: int  # clock ticks since boot, field 22 of /proc/PID/stat


class JobDir:
    """Paths of one job, and how each file in it is read and written."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.lock = self.path / "lock"
        self.pause = self.path / "pause"
        self.data = self.path / "data"
        self.template = self.path / "template"
        self.examples = self.path / "examples"
        self.start = self.path / "start"
        self.attempts = self.path / "attempts"
        self.checkpoints = self.path / "checkpoints"
        self.tracking = self.path / "tracking"
        self.adapter = self.path / "adapter"

    # the gateway writes these

    def write_spec(self, spec: JobSpec) -> None:
        write_json(self.path / "job.json", spec.to_json())

    def read_spec(self) -> JobSpec:
        return JobSpec.from_json(read_json(self.path / "job.json"))

    # the trainer writes these

    def write_check(self, check: Check) -> None:
        write_json(self.path / "check.json", asdict(check))

    def read_check(self) -> Check | None:
        path = self.path / "check.json"
        return Check.from_json(read_json(path)) if path.exists() else None

    def write_result(self, result: Result) -> None:
        write_json(self.path / "result.json", asdict(result))

    def read_result(self) -> Result | None:
        path = self.path / "result.json"
        return Result.from_json(read_json(path)) if path.exists() else None

    def events_path(self, attempt: int) -> Path:
        return self.attempts / str(attempt) / "events.jsonl"

    def predictions_path(self, attempt: int) -> Path:
        return self.attempts / str(attempt) / "predictions.jsonl"

    def next_attempt(self) -> int:
        """The number of the attempt that a trainer starting now should take: 1, 2, …"""
        taken = [int(p.name) for p in self.attempts.iterdir() if p.name.isdigit()] if self.attempts.is_dir() else []
        return max(taken, default=0) + 1

    # the lock

    def try_lock(self, wait_s: float = 1.0) -> int | None:
        """A file descriptor that holds the lock until it is closed, or None when another process holds it.

        Tries for `wait_s`, since `is_locked` in another process takes the lock shared for an instant.
        """
        fd = os.open(self.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    os.close(fd)
                    return None
                time.sleep(0.02)
        holder = Holder(os.getpid(), process_start_time(os.getpid()) or 0)
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps(asdict(holder)).encode(), 0)
        return fd

    def is_locked(self) -> bool:
        """Whether a trainer is alive. Takes the lock shared for an instant, never while one is held exclusively."""
        try:
            fd = os.open(self.lock, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    def holder(self) -> Holder | None:
        """The trainer that holds the lock; None when nobody does or its process is a stranger by now."""
        if not self.is_locked():
            return None
        try:
            holder = Holder(**json.loads(self.lock.read_bytes()))
        except (OSError, ValueError, TypeError):
            return None
        return holder if process_start_time(holder.pid) == holder.start_time else None


def read_events(path: Path, offset: int = 0) -> Iterator[tuple[Event, int]]:
    """Events from byte `offset` on, each with the offset after it. A torn last line is left for the next call."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield Event(**json.loads(line)), offset


def out_of_memory_message(spec: JobSpec | None, check: Check | None) -> str:
    """What to change so that it fits."""
    size = f" (it was {check.batch_size})" if check else ""
    length = f" (it was {spec.max_length})" if spec else ""
    quantised = "" if spec and spec.options.quantization != "none" else ', or quantization "nf4"'
    return f"Training ran out of memory. Set a smaller batch_size{size} or max_length{length}{quantised}"


def process_start_time(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat (clock ticks since boot); None when no such process is alive."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rsplit(")", 1)[1].split()
    return None if fields[0] in ("Z", "X") else int(fields[19])


def read_json(path: Path) -> Any:
    return json.loads(path.read_bytes())


def write_json(path: Path, value: Any) -> None:
    """Writes a file that is whole or absent, also after a power cut."""
    write_bytes(path, json.dumps(value, indent=1).encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes beside, fsyncs, renames, and fsyncs the folder."""
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def fsync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
