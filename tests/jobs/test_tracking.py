"""Which trackers a job is told to, and that a key gets into the environment of a trainer that needs it and nowhere else."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from gateway.bases import PreparedBase
from gateway.engines.engine import Engine
from gateway.errors import RequestError, SettingsError
from gateway.jobdir import BaseRef, FileRef, JobDir, JobSpec, Tracker
from gateway.jobs.launcher import Launcher
from gateway.jobs.tracking import Trackers, tracker_environment
from gateway.settings import Settings, load_settings
from gateway.tracking_settings import TrackingSettings
from tests.jobs.fake_trainer import Plan
from tests.jobs.parts import open_workshop
from tests.jobs.test_routes import front_door

pytestmark = pytest.mark.anyio

ASKED = {"type": "wandb", "wandb": {"project": "lamps", "name": "one", "entity": "acme", "tags": ["a"]}}
SHOW_ENVIRONMENT = "import json, os, pathlib; pathlib.Path('seen.json').write_text(json.dumps(dict(os.environ)))"


def settings(tmp_path: Path, text: str, environ: dict[str, str] | None = None) -> Settings:
    config = tmp_path / "tunegate.toml"
    config.write_text(text)
    return load_settings(config, environ or {}, {})


def test_a_job_is_told_to_what_it_asks_for_and_to_what_every_job_has() -> None:
    given = TrackingSettings(every_job=["tensorboard", "wandb"], wandb_url="https://wandb.local", wandb_mode="offline")
    trackers = Trackers(given, Path("/data/tracking"))
    board = Tracker("tensorboard", "/data/tracking/tensorboard")
    own = Tracker("wandb", "https://wandb.local", "lamps", "one", "acme", ("a",), offline=True)
    assert trackers.of([ASKED]) == (own, board)
    assert trackers.of([]) == (board, Tracker("wandb", "https://wandb.local", "tunegate", offline=True))
    assert trackers.of([{"type": "mlflow"}])[0] == Tracker("mlflow", "sqlite:////data/tracking/mlflow.db")


def test_what_is_not_installed_is_refused_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    trackers = Trackers(TrackingSettings(), Path("/data/tracking"))
    for kind, param in (("wandb", "integrations"), ("mlflow", "tunegate.tracking")):
        monkeypatch.setitem(sys.modules, kind, None)  # as Python itself notes a package that is not to be found
        with pytest.raises(RequestError, match=r"pip install 'tunegate\[track\]'") as refused:
            trackers.of([{"type": kind}])
        assert refused.value.param == param


def test_two_runs_of_a_kind_are_refused() -> None:
    with pytest.raises(RequestError, match="'wandb' twice"):
        Trackers(TrackingSettings(), Path("/data")).of([ASKED, ASKED])


def test_settings_of_trackers_come_from_file_and_environment(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret")
    text = "[tracking]\nevery_job = ['tensorboard']\nwandb_api_key_file = 'key'\ntensorboard_folder = 'boards'\n"
    found = settings(tmp_path, text, {"TUNEGATE_TRACKING_WANDB_MODE": "offline", "TUNEGATE_TRACKING_PREDICTIONS": "2"})
    assert found.tracking.every_job == ["tensorboard"]
    assert found.tracking.wandb_api_key_file == str((tmp_path / "key").resolve())
    assert found.tracking.tensorboard_folder == str((tmp_path / "boards").resolve())
    assert (found.tracking.wandb_mode, found.tracking.predictions) == ("offline", 2)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("mlflow_uri = 'https://me:hunter2@mlflow.local'", "MLFLOW_TRACKING_PASSWORD"),
        ("mlflow_uri = 'mysql://mlflow.local/db'", "scheme 'mysql'"),
        ("wandb_url = 'wandb.local'", "scheme ''"),
        ("wandb_api_key_file = 'nowhere'", "there is no file"),
        ("every_job = ['comet']", "every_job"),
        ("predictions = 33", "predictions"),
    ],
)
def test_settings_of_trackers_that_make_no_sense_refuse_to_start(tmp_path: Path, line: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words) as refused:
        settings(tmp_path, f"[tracking]\n{line}\n")
    assert "hunter2" not in str(refused.value)


def test_a_trainer_is_given_the_keys_of_its_own_trackers_only(tmp_path: Path) -> None:
    environ = {"WANDB_API_KEY": "w", "MLFLOW_TRACKING_TOKEN": "m", "HTTPS_PROXY": "http://proxy", "OTHER_KEY": "o"}
    given = TrackingSettings(wandb_api_key_file=str(tmp_path / "key"))
    board, wandb, mlflow = Tracker("tensorboard"), Tracker("wandb"), Tracker("mlflow")
    assert tracker_environment([], given, environ) == tracker_environment([board], given, environ) == {}
    assert tracker_environment([mlflow], given, environ) == {
        "MLFLOW_TRACKING_TOKEN": "m",
        "HTTPS_PROXY": "http://proxy",
    }
    assert tracker_environment([wandb], given, environ)["WANDB_API_KEY"] == "", "the file wins, and it is not there"
    (tmp_path / "key").write_text("from the file\n")
    assert tracker_environment([wandb], given, environ)["WANDB_API_KEY"] == "from the file"


@pytest.mark.parametrize(("trackers", "keys"), [((Tracker("wandb"),), ["WANDB_API_KEY"]), ((), [])])
async def test_the_launcher_hands_keys_to_the_trainer_and_never_to_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trackers: Sequence[Tracker], keys: list[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "planted")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "planted")
    folder = job_folder(tmp_path, tuple(trackers))
    launcher = Launcher((sys.executable, "-c", SHOW_ENVIRONMENT))
    for start, expected in ((launcher.train, keys), (launcher.check, [])):
        handle = await start(folder)
        assert await handle.wait(30)
        handle.close()
        seen = json.loads((folder.path / "seen.json").read_text())
        assert [name for name, value in seen.items() if value == "planted"] == expected


def job_folder(tmp_path: Path, trackers: tuple[Tracker, ...]) -> JobDir:
    folder = JobDir(tmp_path)
    file = FileRef("file-a", "a.jsonl", "sha256:0", "data/a.jsonl")
    numbers: dict[str, Any] = {"created_at": 0, "seed": 0, "threads": 1, "max_length": 8}
    folder.write_spec(
        JobSpec(
            job_id="ftjob-a",
            model="a",
            base=BaseRef("a", "/a", None, "sha256:0"),
            training_file=file,
            validation_file=None,
            template_digest="sha256:0",
            trackers=trackers,
            **numbers,
        )
    )
    assert folder.read_spec().trackers == trackers
    return folder


async def test_a_created_job_has_its_trackers_in_job_json_and_no_key(
    tmp_path: Path, base: PreparedBase, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "planted")
    plan = Plan(gate=str(tmp_path / "never"))
    async with open_workshop(tmp_path, base, engine, plan) as shop, front_door(shop) as client:
        job = await client.fine_tuning.jobs.create(
            model="tiny",
            training_file=await shop.upload(),
            integrations=[{"type": "wandb", "wandb": {"project": "lamps"}}],
            extra_body={"tunegate": {"tracking": ["tensorboard"]}},
        )
        folder = shop.folder_of(job.id)
        assert folder.read_spec().trackers == (
            Tracker("wandb", "", "lamps"),
            Tracker("tensorboard", str(shop.data_dir.tracking / "tensorboard")),
        )
        assert folder.read_spec().predictions == 4
        assert b"planted" not in (folder.path / "job.json").read_bytes()
        await client.fine_tuning.jobs.cancel(job.id)
