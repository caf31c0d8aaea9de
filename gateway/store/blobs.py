"""Files by digest: `blobs/<aa>/<sha256>`, each whole or absent, never changed.

Bytes are written beside, fsynced and renamed before any row names them; they go when no row does. In between a digest is
*held*: whoever put it releases it once its row is committed, so that deleting an equal file meanwhile takes no bytes
away. All disk work is done on threads.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import logging
import os
import tempfile
from collections import Counter
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, ParamSpec, TypeVar, cast

from gateway.errors import StoreUnavailable
from gateway.jobdir import fsync_folder

logger = logging.getLogger("tunegate.store")

CHUNK_BYTES = 1 << 20
RETRY_AFTER_S = 30
DISK_FAULTS = {
    errno.ENOSPC: "its disk is full",
    errno.EFBIG: "it may not write files of this size",
    errno.EDQUOT: "its disk quota is used up",
    errno.EIO: "its disk reports an input/output error",
    errno.EROFS: "its disk is mounted read-only",
    errno.EMFILE: "it has too many files open",
    errno.ENFILE: "it has too many files open",
}

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class BlobRef:
    """Bytes that are on the disk; `digest` is the hexadecimal sha256."""

    digest: str
    size_bytes: int


class Blobs:
    """The bytes of every file, in a folder that this process alone writes to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._temporary = folder / "tmp"
        self._held: Counter[str] = Counter()
        self._moving = asyncio.Lock()  # a blob appears and disappears only under it
        self._temporary.mkdir(parents=True, exist_ok=True)

    def path(self, digest: str) -> Path:
        """Where the bytes are: to be read or hard-linked, never written to."""
        return self.folder / digest[:2] / digest

    async def put(self, content: bytes | AsyncIterable[bytes]) -> BlobRef:
        """Stores bytes and holds them until `release`, or the end of the process. Raises `StoreUnavailable`."""
        draft = await Draft.open(self._temporary)
        try:
            if isinstance(content, bytes):
                await draft.write(content)
            else:
                async for chunk in content:
                    await draft.write(chunk)
            return await self._keep(draft)
        finally:
            await draft.discard()

    async def take(self, path: Path) -> BlobRef:
        """Stores a file of the same disk by moving it here, and holds it as `put` does. Raises `StoreUnavailable`."""
        digest, size_bytes = await _run_on_disk(_read_digest, path)
        async with self._moving:
            await _run_on_disk(_put_in_place, path, self.path(digest))
            self._held[digest] += 1
        return BlobRef(digest, size_bytes)

    def release(self, ref: BlobRef) -> None:
        """Ends a hold: a row names the bytes by now, or nobody will."""
        self._held[ref.digest] -= 1
        if self._held[ref.digest] <= 0:
            del self._held[ref.digest]

    @asynccontextmanager
    async def putting(self, content: bytes | AsyncIterable[bytes]) -> AsyncIterator[BlobRef]:
        """`put`, held for the length of the block, in which the row is to be committed."""
        ref = await self.put(content)
        try:
            yield ref
        finally:
            self.release(ref)

    async def open(self, digest: str) -> BlobReader:
        """The bytes, to be streamed; they outlast a deletion that comes later. Raises FileNotFoundError."""
        return BlobReader(await _run_on_disk(self.path(digest).open, "rb"))

    async def remove(self, digest: str, is_referenced: Callable[[str], Awaitable[bool]]) -> bool:
        """Removes bytes that nobody holds and no row names; whether it did."""
        async with self._moving:
            if self._held[digest] > 0 or await is_referenced(digest):
                return False
            await _run_on_disk(self.path(digest).unlink, missing_ok=True)
            return True

    async def sweep(self, referenced: Iterable[str]) -> int:
        """Removes every blob that is not `referenced` and every temporary file; how many blobs. For start-up only."""
        async with self._moving:
            return await _run_on_disk(self._sweep, set(referenced) | set(self._held))

    def digests(self) -> set[str]:
        """What is stored. Blocks."""
        return {path.name for path in self.folder.glob("??/*") if path.parent.name == path.name[:2]}

    async def _keep(self, draft: Draft) -> BlobRef:
        async with self._moving:
            ref = await draft.finish(self.path)
            self._held[ref.digest] += 1
        return ref

    def _sweep(self, kept: set[str]) -> int:
        for leftover in self._temporary.iterdir():
            leftover.unlink()
        strays = self.digests() - kept
        for stray in strays:
            self.path(stray).unlink()
        return len(strays)


class Draft:
    """A blob that is being written; afterwards it is either finished or discarded."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self.size_bytes = 0

    @classmethod
    async def open(cls, folder: Path) -> Draft:
        file = await _run_on_disk(tempfile.NamedTemporaryFile, dir=folder, prefix="put-", delete=False)
        return cls(cast(BinaryIO, file))

    async def write(self, chunk: bytes) -> None:
        """Adds bytes. Small chunks wait until a thread is worth its hop."""
        self._pending.append(chunk)
        self._pending_bytes += len(chunk)
        self.size_bytes += len(chunk)
        if self._pending_bytes >= CHUNK_BYTES:
            await _run_on_disk(self._flush)

    async def finish(self, path_of: Callable[[str], Path]) -> BlobRef:
        """Brings the bytes to the place that their digest gives; they survive a power cut from here on."""
        return await _run_on_disk(self._finish, path_of)

    async def discard(self) -> None:
        """Leaves nothing behind; harmless after `finish`. Completes also when its caller is cancelled."""
        await asyncio.shield(asyncio.get_running_loop().run_in_executor(None, self._discard))

    def _flush(self) -> None:
        for chunk in self._pending:
            self._digest.update(chunk)
            self._file.write(chunk)
        self._pending.clear()
        self._pending_bytes = 0

    def _finish(self, path_of: Callable[[str], Path]) -> BlobRef:
        self._flush()
        self._file.flush()
        os.fchmod(self._file.fileno(), 0o400)  # jobs link to these very bytes
        os.fsync(self._file.fileno())
        digest = self._digest.hexdigest()
        _put_in_place(Path(self._file.name), path_of(digest))
        self._file.close()
        return BlobRef(digest, self.size_bytes)

    def _discard(self) -> None:
        with suppress(OSError):  # closing flushes: on a full disk that fails once more
            self._file.close()
        with suppress(OSError):
            Path(self._file.name).unlink(missing_ok=True)


class BlobReader:
    """An open blob; close it in the end."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while chunk := await asyncio.to_thread(self._file.read, CHUNK_BYTES // 4):
            yield chunk

    def close(self) -> None:
        self._file.close()


def _read_digest(path: Path) -> tuple[str, int]:
    """The digest and the size of a file whose bytes are on the disk now, and are not changed any more."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fchmod(file.fileno(), 0o400)
        os.fsync(file.fileno())
        return digest, os.fstat(file.fileno()).st_size


def _put_in_place(source: Path, path: Path) -> None:
    if not path.parent.exists():
        path.parent.mkdir(mode=0o700, exist_ok=True)
        fsync_folder(path.parent.parent)
    os.replace(source, path)
    fsync_folder(path.parent)


async def _run_on_disk(fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Runs disk work on a thread. Raises `StoreUnavailable` where the disk, not the caller, is at fault."""
    try:
        return await asyncio.to_thread(fn, *args, **kwargs)
    except OSError as error:
        if error.errno not in DISK_FAULTS:
            raise
        logger.error("The disk failed: %s", error)
        raise StoreUnavailable(
            f"The server cannot store files now: {DISK_FAULTS[error.errno]}. Nothing was stored.",
            retry_after_s=RETRY_AFTER_S,
        ) from error
