"""A base's weights with an adapter's change in them, one tensor at a time, and the count of those that it changed.

Place in the flow: base + adapter → **merge** → checkpoint (Hugging Face) or merged_gguf. One rule: what is merged into is what
was trained on: the tensors that are served, dequantised where they are quantised. No torch, and never more than one tensor in
memory, so that a model can be exported where it can only just be served.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gateway.chat.bundle import TEMPLATE_FILE, TOKENIZER_FILE, Bundle
from gateway.jobdir import read_json
from trainer.export.hf_folder import read_safetensors
from trainer.export.lora import Pair, read_pairs, scale_of
from trainer.export.tensors import Layout, UnsupportedModel

Float32 = npt.NDArray[np.float32]


class Merge:
    """The change that the adapter in a folder makes. Raises UnsupportedModel for what is more than plain LoRA."""

    def __init__(self, adapter: Path) -> None:
        self._config: dict[str, Any] = read_json(adapter / "adapter_config.json")
        self._pairs: dict[str, Pair] = read_pairs(
            dict(read_safetensors(adapter / "adapter_model.safetensors")), self._config
        )
        self._left = {f"{module}.weight" for module in self._pairs}
        self.total = len(self._left)
        self.changed = 0

    def apply(self, name: str, weight: Float32) -> Float32:
        """The weight of that name, as transformers has both, merged; the same object where the adapter has nothing for it.

        Raises UnsupportedModel where the two do not fit.
        """
        if name not in self._left:
            return weight
        self._left.discard(name)
        module = name.removesuffix(".weight")
        down, up = self._pairs[module]
        if weight.shape != (up.shape[0], down.shape[1]):
            raise UnsupportedModel(
                f"the adapter's change of '{name}' is {[up.shape[0], down.shape[1]]}, and the base's weight is "
                f"{list(weight.shape)}"
            )
        merged: Float32 = weight + (up @ down) * np.float32(scale_of(module, down.shape[0], self._config))
        if not np.isfinite(merged).all():
            raise UnsupportedModel(f"'{name}' has values that are no finite numbers once merged")
        return merged

    def count(self, before: npt.NDArray[Any], after: npt.NDArray[Any]) -> None:
        """Notes whether a merged tensor is another than the base's, as the two are written to the disk."""
        self.changed += not np.array_equal(before, after)

    def finish(self) -> None:
        """UnsupportedModel unless every change found its weight, and at least one weight is another now."""
        if self._left:
            raise UnsupportedModel(
                f"the adapter changes '{min(self._left)}', and the base has no weight of that name ({len(self._left)} of "
                f"{self.total} are not there)"
            )
        if not self.changed:
            raise UnsupportedModel(
                f"the merge changes nothing: none of the {self.total} weights that the adapter has a change for is another "
                "afterwards. Was it trained at all?"
            )

    def by_gguf_name(self, layout: Layout) -> dict[str, str]:
        """transformers' name of each weight that is changed, by GGUF's."""
        return {layout.to_gguf_name(f"{module}.weight"): f"{module}.weight" for module in self._pairs}


@dataclass(frozen=True)
class Tuned:
    """What is exported: a prepared base, an adapter on it, and the name that both together go by."""

    name: str
    base: Path  # a prepared base's folder
    described: dict[str, Any]  # its base.json
    adapter: Path
    bundle: Bundle  # what the adapter was trained through

    @classmethod
    def read(cls, name: str, base: Path, adapter: Path) -> Tuned:
        """Raises UnsupportedModel when the adapter was trained on another base."""
        described = read_json(base / "base.json")
        trained_on = read_json(adapter / "manifest.json").get("base_digest")
        if trained_on != described["digest"]:
            raise UnsupportedModel(
                f"the adapter was trained on the base with the digest {trained_on}, and that in {base} has "
                f"{described['digest']}: it was prepared anew from another source. Merged into it, the adapter would do "
                "something else"
            )
        template = adapter / "template"
        files = {file: (template / file).read_bytes() for file in (TEMPLATE_FILE, TOKENIZER_FILE)}
        return cls(name, base, described, adapter, Bundle.from_files(files))

    @property
    def gguf(self) -> Path | None:
        """The file that the base is served from; None where vLLM serves the folder `hf`."""
        if self.described.get("hf"):
            return None
        return self.base / Path(str(self.described.get("gguf", "model.q4_0.gguf"))).name

    @property
    def hf(self) -> Path:
        return self.base / Path(str(self.described["hf"])).name
