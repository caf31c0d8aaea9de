"""A Hugging Face folder → f16 GGUF: by our own writer where that is enough, else by llama.cpp's converter.

Place in the flow: `prepare` calls it once a base. One rule: our own writer is for small models of the Llama architecture,
such as the demo model, which so need no download; everything else is converted by the script that llama.cpp itself
brings.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import gguf

from trainer.export.base_gguf import write_f16_gguf
from trainer.export.hf_folder import HfFolder
from trainer.export.llama_source import converter_folder
from trainer.export.progress import Progress
from trainer.export.tensors import UnsupportedModel, as_float16

OWN_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
OWN_LIMIT_BYTES = 2 << 30  # of weights: our writer holds all of them in memory
_ROOT = Path(__file__).resolve().parent.parent.parent
_TENSOR_LINE = re.compile(r"INFO:hf-to-gguf:\S+,\s+torch\.\w+ --> ")
_WRITING_LINE = re.compile(r"Writing:\s+(\d+)%")
_UNKNOWN_ROPE = re.compile(r"Unknown RoPE type: (\S+)")
_KEPT_LINES = 30


def convert(folder: HfFolder, name: str, path: Path, progress: Progress) -> None:
    """Writes `path`. Raises UnsupportedModel."""
    if folder.architecture in OWN_ARCHITECTURES and folder.size_bytes <= OWN_LIMIT_BYTES:
        progress.stage("float16", folder.n_tensors)
        try:
            write_f16_gguf(folder, name, path, lambda _: progress.advance())
        except UnsupportedModel as error:  # a form of rope, say, or a tokenizer: the script may know it
            own = error
        else:
            return
        try:
            _run_converter(folder, name, path, progress)
        except UnsupportedModel as error:
            raise UnsupportedModel(f"{own}. llama.cpp's converter neither: {error}") from error
    else:
        _run_converter(folder, name, path, progress)
    _limit_context(path, folder.context_length)


def _run_converter(folder: HfFolder, name: str, path: Path, progress: Progress) -> None:
    converter = converter_folder(progress.say)
    progress.stage("float16 (llama.cpp's converter)", folder.n_tensors)
    command = [sys.executable, "-m", "trainer.export.run_converter", str(converter)]
    command += ["--outtype", "f16", "--outfile", str(path), "--model-name", name, str(folder.path.absolute())]
    # No network, nobody to ask: code that a model brings is not run, and whoever wants to is refused.
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command,
        cwd=_ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        lines: list[str] = []
        odd_rope: str | None = None
        try:
            for line in process.stdout:  # the bar that it draws ends its lines with \r, which counts as one here
                if _TENSOR_LINE.match(line):
                    progress.advance()
                elif found := _WRITING_LINE.match(line):
                    progress.stage("float16 (writing)", 100, int(found[1]))
                elif (unknown := _UNKNOWN_ROPE.search(line)) and unknown[1] != "default":
                    odd_rope = unknown[1]
                elif line.strip():
                    lines = [*lines[1 - _KEPT_LINES :], line.strip()]
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0 or not path.is_file():
        raise UnsupportedModel(f"llama.cpp's converter does not take {folder.architecture}: {_reason(lines)}")
    if odd_rope is not None:  # it only warns, and writes a file that computes something else
        raise UnsupportedModel(
            f"config.json asks for the rope type '{odd_rope}', which llama.cpp's converter does not know"
        )
    _refuse_infinite(path)


def _reason(lines: list[str]) -> str:
    """The error that it ended with; its last words where there is none."""
    errors = [line for line in lines if re.match(r"(ERROR:|\w*(\.\w+)*(Error|Exception)\b)", line)]
    return " | ".join(errors[-2:] or lines[-3:])


def _refuse_infinite(path: Path) -> None:
    """The script writes what float16 cannot hold as infinite, without a word."""
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.tensor_type == gguf.GGMLQuantizationType.F16:
            as_float16(tensor.name, tensor.data)


def _limit_context(path: Path, context_length: int) -> None:
    """Writes the context that transformers and llama.cpp agree on into the file, where the model's config says more."""
    reader = gguf.GGUFReader(path, "r+")
    architecture = reader.fields["general.architecture"].contents()
    field = reader.fields.get(f"{architecture}.context_length")
    if field is not None and field.contents() > context_length:
        field.parts[field.data[0]][0] = context_length
        reader.data.flush()
