"""The kinds of engines, each made from plain arguments: a llama worker or a vLLM that is started here, a vLLM elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gateway.bases import PreparedBase
from gateway.engines.client import Endpoint
from gateway.engines.control import EngineControl
from gateway.engines.engine import Engine
from gateway.engines.llama_launch import LLAMA_COMMAND, LlamaLaunch
from gateway.engines.process import Timings, WorkerProcess
from gateway.engines.remote import RemoteEngine
from gateway.engines.spawn import WorkerFolder
from gateway.engines.vllm_launch import DEFAULT_MAX_RANK, VllmLaunch
from gateway.engines.witness import Tolerances
from gateway.errors import EngineError, SettingsError

# It loads tens of gigabytes, compiles and captures graphs before it answers; and drains for a while at its end.
VLLM_TIMINGS = Timings(start_timeout_s=1800.0, health_timeout_s=10.0, stop_grace_s=20.0)


def llama_engine(
    base: PreparedBase,
    folder: Path,
    *,
    context: int | None = None,
    max_seqs: int = 8,
    threads: int | None = None,
    prefix_cache_mib: int = 512,
    adapters_in_memory: int = 16,
    command: tuple[str, ...] = LLAMA_COMMAND,
    timings: Timings | None = None,
    tolerances: Tolerances | None = None,
) -> Engine:
    """A llama worker on the base's GGUF. `folder` (DATA/engines/NAME) keeps what the next gateway needs to take it over."""
    if base.gguf is None:
        raise SettingsError(
            f"'{base.name}' is prepared for vLLM (type hf) and has no .gguf that the llama worker could serve"
        )
    kept = prefix_cache_mib, adapters_in_memory
    launch = LlamaLaunch(base.name, base.gguf, base.digest, context, max_seqs, threads, *kept, command)
    process = WorkerProcess(launch, WorkerFolder(folder), timings)
    return Engine(base, process, context=context, tolerances=tolerances)


def vllm_engine(
    base: PreparedBase,
    folder: Path,
    *,
    python: str,
    arguments: Sequence[str] = (),
    variables: Mapping[str, str] | None = None,
    context: int | None = None,
    max_seqs: int | None = None,
    timings: Timings | None = None,
    tolerances: Tolerances | None = None,
) -> Engine:
    """A vLLM on the base's Hugging Face folder, started with `python` of the environment that it is installed in.

    `folder` (DATA/engines/NAME, or one a replica) keeps what the next gateway needs to take it over. `arguments` and
    environment `variables` are passed through; SettingsError for those that are ours (address, key, names, …).
    `context` and `max_seqs` become --max-model-len and --max-num-seqs; None leaves them to vLLM.
    """
    launch = VllmLaunch(
        base.name,
        _hf_folder(base),
        base.digest,
        python,
        tuple(arguments),
        tuple(sorted((variables or {}).items())),
        context,
        max_seqs,
    )
    process = WorkerProcess(launch, WorkerFolder(folder), timings or VLLM_TIMINGS)
    return Engine(base, process, context=context, max_lora_rank=launch.max_lora_rank, tolerances=tolerances)


def remote_llama_engine(
    base: PreparedBase,
    endpoint: Endpoint,
    *,
    served_name: str | None = None,
    path_map: Mapping[str, str] | None = None,
    timings: Timings | None = None,
    tolerances: Tolerances | None = None,
) -> Engine:
    """A llama worker that runs elsewhere, on the same .gguf; see `remote_engine`."""

    async def greet(control: EngineControl, name: str, timeout_s: float) -> dict[str, Any]:
        version = await control.version(timeout_s)
        await control.health(timeout_s)
        if version.get("base_digest") not in (None, base.digest):
            raise EngineError(f"the engine serves a base with digest {version['base_digest']}; ours is {base.digest}")
        if name not in (known := await control.models()):
            raise EngineError(f"the engine serves {', '.join(known)} and not '{name}'; set served_name")
        return version

    remote = RemoteEngine(endpoint, served_name or base.name, timings, greet)
    return Engine(base, remote, served_name=served_name, path_map=path_map, shared=True, tolerances=tolerances)


def remote_engine(
    base: PreparedBase,
    endpoint: Endpoint,
    *,
    served_name: str | None = None,
    path_map: Mapping[str, str] | None = None,
    max_lora_rank: int = DEFAULT_MAX_RANK,
    timings: Timings | None = None,
    tolerances: Tolerances | None = None,
) -> Engine:
    """A vLLM that runs elsewhere and is only asked: ready when it answers /health and serves `served_name` (the base's
    own name where not given), and again after its owner has restarted it, once its adapters are back.

    `path_map` is {a folder of ours: the same folder as the engine sees it}; DATA/adapters must be readable there.
    `max_lora_rank` is what it was started with: a vLLM does not tell.
    """
    _hf_folder(base)
    timings = timings or replace(VLLM_TIMINGS, backoff_max_s=10.0)
    remote = RemoteEngine(endpoint, served_name or base.name, timings)
    return Engine(
        base,
        remote,
        served_name=served_name,
        max_lora_rank=max_lora_rank,
        path_map=path_map,
        shared=True,
        tolerances=tolerances,
    )


def _hf_folder(base: PreparedBase) -> Path:
    if base.hf is None:
        raise SettingsError(
            f"'{base.name}' is prepared as a .gguf; for vLLM it must be prepared as it is on Hugging Face (type = \"hf\")"
        )
    return base.hf
