"""The input files of a job → stored examples; and what the files are found to be.

Place in the flow: rendering → **dataset** → examples. One rule: memory does not grow with a file. No torch: the check runs
without it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gateway.chat.bundle import Bundle
from gateway.jobdir import FileRef, JobDir, JobSpec, TrainerError, Turns
from trainer.data.examples import Examples, open_examples, write_examples
from trainer.data.forms import Form, fitting_forms, form_of
from trainer.data.jsonl import read_lines, split_file
from trainer.data.lines import BadLine, Line, Raw
from trainer.data.rendering import Renderer, Rendering
from trainer.data.survey import Survey, render_chunk
from trainer.data.workers import render_in_parallel

PARALLEL_FROM_BYTES = 4 << 20
_FORMAT = 1  # of what is rendered: another number, and examples that were stored before are not used
_CHUNK_BYTES, _CHUNK_LINES = 256 << 10, 512


@dataclass(frozen=True)
class Prepared:
    """One file, read to its end and, without a problem, stored. `error` is set where its form is not the method's."""

    survey: Survey
    form: Form | None
    error: TrainerError | None = None


def read_bundle(job: JobDir) -> Bundle:
    """The template bundle that the job was given."""
    return Bundle.from_files({path.name: path.read_bytes() for path in job.template.iterdir() if path.is_file()})


def prepare_examples(job: JobDir, spec: JobSpec) -> tuple[Prepared, Prepared | None]:
    """Reads and renders every line of both files, and stores the examples of each that has no problem.

    Raises OSError for a disk that is full.
    """
    rendering = Rendering(read_bundle(job), spec.max_length, spec.turns, spec.options.train_on, spec.method)
    training = _prepare(job, spec, spec.training_file, "training", rendering)
    if spec.validation_file is None:
        return training, None
    return training, _prepare(job, spec, spec.validation_file, "validation", rendering)


def stored_examples(job: JobDir, spec: JobSpec) -> tuple[Examples, Examples | None]:
    """What `prepare_examples` wrote for this very spec: training and validation. Raises StaleExamples."""
    training = open_examples(job.examples / "training", _identity(spec, spec.training_file))
    if spec.validation_file is None:
        return training, None
    return training, open_examples(job.examples / "validation", _identity(spec, spec.validation_file))


def load_examples(path: Path, bundle: Bundle, max_length: int, turns: Turns = "all") -> Examples:
    """All conversations of a file that has no problem, in memory."""
    renderer = Renderer(Rendering(bundle, max_length, turns), file_form(path))
    survey, examples = render_chunk(renderer, list(split_file(path)))
    if survey.problems:
        raise ValueError(str(survey.problems[0]))
    return examples


def file_form(path: Path) -> Form | None:
    """The form that the first line with a known one tells."""
    forms = (form_of(line.value) for line in read_lines(path) if isinstance(line, Line))
    return next((form for form in forms if form is not None), None)


def _prepare(job: JobDir, spec: JobSpec, file: FileRef, kind: str, rendering: Rendering) -> Prepared:
    path = job.path / file.path
    form = file_form(path)
    if form is not None and spec.method not in form.methods:
        return Prepared(Survey(), form, _unfitting(spec, form, kind))
    survey = Survey()
    try:
        with write_examples(job.examples / kind, _identity(spec, file)) as writer:
            for found, examples in _rendered(path, rendering, form, spec.threads):
                survey.merge(found)
                if not survey.n_problems:
                    writer.extend(examples)
            if survey.n_problems:
                raise _Unusable
    except _Unusable:
        pass
    return Prepared(survey, form)


class _Unusable(Exception):
    """Ends the writing of examples that nobody may train on."""


def _rendered(path: Path, rendering: Rendering, form: Form | None, threads: int) -> Iterator[tuple[Survey, Examples]]:
    """The file chunk by chunk; a large one on several processes, since rendering holds the interpreter."""
    chunks = _chunks(split_file(path))
    if threads > 1 and path.stat().st_size >= PARALLEL_FROM_BYTES:
        return render_in_parallel(rendering, form, chunks, threads)
    renderer = Renderer(rendering, form)
    return (render_chunk(renderer, chunk) for chunk in chunks)


def _chunks(raws: Iterable[Raw | BadLine]) -> Iterator[list[Raw | BadLine]]:
    chunk: list[Raw | BadLine] = []
    size = 0
    for raw in raws:
        chunk.append(raw)
        size += len(raw.content) if isinstance(raw, Raw) else 0
        if size >= _CHUNK_BYTES or len(chunk) >= _CHUNK_LINES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _unfitting(spec: JobSpec, form: Form, kind: str) -> TrainerError:
    message = (
        f"The {kind} file is in {form.name} ({form.keys}), which the method{'s' if len(form.methods) > 1 else ''} "
        f"{', '.join(form.methods)} can train on. The method '{spec.method}' needs {fitting_forms(spec.method)}"
    )
    return TrainerError(f"invalid_{kind}_file", message, f"{kind}_file")


def _identity(spec: JobSpec, file: FileRef) -> str:
    """Names all that a file's ids and labels follow from."""
    options = [spec.max_length, spec.turns, spec.method, spec.options.train_on]
    return hashlib.sha256(json.dumps([_FORMAT, file.digest, spec.template_digest, *options]).encode()).hexdigest()
