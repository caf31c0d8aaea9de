"""A tiny base and tiny adapters as real files, and witnesses that a real engine wrote."""

from __future__ import annotations

import asyncio
import json
import struct
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from gateway.bases import PreparedBase
from gateway.engines.adapters import Adapter, file_digest, immutable_name, manifest_digest
from gateway.engines.client import Endpoint
from gateway.engines.control import EngineControl
from gateway.engines.engine import Engine
from gateway.engines.pool import Pool
from gateway.engines.process import Timings
from gateway.engines.replica import Replica
from gateway.engines.witness import Tolerances
from gateway.jobdir import ADAPTER_FILES, process_start_time
from tests.tiny_gguf import Shape, write_tiny_gguf, write_tiny_lora

RANK = 4
QUICK = Timings(
    health_interval_s=0.1,
    health_timeout_s=0.5,
    health_failures=2,
    backoff_first_s=0.1,
    backoff_max_s=0.4,
    stop_grace_s=6,
)
ANYTHING_GOES = Tolerances(base_error=1e9, relative_error=1e9, floor=1e9)


def tiny_base(folder: Path, seed: int = 0) -> PreparedBase:
    """A random model in GGUF as a prepared base."""
    folder.mkdir(parents=True, exist_ok=True)
    gguf = write_tiny_gguf(folder / "model.q4_0.gguf", seed=seed)
    return PreparedBase(
        "tiny", folder, gguf, file_digest(gguf), "LlamaForCausalLM", Shape().context_length, "vicuna_v1.1", (2,)
    )


def write_adapter(
    folder: Path,
    base_digest: str,
    *,
    seed: int = 1,
    alpha: float = 8.0,
    strength: float = 0.1,
    witness: Sequence[dict[str, Any]] | None = None,
) -> Path:
    """A whole adapter folder; the weights that are served are those of `adapter.gguf`."""
    (folder / "template").mkdir(parents=True)
    write_tiny_lora(folder / "adapter.gguf", seed=seed, rank=RANK, alpha=alpha, strength=strength)
    write_safetensors(folder / "adapter_model.safetensors", lora_tensors(RANK))
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": alpha, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "template/template.json").write_text("{}")
    (folder / "template/tokenizer.json").write_text("{}")
    items = witness or [{"prompt_ids": [1], "reply_ids": [2], "base_logprobs": [-1.0], "tuned_logprobs": [-2.0]}]
    (folder / "witness.json").write_text(json.dumps({"items": list(items)}))
    write_manifest(folder, base_digest)
    return folder


def write_manifest(folder: Path, base_digest: str) -> None:
    """The manifest of what the folder holds now."""
    files = {
        name: {"digest": file_digest(folder / name), "size_bytes": (folder / name).stat().st_size}
        for name in ADAPTER_FILES
        if name != "manifest.json"
    }
    (folder / "manifest.json").write_text(json.dumps({"base": {"digest": base_digest}, "files": files}))


def write_manifest_again(folder: Path) -> None:
    """The manifest as it was, with the files that it lists as they are now."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for name, entry in manifest["files"].items():
        entry |= {"digest": file_digest(folder / name), "size_bytes": (folder / name).stat().st_size}
    (folder / "manifest.json").unlink()  # it may be a link to the original
    (folder / "manifest.json").write_text(json.dumps(manifest))


def lora_tensors(rank: int) -> dict[str, np.ndarray[Any, Any]]:
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    return {
        f"{prefix}.lora_A.weight": np.ones((rank, 64), dtype=np.float32),
        f"{prefix}.lora_B.weight": np.ones((64, rank), dtype=np.float32),
    }


def write_safetensors(path: Path, tensors: dict[str, np.ndarray[Any, Any]]) -> None:
    header, data = {}, b""
    for name, tensor in tensors.items():
        raw = tensor.tobytes()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    write_raw_safetensors(path, json.dumps(header).encode(), data)


def write_raw_safetensors(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> None:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


def as_adapter(folder: Path, name: str) -> Adapter:
    digest = manifest_digest(json.loads((folder / "manifest.json").read_bytes()))
    return Adapter(immutable_name(name, digest), folder.absolute(), "tiny", digest)


def pool_of(*engines: Any, name: str = "tiny") -> Pool:
    """The engines as the replicas of one base."""
    return Pool(name, [Replica(f"{name} #{number}", engine) for number, engine in enumerate(engines, start=1)])


class At:
    """An engine that is ready at a port and is asked for replies alone."""

    ready, state, reason = True, "ready", None
    takes_adapters = False
    max_lora_rank = None
    version: dict[str, Any] = {}  # noqa: RUF012 - never changed

    def __init__(self, port: int, key: str = "secret") -> None:
        self.endpoint = Endpoint("127.0.0.1", port, key)

    def serves(self, engine_name: str) -> bool:
        return True

    def take(self, model: str | None = None) -> None: ...

    def release(self, model: str | None = None) -> None: ...


async def witnessed_adapter(engine: Engine, folder: Path, name: str, **options: Any) -> Adapter:
    """An adapter whose witness a running engine has written, which has forgotten the adapter again."""
    blank = as_adapter(write_adapter(folder / f"{name}-blank", engine.base.digest, **options), name)
    await engine.ensure_adapter(blank, witness=False)
    items = []
    for seed in range(3):
        ids = [1, *np.random.default_rng(seed).integers(3, 300, 30).tolist()]
        base, tuned = [await score(engine.endpoint, model, ids) for model in ("tiny", blank.engine_name)]
        items.append(
            {"prompt_ids": ids[:16], "reply_ids": ids[16:], "base_logprobs": base[16:], "tuned_logprobs": tuned[16:]}
        )
    await engine.drop_adapter(blank.engine_name)
    return as_adapter(write_adapter(folder / name, engine.base.digest, witness=items, **options), name)


def with_other_weights(adapter: Adapter, folder: Path, base: PreparedBase, **options: Any) -> Adapter:
    """The same adapter, witness included, with an `adapter.gguf` of another alpha or seed."""
    witness = json.loads((adapter.path / "witness.json").read_bytes())["items"]
    return as_adapter(write_adapter(folder, base.digest, witness=witness, **options), "changed")


async def score(endpoint: Endpoint, model: str, ids: list[int]) -> list[float | None]:
    async with control_of(endpoint) as control:
        return await control.score(model, ids)


@asynccontextmanager
async def control_of(endpoint: Endpoint) -> AsyncIterator[EngineControl]:
    control = EngineControl(endpoint)
    try:
        yield control
    finally:
        await control.close()


async def kill_gateway_when(
    until: str, base: PreparedBase, folder: Path, command: Sequence[str], adapters: Sequence[Adapter] = ()
) -> None:
    """Runs a gateway of its own up to "spawned" or "ready", then kills it with SIGKILL."""
    spec = {
        "base": asdict(base), "folder": folder, "command": command, "adapters": [asdict(a) for a in adapters], "until": until
    }  # fmt: skip
    gateway = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.engines.killed_gateway",
        json.dumps(spec, default=str),
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parent.parent.parent,
    )
    assert gateway.stdout is not None
    said = await asyncio.wait_for(gateway.stdout.readline(), 60)
    gateway.kill()
    await gateway.wait()
    assert said, "the gateway ended before it got that far"


def is_alive(pid: int) -> bool:
    return process_start_time(pid) is not None


async def until(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    """Returns when the condition holds; fails when it does not in time."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - what is waited for is often another process
            await asyncio.sleep(0.01)
