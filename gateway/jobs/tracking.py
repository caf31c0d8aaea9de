"""Which trackers a job is told to, and what its trainer's environment must hold for them.

Its one rule: a client says which tracker and under what name, the operator where that is and with which key; so no key goes
to an address that a client chose, and none stands in job.json.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway.errors import RequestError
from gateway.jobdir import TRACKER_SECRETS, Tracker, TrackerKind
from gateway.tracking_settings import INSTALL, TrackingSettings, is_installed

# How to reach a server from here, for trackers that have one.
_NETWORK = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE")
_KEY_BYTES = 4096


@dataclass(frozen=True)
class Trackers:
    """`folder` is where trackers keep files that have no other place."""

    settings: TrackingSettings
    folder: Path

    def of(self, integrations: Iterable[Mapping[str, Any]]) -> tuple[Tracker, ...]:
        """Those that a job asks for, then those that every job has. RequestError when one cannot be had."""
        asked: dict[TrackerKind, Tracker] = {}
        for integration in integrations:
            kind: TrackerKind = integration["type"]
            param = "integrations" if kind == "wandb" else "tunegate.tracking"
            if kind in asked:
                raise RequestError(f"The job asks for '{kind}' twice; one run of a kind is made a job.", param=param)
            if not is_installed(kind):
                raise RequestError(f"'{kind}' is not installed on this server: {INSTALL}", param=param)
            asked[kind] = self._tracker(kind, integration.get(kind) or {})
        always: list[TrackerKind] = [kind for kind in self.settings.every_job if kind not in asked]
        return (*asked.values(), *(self._tracker(kind, {}) for kind in dict.fromkeys(always)))

    def _tracker(self, kind: TrackerKind, said: Mapping[str, Any]) -> Tracker:
        settings = self.settings
        if kind == "tensorboard":
            return Tracker(kind, settings.tensorboard_folder or str(self.folder / "tensorboard"))
        if kind == "mlflow":
            uri = settings.mlflow_uri or f"sqlite:///{self.folder / 'mlflow.db'}"
            return Tracker(kind, uri, settings.mlflow_experiment)
        return Tracker(
            kind,
            settings.wandb_url or "",
            said.get("project") or settings.wandb_project,
            said.get("name"),
            said.get("entity") or settings.wandb_entity,
            tuple(said.get("tags") or ()),
            offline=settings.wandb_mode == "offline",
        )


def tracker_environment(
    trackers: Iterable[Tracker], settings: TrackingSettings, environ: Mapping[str, str]
) -> dict[str, str]:
    """What a trainer with these trackers is given besides: their keys and the way out. Blocks: key files are read."""
    kinds = {tracker.kind for tracker in trackers if TRACKER_SECRETS[tracker.kind]}
    if not kinds:
        return {}
    names = [name for kind in sorted(kinds) for name in TRACKER_SECRETS[kind]]
    names += [form for name in _NETWORK for form in (name, name.lower())]
    given = {name: environ[name] for name in names if name in environ}
    for kind, name, file in (
        ("wandb", "WANDB_API_KEY", settings.wandb_api_key_file),
        ("mlflow", "MLFLOW_TRACKING_TOKEN", settings.mlflow_token_file),
    ):
        if kind in kinds and file is not None:
            given[name] = _read_key(Path(file))
    return given


def _read_key(path: Path) -> str:
    """Empty where it cannot be read: the tracker then says that it has none, and the job goes on."""
    try:
        with path.open("rb") as file:
            return file.read(_KEY_BYTES).decode().strip()
    except (OSError, ValueError):
        return ""
