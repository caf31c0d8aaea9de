"""`python -m trainer JOB_DIR --check`: the data read, rendered, counted and stored; "auto" resolved. check.json holds it.

Place in the flow: before training, and again by hand at any time. One rule: imports no torch, so that it answers at once.
"""

from __future__ import annotations

from dataclasses import replace

from gateway.jobdir import Check, JobDir, JobSpec, TrainerError
from trainer.auto import Resolved, resolve
from trainer.data.dataset import Prepared, prepare_examples, read_bundle
from trainer.data.survey import MIN_EXAMPLES
from trainer.estimate import machine_bytes, memory_bytes, read_shape


def run_check(job: JobDir, spec: JobSpec) -> Check:
    """What check.json will say; the examples are stored. Raises only for what is not the client's fault."""
    bundle = read_bundle(job)
    if bundle.digest != spec.template_digest:
        raise ValueError(f"template/ is {bundle.digest}, but job.json was written for {spec.template_digest}")
    training, validation = prepare_examples(job, spec)
    files = [("training", training)] + ([("validation", validation)] if validation else [])
    survey = training.survey
    chosen = resolve(spec.hyperparameters, survey.n_examples, spec.method)
    total_steps = chosen.total_steps(survey.n_examples)
    memory, had = _memory(spec, training, chosen)
    check = Check(
        error=next(filter(None, (_error(kind, file) for kind, file in files)), None),
        n_examples=survey.n_examples,
        n_validation_examples=validation.survey.n_examples if validation else 0,
        n_tokens=survey.n_tokens,
        n_trained_tokens=survey.n_trained_tokens,
        n_truncated=survey.n_truncated,
        n_epochs=chosen.n_epochs,
        batch_size=chosen.batch_size,
        learning_rate_multiplier=chosen.learning_rate_multiplier,
        beta=chosen.beta,
        total_steps=total_steps,
        estimated_memory_bytes=memory,
        notes=tuple(note for kind, file in files if (note := _note(kind, file))),
        warnings=tuple(warning for kind, file in files for warning in _warnings(kind, file, spec.max_length)),
        problems=tuple(
            f"{kind.capitalize()} file: {problem}" for kind, file in files for problem in file.survey.problems
        ),
    )
    return check if check.error else _with_plan(check, had)


def _memory(spec: JobSpec, training: Prepared, chosen: Resolved) -> tuple[int, int]:
    """(estimated, had) in bytes; 0 where the base's shape is not known."""
    shape, survey = read_shape(spec.base), training.survey
    had, on_gpu = machine_bytes()
    if shape is None or not survey.n_examples:
        return 0, had
    share = survey.n_trained_tokens / max(1, survey.n_tokens)
    return memory_bytes(shape, spec, chosen.batch_size, survey.longest, share, on_gpu), had


def _error(kind: str, file: Prepared) -> TrainerError | None:
    return file.error or file.survey.error(kind, MIN_EXAMPLES if kind == "training" else 1)


def _note(kind: str, file: Prepared) -> str | None:
    """What the file is: its form, and how much of what is in it."""
    survey = file.survey
    if file.form is None or not survey.n_examples:
        return None
    said = f"The {kind} file is in {file.form.name} ({file.form.keys}): {_counted(survey.n_examples, 'example')}"
    if survey.n_sequences > survey.n_examples and "kto" not in file.form.methods:  # a pair has two by nature
        said += f" in {survey.n_sequences} sequences"
    said += f", {survey.n_tokens:,} tokens, {survey.n_trained_tokens:,} of them trained"
    parts = [f"{count:,} {remark}" for remark, count in sorted(survey.remarks.items())]
    parts += [f"{survey.n_dropped:,} dropped"] if survey.n_dropped else []
    return f"{said} ({'; '.join(parts)})" if parts else said


def _warnings(kind: str, file: Prepared, max_length: int) -> list[str]:
    survey, found = file.survey, []
    if survey.n_truncated:
        found.append(
            f"{_counted(survey.n_truncated, 'example')} of the {kind} file {_are(survey.n_truncated)} longer than "
            f"{max_length} tokens and {'was' if survey.n_truncated == 1 else 'were'} shortened from the start"
        )
    if survey.n_dropped:
        found.append(
            f"{_counted(survey.n_dropped, 'conversation')} of the {kind} file {_are(survey.n_dropped)} not trained on: "
            "human and model do not take turns in it"
        )
    return found


def _with_plan(check: Check, had_bytes: int) -> Check:
    """The check with what training will take, and a warning where that is more than there is."""
    beta = "" if check.beta is None else f", beta {check.beta:g}"
    plan = (
        f"Training takes {check.total_steps:,} steps: {_counted(check.n_epochs, 'epoch')} of {check.n_examples:,} examples, "
        f"{check.batch_size} a step, learning rate multiplier {check.learning_rate_multiplier:g}{beta}; "
        f"{check.n_tokens * check.n_epochs:,} tokens in all"
    )
    if not check.estimated_memory_bytes:
        return replace(check, notes=(*check.notes, plan))
    memory = f"{check.estimated_memory_bytes / 2**30:.1f} GiB"
    warnings = check.warnings
    if check.estimated_memory_bytes > had_bytes:
        warnings += (
            f"Training is estimated to take {memory} of memory, and there are {had_bytes / 2**30:.1f} GiB. Set a smaller "
            "batch_size or max_length, or 'quantization' to \"nf4\"",
        )
    return replace(check, notes=(*check.notes, f"{plan}; about {memory} of memory"), warnings=warnings)


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _are(count: int) -> str:
    return "is" if count == 1 else "are"
