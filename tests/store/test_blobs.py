"""Files by digest: whole or absent, held while they are new, gone when no row names them."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import resource
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.errors import StoreUnavailable
from gateway.store import Store, files
from gateway.store.blobs import BlobRef, Blobs
from gateway.store.sweep import remove_unreferenced, sweep_all

pytestmark = pytest.mark.anyio


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return Blobs(tmp_path / "blobs")


def temporary(blobs: Blobs) -> list[Path]:
    return list((blobs.folder / "tmp").iterdir())


async def in_chunks(content: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(content), size):
        yield content[start : start + size]


async def nobody_refers(_: str) -> bool:
    return False


async def somebody_refers(_: str) -> bool:
    return True


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 1, 3_000_000])
async def test_bytes_come_back_under_their_digest(blobs: Blobs, size: int) -> None:
    content = os.urandom(size)
    for given in (content, in_chunks(content, 65_537)):
        ref = await blobs.put(given)
        assert ref == BlobRef(hashlib.sha256(content).hexdigest(), size)
    reader = await blobs.open(ref.digest)
    assert b"".join([chunk async for chunk in reader]) == content
    reader.close()
    assert blobs.path(ref.digest).stat().st_mode & 0o777 == 0o400
    assert temporary(blobs) == []


async def test_a_source_that_fails_leaves_nothing(blobs: Blobs) -> None:
    async def breaks() -> AsyncIterator[bytes]:
        yield bytes(2_000_000)
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        await blobs.put(breaks())
    assert temporary(blobs) == [] and blobs.digests() == set()


async def test_a_put_that_is_cancelled_leaves_nothing(blobs: Blobs) -> None:
    reached = asyncio.Event()

    async def stalls() -> AsyncIterator[bytes]:
        yield bytes(2_000_000)
        reached.set()
        await asyncio.sleep(60)

    putting = asyncio.ensure_future(blobs.put(stalls()))
    await reached.wait()
    assert len(temporary(blobs)) == 1
    putting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await putting
    assert temporary(blobs) == [] and blobs.digests() == set()


async def test_bytes_that_are_held_or_referred_to_are_not_removed(blobs: Blobs) -> None:
    ref = await blobs.put(b"x")
    assert await blobs.put(b"x") == ref
    assert not await blobs.remove(ref.digest, nobody_refers)
    blobs.release(ref)
    assert not await blobs.remove(ref.digest, nobody_refers)
    blobs.release(ref)
    assert not await blobs.remove(ref.digest, somebody_refers)
    assert await blobs.remove(ref.digest, nobody_refers)
    assert not blobs.path(ref.digest).exists()


async def test_a_file_being_read_is_read_to_its_end_though_it_is_deleted(blobs: Blobs) -> None:
    content = os.urandom(1_000_000)
    async with blobs.putting(content) as ref:
        reader = await blobs.open(ref.digest)
    await blobs.remove(ref.digest, nobody_refers)
    assert b"".join([chunk async for chunk in reader]) == content
    reader.close()
    with pytest.raises(FileNotFoundError):
        await blobs.open(ref.digest)


async def test_a_job_keeps_its_hard_link(blobs: Blobs, tmp_path: Path) -> None:
    async with blobs.putting(b"x") as ref:
        os.link(blobs.path(ref.digest), tmp_path / "pinned")
    await blobs.remove(ref.digest, nobody_refers)
    assert (tmp_path / "pinned").read_bytes() == b"x"


async def test_a_damaged_blob_is_healed_by_putting_it_again(blobs: Blobs) -> None:
    ref = await blobs.put(b"whole")
    blobs.path(ref.digest).chmod(0o600)
    blobs.path(ref.digest).write_bytes(b"dam")
    await blobs.put(b"whole")
    assert blobs.path(ref.digest).read_bytes() == b"whole"


# at start


async def test_a_start_sweeps_what_a_crash_left_and_keeps_what_rows_name(blobs: Blobs, tmp_path: Path) -> None:
    store = Store.open(tmp_path / "tunegate.db")
    kept, stray, expired = await blobs.put(b"kept"), await blobs.put(b"stray"), await blobs.put(b"expired")
    for ref, created_at, expires_after_s in ((kept, 1, None), (expired, 1, 3600)):
        await store.write(
            lambda connection, ref=ref, created_at=created_at, after=expires_after_s: files.insert_file(
                connection, ref, filename="a", purpose="p", created_at=created_at, expires_after_s=after
            )
        )
    (blobs.folder / "tmp" / "put-torn").write_bytes(b"half of")
    restarted = Blobs(blobs.folder)
    await sweep_all(store, restarted)
    assert restarted.digests() == {kept.digest} and temporary(restarted) == []
    assert not restarted.path(stray.digest).exists()
    store.close()


async def test_a_fresh_database_beside_old_blobs_takes_nothing_away(blobs: Blobs, tmp_path: Path) -> None:
    ref = await blobs.put(b"of a database that was moved away")
    store = Store.open(tmp_path / "tunegate.db")
    restarted = Blobs(blobs.folder)
    await sweep_all(store, restarted)
    assert restarted.digests() == {ref.digest}
    store.close()


def test_a_process_killed_while_it_puts_leaves_no_visible_file(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", PUT_FOR_EVER, str(tmp_path)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    child.kill()
    child.communicate()
    blobs = Blobs(tmp_path)
    assert temporary(blobs) != []
    for digest in blobs.digests():
        assert hashlib.sha256(blobs.path(digest).read_bytes()).hexdigest() == digest
    asyncio.run(blobs.sweep(blobs.digests()))
    assert temporary(blobs) == []


PUT_FOR_EVER = """
import asyncio, os, pathlib, sys
from gateway.store.blobs import Blobs

