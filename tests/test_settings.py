"""Settings come from file, environment and command line in that order; what makes no sense refuses to start and says why."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.errors import SettingsError
from gateway.settings import DEMO_MODEL, load_settings


def load(tmp_path: Path, text: str = "", environ: dict[str, str] | None = None, **overrides: object) -> object:
    config = tmp_path / "tunegate.toml"
    config.write_text(text)
    return load_settings(config, environ or {}, overrides)


def test_without_anything_the_demo_model_is_served_on_loopback() -> None:
    settings = load_settings(None, {}, {})
    assert list(settings.bases) == [DEMO_MODEL]
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert settings.data_dir.is_absolute()


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    config = tmp_path / "t.toml"
    config.write_text("port = 1\n[jobs]\nparallel = 3\nqueued = 9\n")
    environ = {"TUNEGATE_PORT": "2", "TUNEGATE_JOBS_PARALLEL": "4", "TUNEGATE_ORGANIZATION": "acme"}
    settings = load_settings(config, environ, {"port": 5, "host": None})
    assert (settings.port, settings.jobs.parallel, settings.jobs.queued, settings.organization) == (5, 4, 9, "acme")


def test_paths_of_bases_are_relative_to_the_file(tmp_path: Path) -> None:
    config = tmp_path / "t.toml"
    config.write_text('[bases.mine]\npath = "model"\n[aliases]\n"gpt-4o-mini" = "mine"\n')
    settings = load_settings(config, {}, {})
    assert settings.bases["mine"].path == str(tmp_path.resolve() / "model")
    assert settings.aliases == {"gpt-4o-mini": "mine"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prot = 8000", "prot"),
        ("port = 'x'", "port"),
        ("[jobs]\nparalel = 2", "paralel"),
        ("[bases.x]\ntemplate = 'chatml'", "path"),
        ("[aliases]\na = 'nothing'", "'nothing', which is no base"),
        ("[bases.x]\npath = '.'\n[aliases]\nx = 'x'", "already the name"),
        ("port = ", "not valid TOML"),
    ],
)
def test_what_makes_no_sense_refuses_to_start_and_says_why(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        load(tmp_path, text)


def test_a_number_in_the_environment_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="TUNEGATE_PORT='x'"):
        load(tmp_path, environ={"TUNEGATE_PORT": "x"})


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nowhere\.toml"):
        load_settings(tmp_path / "nowhere.toml", {}, {})
