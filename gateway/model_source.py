"""What `tunegate models add` is given, looked at before anything is made of it. Pure but for a look at the disk."""

from __future__ import annotations

import os
from pathlib import Path

from gateway.bases import HF_TYPE
from gateway.errors import SettingsError

# As `trainer.export.quantise` makes them; a test holds the two equal.
WEIGHT_TYPES = (
    "f16 bf16 q4_0 q4_1 q5_0 q5_1 q8_0 q2_k q3_k_s q3_k_m q3_k_l q4_k_s q4_k_m q5_k_s q5_k_m q6_k iq4_nl iq4_xs"
).split()


def check_source(source: str, kind: str | None, revision: str | None) -> None:
    """SettingsError when the options do not go with the source, or when it is the path of nothing.

    `kind` and `revision` are None where they were not given.
    """
    if kind is not None and kind not in (*WEIGHT_TYPES, HF_TYPE):
        raise SettingsError(
            f"--type is {kind!r}; the types of weights are {', '.join(WEIGHT_TYPES)}, and {HF_TYPE} for vLLM"
        )
    path = Path(source).expanduser()
    if not os.path.exists(path):
        if _is_meant_as_path(source, path):
            raise SettingsError(
                f"there is no folder and no file {source}; a model on a hub is named ORG/NAME, where no folder ORG is here"
            )
        return
    if revision is not None:
        raise SettingsError(
            f"--revision is {revision!r}, and {source} is on this machine: a revision is one of a model on a hub. Leave it out"
        )
    if kind is not None and path.is_file():
        raise SettingsError(
            f"--type is {kind!r}, and {source} is a file that is ready: its weights are served as they are. Leave it out, or "
            "add the model's folder"
        )


def _is_meant_as_path(source: str, path: Path) -> bool:
    begins = source.startswith(("/", "./", "../", "~"))
    return begins or source.count("/") > 1 or source.endswith(".gguf") or ("/" in source and path.parent.is_dir())
