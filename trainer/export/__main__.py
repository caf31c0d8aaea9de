"""A tuned model as files to take elsewhere: `python -m trainer.export --base DIR --adapter DIR --to hf|gguf|adapter …`.

    hf        a Hugging Face folder of the merged model (--type f32, f16 or bf16)
    gguf      a .gguf file of the merged model (--type f16, q8_0, q4_0, …)
    adapter   the adapter as PEFT takes it, with its template and adapter.gguf

Place in the flow: `tunegate export`, or the gateway for a client → **this**. One rule: what is at --out is whole, and was
proven to say what base + adapter say (`proof`); nothing is there otherwise. Its own process; only what has to do with a Hugging
Face folder takes torch. On stdout: a JSON object a line, first what it will come to, last what was made.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import sys
import tarfile
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from gateway.jobdir import ADAPTER_FILES
from trainer.export.checkpoint import DTYPES, default_dtype, write_checkpoint
from trainer.export.convert import convert
from trainer.export.folder import workspace
from trainer.export.gguf_metadata import read_header
from trainer.export.hf_folder import HfFolder
from trainer.export.merge import Merge, Tuned
from trainer.export.merged_gguf import metadata_of, write_merged_gguf
from trainer.export.progress import Progress
from trainer.export.proof import TELLING, Proof, judge, read_items, score_checkpoint, score_gguf
from trainer.export.quantise import PLAIN_TYPE, TYPES, write_quantised
from trainer.export.tensors import Layout, UnsupportedModel

FORMS = ("hf", "gguf", "adapter")
SPARE_BYTES = 256 << 20  # that stay free on the disk
_REFUSALS = (UnsupportedModel, KeyError, ValueError, OSError, RuntimeError)
_F16_BYTES = 2


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer.export", description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="the prepared base that the adapter was trained on")
    parser.add_argument("--adapter", type=Path, required=True, help="the adapter's folder, as training left it")
    parser.add_argument("--to", choices=FORMS, required=True)
    parser.add_argument("--type", help=f"of the weights. hf: {', '.join(DTYPES)}; gguf: {', '.join(TYPES)}")
    parser.add_argument("--name", required=True, help="the model's name, for the file's metadata")
    parser.add_argument(
        "--out", type=Path, required=True, help="what to make; for a folder, NAME.tar makes one file of it"
    )
    parser.add_argument("--threads", type=int, default=0, help="0 means all")
    parser.add_argument("--background", action="store_true", help="give way to all else, and end when stdin does")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # llama.cpp's quantiser would not hear of an exception
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if options.background:
        _go_behind()
    try:
        with Progress(options.name) as progress:
            tuned = Tuned.read(options.name, options.base, options.adapter)
            export(tuned, options.to, options.type, options.out, options.threads, progress)
    except _REFUSALS as error:
        reason = error.args[0] if isinstance(error, (UnsupportedModel, KeyError)) and error.args else error
        print(f"cannot export {options.name}: {reason}", file=sys.stderr)
        return 1
    return 0


def export(tuned: Tuned, to: str, kind: str | None, out: Path, threads: int, progress: Progress) -> None:
    """Makes `out`. Raises UnsupportedModel and what the disk raises; nothing is left then."""
    if os.path.lexists(out):
        raise UnsupportedModel(f"{out} is there already; remove it, or name another --out")
    kind = checked_type(to, kind, tuned)
    size = expected_bytes(tuned, to, kind)
    in_tar = to != "gguf" and out.suffix == ".tar"
    require_disk(out.parent, _needed_bytes(tuned, to, kind, size, in_tar))
    _tell(expected_bytes=size)
    with workspace(out) as work:
        made = work / ("model.gguf" if to == "gguf" else "folder")
        report: dict[str, Any] = {"to": to, "type": kind}
        if to == "adapter":
            progress.stage("adapter")
            _copy_adapter(tuned, made)
        else:
            threads = threads or os.cpu_count() or 1
            merge, proof = _export_merged(tuned, to, str(kind), made, work, threads, progress)
            report |= {"changed": merge.changed, "total": merge.total, **asdict(proof)}
            if proof.error > max(TELLING * proof.effect, 0.01):
                progress.say(
                    f"{kind} is {proof.error:.2f} nats a token from the tuned model, whose training made {proof.effect:.2f}; "
                    "q8_0 and f16 are closer"
                )
        if in_tar:
            progress.stage("archive")
            made = _archive(made, work / "folder.tar", out.stem)
        size_bytes = sum(
            path.stat().st_size for path in ([made] if made.is_file() else made.rglob("*")) if path.is_file()
        )
        progress.stage("ready", 1, 1)
        os.replace(made, out)
    _tell(**report, size_bytes=size_bytes)


def checked_type(to: str, kind: str | None, tuned: Tuned) -> str | None:
    """The type of weights that was asked for, or the default. UnsupportedModel for one that `to` does not have."""
    if to == "adapter":
        if kind is not None:
            raise UnsupportedModel(f"--type is {kind!r}, and an adapter is exported as it was trained: leave it out")
        return None
    known = DTYPES if to == "hf" else TYPES
    kind = kind or (default_dtype(tuned) if to == "hf" else PLAIN_TYPE)
    if kind not in known:
        raise UnsupportedModel(f"--type is {kind!r}; for {to} it is one of {', '.join(known)}")
    return kind


def expected_bytes(tuned: Tuned, to: str, kind: str | None) -> int:
    """About what the export will come to: a little more rather than less."""
    if to == "adapter":
        return sum((tuned.adapter / name).stat().st_size for name in _adapter_files(tuned)) + (64 << 10)
    assert kind is not None
    small = 3 * len(tuned.bundle.files["tokenizer.json"]) + (1 << 20)
    return int(_n_values(tuned) * _bytes_per_value(to, kind) * 1.02) + small


def _export_merged(
    tuned: Tuned, to: str, kind: str, made: Path, work: Path, threads: int, progress: Progress
) -> tuple[Merge, Proof]:
    merge = Merge(tuned.adapter)
    if to == "hf":
        made.mkdir()
        progress.stage(f"merging ({kind})", _n_tensors(tuned))
        write_checkpoint(made, tuned, merge, kind, lambda _: progress.advance())
    else:
        _write_gguf(tuned, merge, kind, made, work, threads, progress)
    merge.finish()
    progress.stage("checking")
    items = read_items(tuned.adapter / "witness.json")
    found = score_checkpoint(made, items) if to == "hf" else score_gguf(made, items, threads)
    return merge, judge(items, found, kind)


def _write_gguf(
    tuned: Tuned, merge: Merge, kind: str, made: Path, work: Path, threads: int, progress: Progress
) -> None:
    f16 = made if kind == PLAIN_TYPE else work / "f16.gguf"
    metadata = metadata_of(tuned.name, tuned.bundle)
    progress.stage("merging", _n_tensors(tuned))
    if tuned.gguf is not None:
        layout = Layout.from_config(json.loads((tuned.base / "config.json").read_bytes()))
        write_merged_gguf(tuned.gguf, f16, metadata, merge, layout, lambda _: progress.advance())
    else:
        merged, plain = work / "merged", work / "plain.gguf"
        merged.mkdir()
        write_checkpoint(merged, tuned, merge, PLAIN_TYPE, lambda _: progress.advance())
        convert(HfFolder(merged), tuned.name, plain, progress)
        shutil.rmtree(merged)
        write_merged_gguf(plain, f16, metadata)
        plain.unlink()
    merge.finish()  # before what takes longest
    if kind != PLAIN_TYPE:
        progress.stage(kind)
        write_quantised(f16, made, kind, threads, lambda done, total: progress.stage(kind, total, done))
        f16.unlink()


def _copy_adapter(tuned: Tuned, made: Path) -> None:
    """As it is kept; its digests are those of manifest.json, which goes with it."""
    for name in _adapter_files(tuned):
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(tuned.adapter / name, made / name)


def _adapter_files(tuned: Tuned) -> list[str]:
    return [name for name in ADAPTER_FILES if (tuned.adapter / name).is_file()]


def _archive(folder: Path, path: Path, name: str) -> Path:
    """One file with the folder in it, under `name`; the same content is the same file. The folder is gone afterwards."""

    def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.uid = entry.gid = entry.mtime = 0
        entry.uname = entry.gname = ""
        entry.mode = 0o755 if entry.isdir() else 0o644
        return entry

    with tarfile.open(path, "w") as archive:
        for source in sorted(path for path in folder.rglob("*") if path.is_file()):
            archive.add(source, f"{name}/{source.relative_to(folder)}", filter=plain)
            source.unlink()  # so that no more than one file is on the disk twice
    return path


def _needed_bytes(tuned: Tuned, to: str, kind: str | None, size: int, in_tar: bool) -> int:
    """What is on the disk at once, at most."""
    if to == "gguf":
        f16 = int(_n_values(tuned) * _F16_BYTES)
        return (0 if kind == PLAIN_TYPE else size) + f16 * (1 if tuned.gguf is not None else 2)
    return size + (min(size, 5_000_000_000) if in_tar else 0)


def require_disk(folder: Path, needed: int) -> None:
    """UnsupportedModel unless the disk of `folder`, which need not be there yet, has as many bytes free, and some more."""
    folder = folder.absolute()
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    free = shutil.disk_usage(there).free
    if free < needed + SPARE_BYTES:
        raise UnsupportedModel(
            f"{there} has {free / 1e9:.2f} GB free, and this takes up to {(needed + SPARE_BYTES) / 1e9:.2f} GB while it is "
            "made; free some, or name an --out on another disk"
        )


def _n_values(tuned: Tuned) -> int:
    shapes = (
        [info.shape for info in read_header(tuned.gguf)[1].values()]
        if tuned.gguf
        else HfFolder(tuned.hf).shapes.values()
    )
    return int(sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes))


def _n_tensors(tuned: Tuned) -> int:
    return len(read_header(tuned.gguf)[1]) if tuned.gguf else HfFolder(tuned.hf).n_tensors


def _bytes_per_value(to: str, kind: str) -> float:
    if to == "hf":
        return 4.0 if kind == "f32" else 2.0
    block = re.sub(r"_[SML]$", "", kind.upper())  # mixes: most of their weights
    values, size_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[block]]
    return float(size_bytes / values) * (1.0 if kind == PLAIN_TYPE else 1.15)  # embeddings are kept finer


def _go_behind() -> None:
    """At the lowest priority; the first to go when memory runs out; and gone, with all it started, once stdin is closed."""
    os.nice(19)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("900")

    def wait() -> None:
        os.read(0, 1)  # not through sys.stdin, whose lock a thread may not hold at the interpreter's end
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def _tell(**found: Any) -> None:
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    sys.exit(main())
