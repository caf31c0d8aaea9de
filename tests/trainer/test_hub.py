"""Models from a hub, over the wire that the hub's own client speaks, on loopback."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.loopback_hub import Hub, loopback_hub
from tests.tiny_model import write_tiny_model
from trainer.export import hub as client
from trainer.export.hf_folder import HfFolder
from trainer.export.progress import Progress
from trainer.export.tensors import UnsupportedModel

REPO = "tiny-org/tiny"
TOKEN = "hf_secretsecretsecret"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    source = write_tiny_model(tmp_path / "hub" / REPO)
    (source / "pytorch_model.bin").write_bytes(b"a pickle")
    (source / "modeling_tiny.py").write_text("raise SystemExit")
    with loopback_hub(tmp_path / "hub") as running:
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        monkeypatch.setenv("HF_TOKEN", "")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        yield running


def fetch(into: Path, repo: str = REPO) -> Path:
    return client.fetch(repo, None, into, Progress("tiny"))


def test_a_model_is_fetched_without_what_could_run(hub: Hub, tmp_path: Path) -> None:
    folder = fetch(tmp_path / "fetched")
    source = hub.root / REPO
    names = {path.name for path in folder.iterdir()} - {".hub.json"}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"}
    assert all((folder / name).read_bytes() == (source / name).read_bytes() for name in names)
    assert HfFolder(folder).architecture == "LlamaForCausalLM"
    assert not hub.asked("pytorch_model.bin") and not hub.asked("modeling_tiny.py")


def test_a_connection_that_breaks_is_taken_up_where_it_was(hub: Hub, tmp_path: Path) -> None:
    hub.break_after_bytes = 7000
    fetch(tmp_path / "fetched")
    ranges = [headers.get("range") for headers in hub.asked("model.safetensors") if headers["host"].startswith("local")]
    assert ranges == [None, "bytes=7000-"]


def test_a_killed_download_is_gone_on_with_by_the_next_process(hub: Hub, tmp_path: Path) -> None:
    into = tmp_path / "fetched"
    whole = fetch(into) / "model.safetensors"
    content = whole.read_bytes()
    whole.unlink()
    (into / "model.safetensors.part").write_bytes(content[:9000])
    hub.requests.clear()
    assert fetch(into) == into and whole.read_bytes() == content
    assert [headers.get("range") for headers in hub.asked("/cdn/tiny-org/tiny/model.safetensors")] == ["bytes=9000-"]
    assert not hub.asked("config.json")


def test_another_commit_is_fetched_anew(hub: Hub, tmp_path: Path) -> None:
    fetch(tmp_path / "fetched")
    hub.commit = "d00d" * 10
    hub.requests.clear()
    fetch(tmp_path / "fetched")
    assert hub.asked(f"/resolve/{hub.commit}/config.json")


def test_content_that_is_not_what_the_hub_says_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.spoil = True
    with pytest.raises(UnsupportedModel, match="not what the hub says"):
        fetch(tmp_path / "fetched")
    assert not list((tmp_path / "fetched").glob("model.safetensors*"))


def test_a_model_that_asks_for_a_token_says_so(hub: Hub, tmp_path: Path) -> None:
    hub.token = TOKEN
    with pytest.raises(UnsupportedModel, match="set HF_TOKEN"):
        fetch(tmp_path / "fetched")


def test_the_token_goes_to_the_hub_and_nowhere_else(
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    hub.token = TOKEN
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    folder = fetch(tmp_path / "fetched")
    sent = hub.asked("config.json") + hub.asked("model.safetensors")
    assert {headers.get("authorization") for headers in sent if headers["host"].startswith("127.")} == {
        f"Bearer {TOKEN}"
    }
    others = [headers for headers in sent if headers["host"].startswith("localhost")]
    assert others and not any("authorization" in headers for headers in others)
    said = capfd.readouterr()
    assert TOKEN not in said.out + said.err + caplog.text
    assert not any(TOKEN.encode() in path.read_bytes() for path in folder.iterdir())


@pytest.mark.parametrize(
    ("repo", "said"),
    [("tiny-org/none", "no such model"), ("tiny-org/pickled", "no safetensors"), ("tiny-org/ready", "it has q.gguf")],
)
def test_what_cannot_be_had_is_said(repo: str, said: str, hub: Hub, tmp_path: Path) -> None:
    for name, file in (("pickled", "pytorch_model.bin"), ("ready", "q.gguf")):
        (hub.root / "tiny-org" / name).mkdir()
        (hub.root / "tiny-org" / name / file).write_bytes(b"x")
    with pytest.raises(UnsupportedModel, match=said):
        fetch(tmp_path / "fetched", repo)


def test_a_hub_that_cannot_be_reached_is_said(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UnsupportedModel, match=r"127\.0\.0\.1:9 cannot be reached"):
        fetch(tmp_path / "fetched")
