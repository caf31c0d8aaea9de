"""Settings come from file, environment and command line in that order; what makes no sense refuses to start and says why."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gateway.engine_settings import EngineSettings
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
        ("[engines]\nmemory_bytes = 1", "engines"),
        ("[jobs]\nprocesses = 0", "processes"),
        ("[jobs]\nprocesses = 2\nsharding = 'zero'", "sharding"),
    ],
)
def test_what_makes_no_sense_refuses_to_start_and_says_why(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        load(tmp_path, text)


BASES = '[bases.a]\npath = "."\n[bases.b]\npath = "."\n[aliases]\nalias = "a"\n'


def engines(tmp_path: Path, *entries: str, environ: dict[str, str] | None = None) -> list[EngineSettings]:
    config = tmp_path / "tunegate.toml"
    config.write_text(BASES + "".join(f"[[engines]]\n{entry}\n" for entry in entries))
    return load_settings(config, environ or {}, {}).engines


def test_engines_are_given_with_their_keys_and_paths(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("from-a-file\n")
    (tmp_path / "python").touch()
    found = engines(
        tmp_path,
        'kind = "llama"\nmodel = "a"\nreplicas = 2',
        'kind = "vllm"\nmodel = "b"\npython = "python"\nargs = ["--enforce-eager"]',
        'kind = "vllm"\nmodel = "b"\nurls = ["http://Machine:8000/"]\nkey_file = "key"\npaths = {"/here" = "/there"}',
        'kind = "upstream"\nmodel = "judge"\nurls = ["https://api.example.com/v1/"]\nkey_env = "KEY"\nserved_name = "gpt-9"',
        environ={"KEY": "from-the-environment"},
    )
    assert [engine.key for engine in found] == [None, None, "from-a-file", "from-the-environment"]
    assert found[1].python == str(tmp_path / "python")
    assert found[2].urls == ["http://machine:8000"] and found[3].urls == ["https://api.example.com/v1"]
    assert "from-" not in repr(found)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ('kind = "ollama"\nmodel = "a"', "ollama"),
        ('kind = "llama"', "model"),
        ('kind = "llama"\nmodel = ""', "1 to 200 characters"),
        ('kind = "llama"\nmodel = "nothing"', "'nothing' is no base"),
        ('kind = "llama"\nmodel = "a"\nreplica = 2', "replica"),
        ('kind = "llama"\nmodel = "a"\nreplicas = 0', "replicas = 0; it is 1 to 64"),
        ('kind = "llama"\nmodel = "a"\nreplicas = 2\nurls = ["http://h:1"]', "`replicas` has no meaning"),
        ('kind = "llama"\nmodel = "a"\nkey = "k"', "`key` has no meaning"),
        ('kind = "llama"\nmodel = "a"\nargs = ["--x"]', "`args` has no meaning"),
        ('kind = "llama"\nmodel = "a"\nurls = ["https://h:1"]', "is not http://HOST:PORT"),
        ('kind = "llama"\nmodel = "a"\nurls = ["http://h"]', "is not http://HOST:PORT"),
        ('kind = "llama"\nmodel = "a"\nurls = ["http://h:1/v1"]', "is not http://HOST:PORT"),
        ('kind = "llama"\nmodel = "a"\nurls = ["http://h:99999"]', "cannot be read"),
        ('kind = "llama"\nmodel = "a"\nurls = ["http://h:1", "http://H:1/"]', "names a server twice"),
        ('kind = "vllm"\nmodel = "a"', "needs `python`"),
        ('kind = "vllm"\nmodel = "a"\npython = "nowhere"', "'nowhere' is no file"),
        ('kind = "vllm"\nmodel = "a"\nurls = ["http://h:1"]\npaths = {"a" = "/b"}', "both are absolute"),
        ('kind = "upstream"\nmodel = "u"', "needs `urls`"),
        ('kind = "vllm"\nmodel = "a"\nurls = ["http://h:1"]\nmax_lora_rank = 0', "max_lora_rank = 0"),
        ('kind = "upstream"\nmodel = "a"\nurls = ["https://h/v1"]', "which is a base or an alias already"),
        ('kind = "upstream"\nmodel = "alias"\nurls = ["https://h/v1"]', "which is a base or an alias already"),
        ('kind = "upstream"\nmodel = "u"\nurls = ["file:///etc/passwd"]', "is not http"),
        ('kind = "upstream"\nmodel = "u"\nurls = ["https://h/v1?x=1"]', "is not http"),
        ('kind = "upstream"\nmodel = "u"\nurls = ["https://me:secret@h/v1"]', "holds a user or a password"),
        ('kind = "upstream"\nmodel = "u"\nurls = ["https://h/v1"]\nkey = "a"\nkey_env = "B"', "give one of"),
        ('kind = "upstream"\nmodel = "u"\nurls = ["https://h/v1"]\nkey_env = "NOT_SET"', "no such variable"),
        ('kind = "upstream"\nmodel = "u"\nurls = ["https://h/v1"]\nkey_file = "nowhere"', "'nowhere' cannot be read"),
        ('kind = "upstream"\nmodel = "u"\nurls = ["https://h/v1"]\nkey = "secret\\r\\nx: y"', "in one line"),
    ],
)
def test_an_engine_that_makes_no_sense_is_refused_without_telling_its_key(
    tmp_path: Path, entry: str, words: str
) -> None:
    with pytest.raises(SettingsError, match=re.escape(words)) as refused:
        engines(tmp_path, entry)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ('kind = "llama"\nmodel = "a"', 'kind = "vllm"\nmodel = "a"\nurls = ["http://h:1"]', "llama and vllm"),
        (
            'kind = "llama"\nmodel = "a"\nurls = ["http://h:1"]',
            'kind = "llama"\nmodel = "a"\nurls = ["http://h:1"]',
            "same url",
        ),
        (
            'kind = "upstream"\nmodel = "u"\nurls = ["http://h/v1"]',
            'kind = "upstream"\nmodel = "u"\nurls = ["http://i/v1"]',
            "two upstream entries",
        ),
    ],
)
def test_engines_that_do_not_go_together_are_refused(tmp_path: Path, first: str, second: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        engines(tmp_path, first, second)


def test_a_number_in_the_environment_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="TUNEGATE_PORT='x'"):
        load(tmp_path, environ={"TUNEGATE_PORT": "x"})


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nowhere\.toml"):
        load_settings(tmp_path / "nowhere.toml", {}, {})
