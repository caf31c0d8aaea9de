"""The [tracking] table: which trackers jobs are told to, and where those are.

Its one rule: no setting holds a secret. Keys come from the environment or from files that are named here, and an address with
a password in it is refused, since addresses are written into job.json.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

import msgspec

from gateway.errors import SettingsError

Kind = Literal["wandb", "tensorboard", "mlflow"]
INSTALL = "pip install 'tunegate[track]'"


class TrackingSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    every_job: list[Kind] = []  # that each job is told to, besides those it asks for
    predictions: Annotated[int, msgspec.Meta(ge=0, le=32)] = (
        4  # validation prompts that are answered at each evaluation
    )
    wandb_mode: Literal["online", "offline"] = "online"
    wandb_project: str = "tunegate"  # of jobs that name none
    wandb_entity: str | None = None
    wandb_url: str | None = None  # of a server of one's own
    wandb_api_key_file: str | None = None
    tensorboard_folder: str | None = None  # None: tracking/tensorboard in the data folder
    mlflow_uri: str | None = None  # None: tracking/mlflow.db in the data folder
    mlflow_experiment: str = "tunegate"
    mlflow_token_file: str | None = None


def is_installed(kind: Kind) -> bool:
    """Whether a trainer will find the tracker's package. Looked for, never imported."""
    return find_spec(kind) is not None


def complete_tracking(settings: TrackingSettings, folder: Path) -> TrackingSettings:
    """With whole paths; relative ones start at `folder`. Raises SettingsError."""
    for kind in settings.every_job:
        if not is_installed(kind):
            raise SettingsError(f"[tracking] every_job names '{kind}', which is not installed: {INSTALL}")
    _check_address("wandb_url", settings.wandb_url, ("http", "https"))
    _check_address("mlflow_uri", settings.mlflow_uri, ("http", "https", "sqlite"))
    paths = {}
    for name in ("wandb_api_key_file", "mlflow_token_file", "tensorboard_folder"):
        if (given := getattr(settings, name)) is not None:
            path = (folder / Path(given).expanduser()).resolve()
            if name.endswith("_file") and not path.is_file():
                raise SettingsError(f"[tracking] {name}: there is no file {path}")
            paths[name] = str(path)
    return msgspec.structs.replace(settings, **paths)


def _check_address(name: str, value: str | None, schemes: tuple[str, ...]) -> None:
    if value is None:
        return
    address = urlsplit(value)
    if address.scheme not in schemes:
        raise SettingsError(
            f"[tracking] {name} has the scheme '{address.scheme}'; it must be one of {', '.join(schemes)}"
        )
    if "@" in address.netloc:
        raise SettingsError(
            f"[tracking] {name} holds a user or a password; leave them out and set WANDB_API_KEY, MLFLOW_TRACKING_TOKEN, or "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the server's environment"
        )
