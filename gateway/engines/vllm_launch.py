"""vLLM as a process to start: its own Python, an address of its own on loopback, and nobody but us let in.

Its one rule: what the gateway relies on is said here and cannot be overridden (address, key, names, runtime adapters, no
defaults from generation_config.json, no download); everything else is the owner's `arguments`, passed through.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gateway
from gateway.engines.spawn import HOST, WorkerFailed, WorkerFolder
from gateway.engines.vllm_dialect import greet_vllm
from gateway.errors import SettingsError

if TYPE_CHECKING:
    from gateway.engines.control import EngineControl

# Not the `vllm` command: it asks for a distribution of that very name, which the CPU build's is not.
MODULE = "vllm.entrypoints.openai.api_server"
PLUGIN_PATH = Path(gateway.__file__).parent / "vllm_plugin"
DEFAULT_MAX_RANK = 16  # vLLM's own, and the rank that jobs train with
OURS = (
    "--host --port --uds --model --served-model-name --api-key --middleware --generation-config --enable-lora --no-enable-lora "
    "--api-server-count --enable-prompt-tokens-details --root-path --ssl-keyfile --ssl-certfile --lora-modules "
    "--config --headless --disable-fastapi-docs"
).split()


@dataclass(frozen=True)
class VllmLaunch:
    """A vLLM that is started here; see `Launch`. Raises SettingsError for arguments that are not the owner's to choose."""

    served_name: str
    model: Path  # a folder as on Hugging Face
    base_digest: str
    python: str  # of the environment that vLLM is installed in
    arguments: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()  # further environment variables
    context: int | None = None
    max_seqs: int | None = None

    def __post_init__(self) -> None:
        for argument in self.arguments:
            name = argument.partition("=")[0].replace("_", "-")
            if name in OURS:
                raise SettingsError(
                    f"'{argument}' among the arguments of {self.served_name}'s vLLM is set by Tunegate; leave it out"
                )

    @property
    def tells_port(self) -> bool:
        return False

    @property
    def max_lora_rank(self) -> int:
        """The highest rank that it loads."""
        said = argument_value(self.arguments, "--max-lora-rank")
        try:
            return DEFAULT_MAX_RANK if said is None else int(said)
        except ValueError:
            raise SettingsError(f"--max-lora-rank {said!r} of {self.served_name}'s vLLM is not a number") from None

    def fingerprint(self) -> dict[str, Any]:
        return {
            "python": self.python,
            "served_name": self.served_name,
            "model": str(self.model),
            "base_digest": self.base_digest,
            "arguments": list(self.arguments),
            "variables": [list(pair) for pair in self.variables],
            "context": self.context,
            "max_seqs": self.max_seqs,
        }

    def argv(self, folder: WorkerFolder, port: int) -> list[str]:
        argv = [self.python, "-X", folder.python_mark, "-m", MODULE, "--host", HOST, "--port", str(port)]
        argv += ["--model", str(self.model), "--served-model-name", self.served_name]
        argv += ["--middleware", "tunegate_guard.RequireKey", "--enable-lora", "--enable-prompt-tokens-details"]
        # Without this the model's generation_config.json would cap max_tokens and set what a request leaves out.
        argv += ["--generation-config", "vllm"]
        if self.context is not None:
            argv += ["--max-model-len", str(self.context)]
        if self.max_seqs is not None:
            argv += ["--max-num-seqs", str(self.max_seqs)]
        if not any("uvicorn" in argument for argument in self.arguments):
            argv += ["--disable-uvicorn-access-log"]
        return [*argv, *self.arguments]

    def environment(self, key: str) -> Mapping[str, str]:
        """The key goes through the environment: a command line can be read by everybody on the machine."""
        inherited = os.environ.get("PYTHONPATH")
        return {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_SERVER_DEV_MODE": "1",  # /sleep and /wake_up; the guard keeps everybody else out
            **dict(self.variables),
            "VLLM_API_KEY": key,
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "PYTHONPATH": os.pathsep.join([str(PLUGIN_PATH), *([inherited] if inherited else [])]),
        }

    async def greet(self, control: EngineControl, timeout_s: float) -> dict[str, Any]:
        version = await greet_vllm(control, self.served_name, timeout_s)
        if version["root"] != str(self.model):
            raise WorkerFailed(f"serves {version['root']}; it should be {self.model}")
        return version | {"sleeps": True, "frees_memory": "--enable-sleep-mode" in self.arguments}


def argument_value(arguments: Sequence[str], name: str) -> str | None:
    """What a command line gives `--name`, as `--name value` or `--name=value`; the last one counts. None: nothing."""
    found = None
    for place, argument in enumerate(arguments):
        said, equals, value = argument.partition("=")
        if said.replace("_", "-") == name:
            found = value if equals else next(iter(arguments[place + 1 : place + 2]), None)
    return found
