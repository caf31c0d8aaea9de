"""A model from a Hugging Face hub, or from one that speaks as it does (`HF_ENDPOINT`).

Place in the flow: `prepare`, for a source that is no path. One rule: weights come as safetensors, and nothing that could
run code is fetched. Files are loaded one after another into one folder and a broken one goes on where it stopped, also in
another process (the hub's own client begins such a file anew). The token (`HF_TOKEN`, or that of `hf auth login`) is sent
to the hub and nowhere else.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import httpx

from trainer.export.progress import Progress
from trainer.export.tensors import UnsupportedModel

_ABOUT = (
    "config.json",
    "generation_config.json",
    "*tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "tokenizer.model",
    "*.tiktoken",
    "tiktoken*.model",
)
_WEIGHTS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
_STATE_FILE, _PART = ".hub.json", ".part"
_ATTEMPTS, _RETRY_S, _TIMEOUT_S = 5, 2.0, 60.0
_MEGABYTE = 1_000_000


@dataclass(frozen=True)
class _File:
    name: str
    size_bytes: int
    sha256: str | None  # of large files; small ones are named by git's own digest


class _Gone(Exception):
    """A download that broke off; it may be tried again."""


def fetch(repo: str, revision: str | None, into: Path, progress: Progress) -> Path:
    """The folder `into` with `repo` at `revision` in it. Raises UnsupportedModel with what the hub says and what to do."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
    from huggingface_hub.utils._headers import build_hf_headers

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)
    progress.stage(f"asking {api.endpoint}")
    try:
        info = api.model_info(repo, revision=revision, files_metadata=True)
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        raise UnsupportedModel(f"{repo} cannot be had from {api.endpoint}: {_reason(error)}") from error
    except Exception as error:  # the client's transport has errors of its own, which it does not name as its own
        if not type(error).__module__.startswith("http"):
            raise
        raise UnsupportedModel(f"{api.endpoint} cannot be reached: {type(error).__name__}") from error
    siblings = info.siblings or []
    sizes = [_File(s.rfilename, s.size or 0, s.lfs.sha256 if s.lfs else None) for s in siblings]
    files = _wanted(repo, sizes)
    _begin(into, {"repo": repo, "commit": info.sha})
    headers = build_hf_headers()
    with httpx.Client(headers=headers, timeout=_TIMEOUT_S, follow_redirects=True) as client:
        meter = _Meter(progress, repo, sum(file.size_bytes for file in files))
        for file in files:
            url = f"{api.endpoint}/{repo}/resolve/{info.sha}/{quote(file.name)}"
            _download(client, url, into / file.name, file, meter)
    return into


def _wanted(repo: str, files: list[_File]) -> list[_File]:
    """Those that are needed, small ones first. Raises UnsupportedModel when there is no model among them."""
    weights = [file for file in files if any(fnmatch.fnmatchcase(file.name, pattern) for pattern in _WEIGHTS)]
    about = [file for file in files if any(fnmatch.fnmatchcase(file.name, pattern) for pattern in _ABOUT)]
    if not any(file.name.endswith(".safetensors") for file in weights):
        ready = [file.name for file in files if file.name.endswith(".gguf")]
        hint = f"; it has {ready[0]}: fetch that file and add it" if ready else ""
        raise UnsupportedModel(f"{repo} has no safetensors weights, which alone are taken{hint}")
    known = {file.name: file for file in (*about, *weights) if "/" not in file.name}
    return sorted(known.values(), key=lambda file: file.size_bytes)


def _begin(into: Path, state: dict[str, str | None]) -> None:
    """The folder, emptied when it holds another model or commit."""
    mark = into / _STATE_FILE
    if not (mark.is_file() and json.loads(mark.read_text()) == state):
        shutil.rmtree(into, ignore_errors=True)
        into.mkdir(parents=True)
        mark.write_text(json.dumps(state))


def _download(client: httpx.Client, url: str, path: Path, file: _File, meter: _Meter) -> None:
    if path.is_file():
        meter.add(file.size_bytes)
        return
    part = path.with_name(path.name + _PART)
    before = meter.done
    for attempt in range(_ATTEMPTS):
        meter.done = before
        try:
            _append(client, url, part, meter)
            break
        except _Gone as error:
            if attempt == _ATTEMPTS - 1:
                raise UnsupportedModel(f"{file.name} broke off: {error}. Start it again: it goes on there") from error
            time.sleep(_RETRY_S * attempt)
    found = part.stat().st_size
    if (file.size_bytes and found != file.size_bytes) or (file.sha256 and _sha256(part) != file.sha256):
        part.unlink()
        raise UnsupportedModel(f"{file.name} is not what the hub says it is ({found} bytes); start it again")
    part.replace(path)


def _append(client: httpx.Client, url: str, part: Path, meter: _Meter) -> None:
    """What is still missing of a file. Raises _Gone when the connection breaks."""
    have = part.stat().st_size if part.is_file() else 0
    headers = {"Range": f"bytes={have}-"} if have else {}
    try:
        with client.stream("GET", url, headers={**headers, "Accept-Encoding": "identity"}) as response:
            if response.status_code == 416:  # all of it was there already
                meter.add(have)
                return
            if response.status_code in (408, 429) or response.status_code >= 500:
                raise _Gone(f"the hub answered {response.status_code}")
            if response.status_code not in (200, 206):
                raise UnsupportedModel(f"the hub answered {response.status_code} to {part.name.removesuffix(_PART)}")
            resumed = response.status_code == 206
            meter.add(have if resumed else 0)
            with part.open("ab" if resumed else "wb") as target:
                for chunk in response.iter_bytes():
                    target.write(chunk)
                    meter.add(len(chunk))
    except httpx.HTTPError as error:
        raise _Gone(type(error).__name__) from error


class _Meter:
    """Bytes so far, as a stage of the preparation."""

    def __init__(self, progress: Progress, repo: str, total: int) -> None:
        self.done = 0
        self._progress, self._total = progress, max(1, -(-total // _MEGABYTE))
        self._text = f"downloading {repo} (MB)"
        self.add(0)

    def add(self, size_bytes: int) -> None:
        self.done += size_bytes
        self._progress.stage(self._text, self._total, self.done // _MEGABYTE)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _reason(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return (
            "it is not there, or only for those who may see it: accept its terms on its page, then set HF_TOKEN or run "
            "`hf auth login`"
        )
    if status == 404:
        return "there is no such model or revision"
    return f"{type(error).__name__}{f' ({status})' if status else ''}"
