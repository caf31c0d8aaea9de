"""The documentation is true: settings, commands and links are as the documents say; its examples run against a real server."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from gateway.engine_settings import EngineSettings
from gateway.settings import BaseSettings, JobSettings, LimitSettings, Settings, TemplateSettings
from gateway.tracking_settings import TrackingSettings
from tests.server import Server

ROOT = Path(__file__).resolve().parent.parent
DOCS = [ROOT / name for name in ("README.md", "trainer/README.md", "gateway/SETTINGS.md")]
TEXT = "\n".join(path.read_text() for path in DOCS)
EXAMPLES = ROOT / "clients" / "examples"


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def setting_names() -> set[str]:
    """Every setting as the headings name it."""
    tables = {"": Settings, "bases.NAME.": BaseSettings, "templates.NAME.": TemplateSettings}
    tables |= {"engines.": EngineSettings, "jobs.": JobSettings, "limits.": LimitSettings}
    tables |= {"tracking.": TrackingSettings}
    return {prefix + field.name for prefix, table in tables.items() for field in msgspec.structs.fields(table)}


def run(command: list[str], server: Server) -> str:
    """What the command printed; it must end well."""
    environment = os.environ | {"OPENAI_BASE_URL": server.base_url}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert finished.returncode == 0, f"{finished.stdout}\n{finished.stderr}\n{server.log_tail()}"
    return finished.stdout


def options_of(*command: str) -> set[str]:
    """What `tunegate COMMAND --help` lists, but for itself."""
    help_text = subprocess.run(
        [sys.executable, "-m", "gateway", *command, "--help"],
        env=os.environ | {"COLUMNS": "200", "NO_COLOR": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return set(re.findall(r"--[a-z-]+", help_text)) - {"--help"}


def on(server: Server, text: str) -> str:
    """The TEXT's text with the port that the test's server has."""
    return text.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")


def test_every_setting_has_a_heading_and_every_heading_is_a_setting() -> None:
    assert set(re.findall(r"^#### `(.+)`$", TEXT, re.MULTILINE)) == setting_names()


def test_the_readme_names_only_make_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^    |=\d+ )make ([a-z-]+)", TEXT, re.MULTILINE))
    assert {"demo", "test", "setup", "stop", "check", "bench-gateway"} <= named <= targets


def test_links_lead_to_files_that_exist() -> None:
    found = [(doc, link) for doc in DOCS for link in re.findall(r"\]\((?!https?:)([^)#]+)[)#]", doc.read_text())]
    assert found
    assert [(doc.name, link) for doc, link in found if not (doc.parent / link).exists()] == []


def test_links_to_headings_lead_to_headings() -> None:
    anchors = {doc: {_anchor(line) for line in re.findall(r"^#+ (.+)$", doc.read_text(), re.MULTILINE)} for doc in DOCS}
    for doc in DOCS:
        for link, heading in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", doc.read_text()):
            assert heading in anchors[(doc.parent / link).resolve() if link else doc], (doc.name, link, heading)


def _anchor(heading: str) -> str:
    """As GitHub makes one."""
    return re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-")


def test_the_options_of_serve_are_those_the_readme_lists() -> None:
    (line,) = re.findall(r"`tunegate serve (\[.*?)`", TEXT, re.DOTALL)
    assert set(re.findall(r"--[a-z-]+", line)) == options_of("serve")


def test_the_options_of_models_add_are_those_the_readme_lists() -> None:
    line = " ".join(re.findall(r"^tunegate models add .*$", TEXT, re.MULTILINE))
    assert set(re.findall(r"--[a-z-]+", line)) == options_of("models", "add") - {"--data", "--config"}


def test_the_options_of_export_are_those_the_readme_lists() -> None:
    (line,) = re.findall(r"^tunegate export .*$", TEXT, re.MULTILINE)
    assert set(re.findall(r"--[a-z-]+", line)) == options_of("export")


@pytest.mark.parametrize("number", range(len(code_blocks("sh"))))
def test_shell_examples_of_the_readme_run(number: int, server: Server) -> None:
    block = on(server, code_blocks("sh")[number])
    # The tunnel itself needs a second machine; what goes through it is the same request.
    lines = [line for line in block.splitlines() if not line.startswith("ssh ")]
    script = "set -euo pipefail\n" + "\n".join(lines).replace("curl ", "curl -sS --fail-with-body ")
    assert '"object":' in run(["bash", "-c", script], server)


@pytest.mark.parametrize("number", range(len(code_blocks("python"))))
def test_python_examples_of_the_readme_run(number: int, server: Server) -> None:
    assert run([sys.executable, "-W", "error", "-c", on(server, code_blocks("python")[number])], server).strip()


def test_settings_examples_of_the_readme_are_taken(tmp_path: Path) -> None:
    from gateway.settings import load_settings

    bases, vllm, engines, several, tracking = code_blocks("toml")
    config = tmp_path / "tunegate.toml"
    config.write_text(several + tracking + bases + engines)
    (tmp_path / "wandb.key").write_text("secret")
    settings = load_settings(config, {"JUDGE_KEY": "secret"}, {})
    assert settings.tracking.wandb_api_key_file == str((tmp_path / "wandb.key").resolve())
    assert [engine.model for engine in settings.engines] == ["my-llama", "judge"]
    config.write_text(vllm.replace("/opt/vllm/bin/python", sys.executable))
    assert load_settings(config, {}, {}).engines[0].kind == "vllm"
    assert settings.bases["my-llama"].path == str((tmp_path / "models" / "my-llama").resolve())
    assert settings.aliases == {"gpt-4o-mini-2024-07-18": "my-llama"}


def test_the_chat_example_is_the_one_in_the_readme() -> None:
    code = (EXAMPLES / "chat.py").read_text().partition('"""\n\n')[2].removesuffix("print()\n")
    assert code in code_blocks("python")[0]


def test_the_fine_tuning_example_ends_with_both_models_answering(server: Server) -> None:
    printed = run([sys.executable, "-W", "error", str(EXAMPLES / "fine_tune.py")], server)
    assert "The job has successfully completed" in printed
    assert re.search(r"^tunegate-demo: ", printed, re.MULTILINE)
    assert re.search(r"^ft:tunegate-demo:local:example:\w+: .*lamp", printed, re.MULTILINE)


def test_the_curl_example_goes_from_upload_to_deletion(server: Server) -> None:
    printed = run(["bash", str(EXAMPLES / "curl.sh")], server)
    assert '"deleted":true' in printed.splitlines()[-1].replace(" ", "")
