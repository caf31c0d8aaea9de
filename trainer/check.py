"""`python -m trainer JOB_DIR --check`: the data read, rendered and counted; "auto" resolved. check.json holds it.

Place in the flow: before training, and again by hand at any time. One rule: imports no torch, so that it answers at once.
"""

from __future__ import annotations

import math

from gateway.jobdir import Check, Hyperparameters, JobDir, JobSpec, TrainerError
from trainer.dataset import MIN_EXAMPLES, Survey, prepare_examples, read_bundle

METHODS = ("supervised",)


def run_check(job: JobDir, spec: JobSpec) -> Check:
    """What check.json will say. Raises only for what is not the client's fault."""
    if spec.method not in METHODS:
        message = f"The method '{spec.method}' cannot be trained here yet; it must be {', '.join(METHODS)}"
        return Check(error=TrainerError("unsupported_method", message, "method"))
    bundle = read_bundle(job)
    if bundle.digest != spec.template_digest:
        raise ValueError(f"template/ is {bundle.digest}, but job.json was written for {spec.template_digest}")
    training, validation = prepare_examples(job, spec)
    error = training.error("training", MIN_EXAMPLES) or (validation and validation.error("validation", 1))
    warnings = _warnings("training", training, spec.max_length)
    warnings += _warnings("validation", validation, spec.max_length) if validation else []
    n_epochs, batch_size, multiplier = resolve(spec.hyperparameters, training.n_examples)
    return Check(
        error=error or None,
        n_examples=training.n_examples,
        n_validation_examples=validation.n_examples if validation else 0,
        n_tokens=training.n_tokens,
        n_trained_tokens=training.n_trained_tokens,
        n_truncated=training.n_truncated,
        n_epochs=n_epochs,
        batch_size=batch_size,
        learning_rate_multiplier=multiplier,
        total_steps=n_epochs * math.ceil(training.n_examples / batch_size),
        warnings=tuple(warnings),
    )


def resolve(asked: Hyperparameters, n_examples: int) -> tuple[int, int, float]:
    """Epochs, batch size and learning rate multiplier, with "auto" decided by how much data there is."""
    epochs = auto_epochs(n_examples) if asked.n_epochs == "auto" else asked.n_epochs
    batch = auto_batch_size(n_examples) if asked.batch_size == "auto" else asked.batch_size
    multiplier = 1.0 if asked.learning_rate_multiplier == "auto" else asked.learning_rate_multiplier
    return epochs, min(batch, max(1, n_examples)), multiplier


def auto_epochs(n_examples: int) -> int:
    """Three; more on little data (100 examples seen at the least), fewer on much (25,000 seen at the most)."""
    if n_examples * 3 < 100:
        return min(25, math.ceil(100 / max(1, n_examples)))
    return max(1, min(3, 25_000 // n_examples))


def auto_batch_size(n_examples: int) -> int:
    """0.2% of the examples, as OpenAI has it, but not under 4 (8 from 64 examples on): tiny batches waste a machine."""
    return min(256, max(4 if n_examples < 64 else 8, round(n_examples * 0.002)))


def _warnings(kind: str, survey: Survey, max_length: int) -> list[str]:
    found = [f"{kind.capitalize()} file: {problem}" for problem in survey.problems]
    if survey.n_truncated:
        found.append(
            f"{survey.n_truncated} example(s) of the {kind} file are longer than the model's {max_length} tokens "
            "and were shortened from their start"
        )
    return found
