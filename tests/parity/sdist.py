"""The llama-cpp-python sdist: real vocabularies with the ids that llama.cpp gives, and chat templates of real models.

It is downloaded once into the user's cache (some 75 MB, about half a minute) and never becomes part of this repository.
"""

from __future__ import annotations

import tempfile
from functools import cache
from importlib.metadata import version
from pathlib import Path

from trainer.export.llama_source import sdist_archive, unpack
from trainer.export.tensors import UnsupportedModel

_MEMBERS = ("models/templates/", "models/ggml-vocab-")


class SdistUnavailable(RuntimeError):
    """Says what was tried and how to help."""


@cache
def llama_cpp_models() -> Path:
    """The folder `models` of llama.cpp at the library's commit. Raises SdistUnavailable."""
    try:
        archive = sdist_archive()
    except UnsupportedModel as error:
        raise SdistUnavailable(str(error)) from error
    folder = archive.parent / f"models-{version('llama-cpp-python')}"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=archive.parent) as beside:
            whole = unpack(archive, _MEMBERS, Path(beside) / "whole")
            try:
                whole.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was first
                    raise
    return folder / "models"
