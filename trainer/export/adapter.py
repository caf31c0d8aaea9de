"""The adapter folder, whole: PEFT's two files, adapter.gguf, the template bundle, the witness, and the manifest of it all.

Place in the flow: loop writes one for each checkpoint, and the result is one of those. One rule: the same training gives the
same bytes, so nothing in it names a time, a job or a machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file

from gateway.jobdir import ADAPTER_FILES, ADAPTER_GGUF, BaseRef, JobDir, JobSpec, read_json
from trainer.export.folder import complete_folder
from trainer.export.lora_gguf import write_lora_gguf
from trainer.export.tensors import Layout

FORMAT = 1


def write_adapter(
    path: Path,
    model: PeftModel,
    job: JobDir,
    spec: JobSpec,
    witness: dict[str, Any],
    tensors: dict[str, torch.Tensor] | None = None,
) -> None:
    """What training a job leaves; see `write_adapter_files`."""
    write_adapter_files(path, model, job.template, spec.base, spec.template_digest, witness, tensors)


def write_adapter_files(
    path: Path,
    model: PeftModel,
    template: Path,
    base: BaseRef,
    template_digest: str,
    witness: dict[str, Any],
    tensors: dict[str, torch.Tensor] | None = None,
) -> None:
    """Makes the folder `path` with exactly ADAPTER_FILES in it, adapter.gguf only for a base that is served as a GGUF.

    `tensors` are the adapter's, where they had to be gathered from several processes.
    """
    tensors = adapter_tensors(model) if tensors is None else tensors
    with complete_folder(path) as folder:
        config = write_peft_files(folder, model, tensors)
        if base.gguf is not None:
            base_config = read_json(Path(base.path) / "config.json")
            arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
            write_lora_gguf(folder / ADAPTER_GGUF, arrays, config, Layout.from_config(base_config))
        _write_json(folder / "witness.json", witness)
        (folder / "template").mkdir()
        for file in template.iterdir():
            (folder / "template" / file.name).write_bytes(file.read_bytes())
        _write_json(folder / "manifest.json", _manifest(folder, base, template_digest, config))


def write_peft_files(folder: Path, model: PeftModel, tensors: dict[str, torch.Tensor] | None = None) -> dict[str, Any]:
    """adapter_model.safetensors and adapter_config.json; returns the latter's content.

    Not PEFT's own save: it writes sets in the order of their hashes and may look the base up on the hub.
    """
    save_file(
        adapter_tensors(model) if tensors is None else tensors,
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    config = {
        key: sorted(value) if isinstance(value, (set, frozenset)) else value
        for key, value in model.peft_config["default"].to_dict().items()
    }
    config |= {"inference_mode": True, "peft_type": "LORA", "task_type": "CAUSAL_LM"}
    _write_json(folder / "adapter_config.json", config)
    return config


def adapter_tensors(
    model: PeftModel, whole: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
) -> dict[str, torch.Tensor]:
    """The adapter's tensors by PEFT's names, in their order; `whole` gathers one that is spread over processes."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: whole(tensor.detach()).cpu().contiguous() for name, tensor in sorted(state.items())}


def _manifest(folder: Path, base: BaseRef, template_digest: str, config: dict[str, Any]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "base": base.name,
        "base_digest": base.digest,
        "template_digest": template_digest,
        "rank": config["r"],
        "alpha": config["lora_alpha"],
        "target_modules": config["target_modules"],
        "files": {name: _entry(folder / name) for name in ADAPTER_FILES if (folder / name).is_file()},
    }


def _entry(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {"digest": f"sha256:{hashlib.sha256(content).hexdigest()}", "size_bytes": len(content)}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
