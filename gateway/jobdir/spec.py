"""job.json: what a job is to train on, and how. The gateway writes it once; the trainer reads it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Auto = Literal["auto"]
Turns = Literal["all", "last"]
TrainOn = Literal["assistant", "all"]
Method = Literal["supervised", "dpo", "kto", "orpo"]
Precision = Literal["auto", "f32", "bf16", "fp16"]
Quantization = Literal["none", "nf4", "int8"]
Scheduler = Literal["cosine", "linear", "constant"]
Sharding = Literal["none", "fsdp", "zero2", "zero3"]
TrackerKind = Literal["wandb", "tensorboard", "mlflow"]

# What a tracker may need of the environment that no log and no message may show.
TRACKER_SECRETS: dict[str, tuple[str, ...]] = {
    "wandb": ("WANDB_API_KEY",),
    "mlflow": ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"),
    "tensorboard": (),
}


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