async def main():
    blobs = Blobs(pathlib.Path(sys.argv[1]))
    await blobs.put(os.urandom(500_000))

    async def endless():
        while True:
            yield os.urandom(2_000_000)
            print("written", flush=True)

    await blobs.put(endless())

asyncio.run(main())
"""


# a bad disk


def test_a_full_disk_is_a_503_that_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of a file stands in for the full disk, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0].startswith("503 30 The server cannot store files now")
    assert Blobs(tmp_path).digests() == {hashlib.sha256(b"small").hexdigest()} and temporary(Blobs(tmp_path)) == []


FULL_DISK = """
import asyncio, pathlib, resource, signal, sys
from gateway.errors import StoreUnavailable
from gateway.store.blobs import Blobs

async def main():
    blobs = Blobs(pathlib.Path(sys.argv[1]))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
    try:
        await blobs.put(bytes(3_000_000))
    except StoreUnavailable as error:
        print(error.status, error.retry_after_s, error.message)
    await blobs.put(b"small")

asyncio.run(main())
"""


async def test_a_process_out_of_descriptors_says_503_and_goes_on(blobs: Blobs) -> None:
    await blobs.put(b"warm")  # so that threads and modules are there already
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        try:
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY))
        except OSError as error:
            assert error.errno == errno.EMFILE
        with pytest.raises(StoreUnavailable, match="too many files open"):
            await blobs.put(b"x")
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    await blobs.put(b"x")


async def test_a_deleted_row_takes_its_bytes_along_unless_another_row_needs_them(blobs: Blobs, tmp_path: Path) -> None:
    store = Store.open(tmp_path / "tunegate.db")
    rows = []
    for name in ("a", "b"):
        async with blobs.putting(b"shared") as ref:
            rows.append(
                await store.write(
                    lambda connection, ref=ref, name=name: files.insert_file(
                        connection, ref, filename=name, purpose="p", created_at=1
                    )
                )
            )
    for row, there in zip(rows, (True, False), strict=True):
        await store.write(lambda connection, row=row: files.delete_file(connection, row.id, now=2))
        await remove_unreferenced(store, blobs, [row.digest])
        assert blobs.path(row.digest).exists() is there
    store.close()
