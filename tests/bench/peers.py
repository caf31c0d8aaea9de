"""The gateways that Tunegate is measured beside, each in a virtual environment of its own under the user's cache folder.

The first run installs them (LiteLLM takes some minutes); a peer that cannot be installed or started is reported with the
reason instead of figures.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

LITELLM = "1.109.1"
VLLM_ROUTER = "0.1.17"
KEY = "bench"

# What LiteLLM's proxy asks for that an index may not have yet; none of it is on the path of a chat request.
RELAXED = {"certifi", "litellm-proxy-extras", "litellm-enterprise"}
LITELLM_REQUIREMENTS = """
import re
from importlib.metadata import requires
for line in requires("litellm"):
    requirement, _, marker = line.partition(";")
    if "extra ==" in marker and "extra == 'proxy'" not in marker:
        continue
    marker = re.sub(r"(and )?extra == 'proxy'", "", marker).strip()
    name = re.match(r"[A-Za-z0-9_.-]+", requirement)[0]
    print((name if name in RELAXED else requirement.strip()) + (f" ; {marker}" if marker else ""))
"""


class PeerUnavailable(Exception):
    """A peer that cannot be measured here; the message is the reason for the table's foot."""


def install_vllm_router() -> Path:
    """The folder of vllm-router's commands."""
    return _environment("vllm-router", VLLM_ROUTER, [[f"vllm-router=={VLLM_ROUTER}"]])


def install_litellm() -> Path:
    """The folder of LiteLLM's commands; lower bounds that this machine's index cannot meet are relaxed."""
    try:
        return _environment("litellm", LITELLM, [[f"litellm[proxy]=={LITELLM}"]])
    except PeerUnavailable:
        commands = _environment("litellm", LITELLM, [["--no-deps", f"litellm=={LITELLM}"]], mark_ready=False)
    listed = _run([str(commands / "python"), "-c", f"RELAXED = {RELAXED!r}{LITELLM_REQUIREMENTS}"])
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as requirements:
        requirements.write(listed)
        requirements.flush()
        return _environment("litellm", LITELLM, [["-r", requirements.name]])


def litellm_command(commands: Path, port: int, upstream_port: int, folder: Path) -> tuple[list[str], dict[str, str]]:
    """LiteLLM's proxy with one model, no database and no callbacks: command and environment."""
    config = folder / "litellm.yaml"
    upstream = f"http://127.0.0.1:{upstream_port}/v1"
    config.write_text(
        "model_list:\n"
        "  - model_name: mock\n"
        f"    litellm_params: {{model: openai/mock, api_base: '{upstream}', api_key: {KEY}}}\n"
    )
    # The proxy refuses to start without a key that it thinks strong, or this leave to do without.
    permit = {"LITELLM_MASTER_KEY": KEY, "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true"}
    environment = os.environ | permit | {"LITELLM_LOG": "ERROR"}
    command = [str(commands / "litellm"), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
    return [*command, "--num_workers", "1", "--telemetry", "False"], environment


def vllm_router_command(commands: Path, port: int, upstream_port: int, metrics_port: int) -> list[str]:
    """vllm-router in front of one worker, with its cheapest policy."""
    command = [str(commands / "vllm-router"), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--worker-urls", f"http://127.0.0.1:{upstream_port}", "--policy", "round_robin"]
    return [*command, "--log-level", "error", "--prometheus-port", str(metrics_port)]


def _environment(name: str, version: str, installs: list[list[str]], mark_ready: bool = True) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tunegate" / "bench"
    folder = cache / f"{name}-{version}"
    ready = folder / ".ready"
    if not ready.exists():
        if not (folder / "bin" / "python").exists():
            cache.mkdir(parents=True, exist_ok=True)
            _run([sys.executable, "-m", "venv", str(folder)])
        print(f"installing {name} {version} into {folder}", flush=True)
        for arguments in installs:
            _run([str(folder / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check", *arguments])
        if mark_ready:
            ready.touch()
    return folder / "bin"


def _run(command: list[str]) -> str:
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode != 0:
        reason = [line for line in finished.stderr.splitlines() if line.startswith("ERROR")] or ["no reason given"]
        raise PeerUnavailable(f"{' '.join(command[:4])} … failed: {reason[-1][:300]}")
    return finished.stdout
