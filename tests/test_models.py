"""`tunegate models`: what is added is there, whole, once; what is in use stays; what breaks off goes on."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gateway.errors import SettingsError
from gateway.jobdir import process_start_time, read_json, write_json
from gateway.model_source import WEIGHT_TYPES
from gateway.models import add_model, added_names, default_name, list_models, remove_model
from gateway.models_command import cli
from gateway.settings import load_settings
from gateway.store import models as model_statements
from gateway.store.database import Store
from gateway.store.models import ModelRow
from tests.loopback_hub import Hub, loopback_hub
from tests.tiny_gguf import write_tiny_gguf
from tests.tiny_model import write_tiny_model
from trainer.export.quantise import TYPES

ROOT = Path(__file__).resolve().parent.parent


def tunegate(*arguments: str, data: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gateway", "models", *arguments, "--data", str(data)],
        cwd=ROOT,
        env=os.environ | {"NO_COLOR": "1", "COLUMNS": "200"} | environ,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    write_tiny_model(tmp_path / "hub" / "tiny-org" / "Tiny-1M")
    with loopback_hub(tmp_path / "hub") as running:
        yield running


def test_a_folder_is_added_listed_and_removed(tmp_path: Path) -> None:
    source, data = write_tiny_model(tmp_path / "My model"), tmp_path / "data"
    added = tunegate("add", str(source), "--template", "alpaca", "--type", "q8_0", data=data)
    assert added.returncode == 0, added.stderr
    assert "'My-model' is ready" in added.stdout and "A running server takes it up" in added.stdout
    listed = tunegate("list", data=data).stdout
    assert re.search(rf"My-model .*LlamaForCausalLM .* yes .*{re.escape(str(source))}", listed)
    described = json.loads((data / "bases/My-model/base.json").read_text())
    assert (described["template"], described["gguf"]) == ("alpaca", "model.q8_0.gguf")
    removed = tunegate("remove", "My-model", data=data)
    assert removed.returncode == 0 and re.search(r"is removed, \d\.\d MB are free again", removed.stdout)
    assert not list((data / "bases").glob("[!.]*")) and source.is_dir()


def test_a_model_of_a_hub_is_added_under_its_own_name(hub: Hub, tmp_path: Path) -> None:
    hub.token = "hf_verysecret"
    data, environ = tmp_path / "data", {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}
    refused = tunegate("add", "tiny-org/Tiny-1M", "--template", "alpaca", data=data, HF_TOKEN="wrong", **environ)
    assert refused.returncode == 2 and "set HF_TOKEN" in refused.stderr
    added = tunegate("add", "tiny-org/Tiny-1M", "--template", "alpaca", data=data, HF_TOKEN=hub.token, **environ)
    assert added.returncode == 0, added.stderr
    assert hub.token not in added.stdout + added.stderr
    assert [path.name for path in (data / "bases").glob("[!.]*")] == ["Tiny-1M"]
    assert not list((data / "bases").glob(".fetching-*"))
    assert not any(hub.token.encode() in path.read_bytes() for path in data.rglob("*") if path.is_file())


def test_a_killed_add_is_seen_by_nobody_and_gone_on_with(hub: Hub, tmp_path: Path) -> None:
    data = tmp_path / "data"
    whole = (hub.root / "tiny-org/Tiny-1M/model.safetensors").stat().st_size
    part = data / "bases/.fetching-Tiny-1M/model.safetensors.part"
    environ = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": ""}
    command = [sys.executable, "-m", "gateway", "models", "add", "tiny-org/Tiny-1M", "--template", "alpaca"]
    command += ["--data", str(data)]
    hub.stall_after_bytes = 60_000
    adding = subprocess.Popen(command, cwd=ROOT, env=environ, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (part.is_file() and part.stat().st_size == 60_000):
        assert time.monotonic() < deadline and adding.poll() is None
        time.sleep(0.02)
    os.killpg(adding.pid, 9)
    adding.wait()
    hub.stall_after_bytes = None
    assert list_models(data / "bases") == [] and added_names(data / "bases") == {}
    hub.requests.clear()
    again = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert [headers.get("range") for headers in hub.asked("/cdn/tiny-org/Tiny-1M/model.safetensors")] == [
        "bytes=60000-"
    ]
    assert whole > 60_000 and list(added_names(data / "bases")) == ["Tiny-1M"]


def test_what_a_broken_off_add_left_can_be_removed(tmp_path: Path) -> None:
    bases = tmp_path / "bases"
    (bases / ".fetching-half").mkdir(parents=True)
    (bases / ".fetching-half" / "model.safetensors.part").write_bytes(bytes(1000))
    assert remove_model(tmp_path, "half") == 1000
    assert not (bases / ".fetching-half").exists()


def test_a_name_is_taken_once(tmp_path: Path) -> None:
    source, bases = write_tiny_model(tmp_path / "source"), tmp_path / "data" / "bases"
    add_model(bases, str(source), "org/tiny:1", "alpaca", "q4_0")
    with pytest.raises(SettingsError, match="`tunegate models remove org/tiny:1` first"):
        add_model(bases, str(source), "org/tiny:1", "alpaca", "q4_0")
    assert [model.name for model in list_models(bases)] == ["org/tiny:1"]
    assert remove_model(tmp_path / "data", "org/tiny:1") > 0


@pytest.mark.parametrize("name", ["", "../x", ".hidden", "a/../b", "a//b", "/etc", "a b", "x" * 201])
def test_a_name_that_could_lead_out_of_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be a model's name"):
        add_model(tmp_path, "org/source", name, "alpaca", "q4_0")
    with pytest.raises(SettingsError, match="cannot be a model's name"):
        remove_model(tmp_path, name)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen2.5-0.5B-Instruct"),
        ("m/tiny.Q4_K_M.gguf", "tiny.Q4_K_M"),
        ("a/ü ü", "model"),
    ],
)
def test_a_model_without_a_name_gets_one(source: str, name: str) -> None:
    assert default_name(source) == name


def test_a_source_that_is_nothing_is_said(tmp_path: Path) -> None:
    done = tunegate("add", "no-such-folder", data=tmp_path)
    assert done.returncode == 2 and "no folder, no .gguf file and no model id" in done.stderr
    brought_none = tunegate("add", str(write_tiny_model(tmp_path / "source")), data=tmp_path)
    assert brought_none.returncode == 2 and "brings no chat template" in brought_none.stderr
    assert tunegate("remove", "source", data=tmp_path).returncode == 2


@pytest.mark.parametrize(
    ("source", "options", "said"),
    [
        ("tiny.gguf", ("--type", "q9"), "--type is 'q9'; the types of weights are f16, bf16, q4_0"),
        ("org/name", ("--type", "Q4_0"), "--type is 'Q4_0'; the types"),
        ("tiny.gguf", ("--type", "q8_0"), "--type is 'q8_0', and .*tiny.gguf is a file that is ready"),
        ("tiny.gguf", ("--revision", "main"), "--revision is 'main', and .*tiny.gguf is on this machine"),
        (".", ("--revision", "main"), "is on this machine"),
        ("./mistyped", (), "there is no folder and no file ./mistyped"),
        ("~/mistyped", (), "there is no folder and no file ~/mistyped"),
        ("a/b/c", (), "there is no folder and no file a/b/c"),
        ("models/mistyped", (), "there is no folder and no file models/mistyped"),
        ("mistyped.gguf", (), "there is no folder and no file mistyped.gguf"),
    ],
)
def test_what_does_not_go_with_a_source_is_refused_with_the_reason(
    source: str, options: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli, ["add", source, *options, "--data", "data"])
    assert done.exit_code == 2 and re.search(said, done.stderr) and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "data").exists()


def test_the_types_of_weights_are_those_that_the_trainer_makes() -> None:
    assert list(TYPES) == WEIGHT_TYPES


def test_the_demo_model_is_listed_as_what_it_is(tmp_path: Path) -> None:
    source = str(write_tiny_model(tmp_path / "source"))
    for name in ("tunegate-demo", "other"):
        model = add_model(tmp_path / "bases", source, name, "alpaca", "f16")
        write_json(model.path / "base.json", {**read_json(model.path / "base.json"), "added": None})
    listed = CliRunner(env={"COLUMNS": "200"}).invoke(cli, ["list", "--data", str(tmp_path)]).stdout
    assert re.search("tunegate-demo .*the demo model that ships with tunegate", listed)
    assert re.search("other .*a settings file", listed)


def test_a_model_that_tuned_models_stand_on_is_kept(tmp_path: Path) -> None:
    added = add_model(tmp_path / "bases", str(write_tiny_model(tmp_path / "source")), "tiny", "alpaca", "q4_0")
    row = ModelRow("ft:tiny:x", 1, "tiny", "sha256:0", "/a", "ft:tiny:x@0", "sha256:0", None, "x", None)
    _write(tmp_path, row, delete=False)
    with pytest.raises(SettingsError, match=r"in use: tuned models stand on it \(ft:tiny:x\)"):
        remove_model(tmp_path, "tiny")
    assert added.path.is_dir()
    _write(tmp_path, row, delete=True)
    assert remove_model(tmp_path, "tiny") > 0


def test_a_model_whose_engine_runs_is_kept(tmp_path: Path) -> None:
    add_model(tmp_path / "bases", str(write_tiny_model(tmp_path / "source")), "tiny", "alpaca", "q4_0")
    record = tmp_path / "engines/tiny/spawn.json"
    record.parent.mkdir(parents=True)
    write_json(record, {"pid": os.getpid(), "start_time": process_start_time(os.getpid())})
    with pytest.raises(SettingsError, match=f"its engine runs .process {os.getpid()}"):
        remove_model(tmp_path, "tiny")
    write_json(record, {"pid": os.getpid(), "start_time": 1})  # of a process before this one
    assert remove_model(tmp_path, "tiny") > 0


def test_a_base_of_the_settings_is_not_removed(tmp_path: Path) -> None:
    model = add_model(tmp_path / "bases", str(write_tiny_model(tmp_path / "source")), "tiny", "alpaca", "q4_0")
    described = json.loads((model.path / "base.json").read_text())
    del described["added"]
    write_json(model.path / "base.json", described)
    assert added_names(tmp_path / "bases") == {} and not list_models(tmp_path / "bases")[0].added
    with pytest.raises(SettingsError, match=r"remove \[bases.tiny\] there"):
        remove_model(tmp_path, "tiny")


def test_one_that_is_broken_is_listed_and_can_be_removed(tmp_path: Path) -> None:
    for name in ("whole", "broken"):
        add_model(tmp_path / "bases", str(write_tiny_model(tmp_path / name)), name, "alpaca", "q4_0")
    (tmp_path / "bases/broken/base.json").write_text("{")
    found = {model.name: model.architecture for model in list_models(tmp_path / "bases")}
    assert found == {"broken": "(broken)", "whole": "LlamaForCausalLM"}
    assert list(added_names(tmp_path / "bases")) == ["whole"]
    assert remove_model(tmp_path, "broken") > 0


def test_a_ready_file_frees_only_what_is_nowhere_else(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    added = add_model(tmp_path / "bases", str(path), "tiny", "alpaca")
    assert added.size_bytes > path.stat().st_size
    assert remove_model(tmp_path, "tiny") == added.size_bytes - path.stat().st_size
    assert path.is_file()


def test_settings_may_name_what_was_added_and_nothing_else(tmp_path: Path) -> None:
    config = tmp_path / "tunegate.toml"
    config.write_text(
        f'data = "{tmp_path}"\n[bases.tiny]\nidle_unload_s = 5\n[aliases]\ngpt = "tiny"\nother = "second"\n'
    )
    with pytest.raises(SettingsError, match="no model of that name was added"):
        load_settings(config, {}, {})
    for name in ("tiny", "second"):
        add_model(tmp_path / "bases", str(write_tiny_model(tmp_path / name)), name, "alpaca", "q4_0")
    settings = load_settings(config, {}, {})
    assert settings.limits.engine_memory_bytes is None
    limited = load_settings(config, {"TUNEGATE_LIMITS_ENGINE_MEMORY_BYTES": "5000000000"}, {})
    assert limited.limits.engine_memory_bytes == 5_000_000_000
    assert settings.bases["tiny"].path is None and settings.aliases == {"gpt": "tiny", "other": "second"}


def _write(data: Path, row: ModelRow, *, delete: bool) -> None:
    async def write() -> None:
        store = Store.open(data / "tunegate.db")
        try:
            if delete:
                await store.write(lambda connection: model_statements.delete(connection, row.project_id, row.name))
            else:
                await store.write(lambda connection: model_statements.insert_model(connection, row))
        finally:
            store.close()

    asyncio.run(write())


@pytest.mark.parametrize(("first", "second"), [("a", "a/b"), ("a/b", "a"), ("a", "a/b/c")])
def test_a_model_does_not_lie_in_the_folder_of_another(first: str, second: str, tmp_path: Path) -> None:
    source, bases = write_tiny_model(tmp_path / "model"), tmp_path / "data/bases"
    add_model(bases, str(source), first, "alpaca", "f16")
    with pytest.raises(SettingsError, match="cannot both be"):
        add_model(bases, str(source), second, "alpaca", "f16")
    assert [model.name for model in list_models(bases)] == [first]


def test_what_a_killed_remove_left_goes_with_the_next(tmp_path: Path) -> None:
    source, data = write_tiny_model(tmp_path / "model"), tmp_path / "data"
    left = data / "bases/.removing-m"
    for _ in range(2):
        left.mkdir(parents=True)
        (left / "model.gguf").write_bytes(b"x")
        add_model(data / "bases", str(source), "m", "alpaca", "f16")
        remove_model(data, "m")
        assert not left.exists()
    left.mkdir()
    remove_model(data, "m")
    assert not left.exists()
