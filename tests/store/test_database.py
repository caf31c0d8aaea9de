"""The store: what is acknowledged is committed, what failed is undone alone, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, event, func, insert, select, text
from sqlalchemy.exc import IntegrityError, OperationalError

from gateway.errors import NotFound, SettingsError, StoreUnavailable
from gateway.store import Store
from gateway.store.tables import events, files, jobs, metadata

pytestmark = pytest.mark.anyio


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "odd name %20 #?.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    opened = Store.open(path, busy_timeout_s=0.2)
    yield opened
    opened.close()


def add(file_id: str, filename: str = "a.txt") -> Callable[[Connection], str]:
    def run(connection: Connection) -> str:
        connection.execute(
            insert(files).values(
                id=file_id, created_at=1, filename=filename, purpose="user_data", size_bytes=1, digest="d"
            )
        )
        return file_id

    return run


def select_ids(connection: Connection) -> list[str]:
    return list(connection.scalars(select(files.c.id).order_by(files.c.seq)))


# what holds when all is well


async def test_a_write_is_read_by_the_next_reader(store: Store) -> None:
    assert await store.write(add("one")) == "one"
    assert await store.read(select_ids) == ["one"]


async def test_writes_are_committed_in_the_order_in_which_they_were_asked_for(store: Store) -> None:
    names = [f"file-{n}" for n in range(600)]
    assert await asyncio.gather(*(store.write(add(name)) for name in names)) == names
    assert await store.read(select_ids) == names


async def test_writes_that_wait_share_one_transaction(store: Store) -> None:
    began = threading.Event()
    go_on = threading.Event()

    def hold(connection: Connection) -> None:
        began.set()
        go_on.wait(10)

    first = asyncio.ensure_future(store.write(hold))
    await asyncio.to_thread(began.wait, 10)
    commits: list[Connection] = []
    event.listen(store.writer, "commit", commits.append)
    waiting = asyncio.gather(*(store.write(add(f"file-{n}")) for n in range(50)))
    await asyncio.sleep(0.05)
    assert await store.read(select_ids) == []  # readers are not held up, and see nothing early
    go_on.set()
    await asyncio.gather(first, waiting)
    assert len(await store.read(select_ids)) == 50
    assert len(commits) == 2  # the one that was held, and all that came meanwhile


async def test_a_function_that_fails_is_undone_alone_and_its_caller_gets_the_error(store: Store) -> None:
    def fail(connection: Connection) -> None:
        add("undone")(connection)
        raise NotFound("no such thing")

    results = await asyncio.gather(
        store.write(add("one")),
        store.write(fail),
        store.write(add("one")),
        store.write(add("two")),
        return_exceptions=True,
    )
    assert results[0] == "one" and results[3] == "two"
    assert isinstance(results[1], NotFound) and isinstance(results[2], IntegrityError)
    assert await store.read(select_ids) == ["one", "two"]


async def test_a_mistake_in_a_statement_is_not_called_a_failing_store(store: Store) -> None:
    with pytest.raises(OperationalError, match="no such table"):
        await store.write(lambda connection: connection.execute(text("SELECT * FROM nowhere")))
    with pytest.raises(OperationalError, match="no such table"):
        await store.read(lambda connection: connection.execute(text("SELECT * FROM nowhere")))
    assert await store.write(add("one")) == "one"


async def test_a_reader_cannot_write(store: Store) -> None:
    with pytest.raises(StoreUnavailable):
        await store.read(add("one"))
    assert await store.read(select_ids) == []


async def test_a_reader_sees_one_snapshot(store: Store) -> None:
    started, go_on = threading.Event(), threading.Event()

    def read_twice(connection: Connection) -> tuple[list[str], list[str]]:
        before = select_ids(connection)
        started.set()
        go_on.wait(10)
        return before, select_ids(connection)

    reading = asyncio.ensure_future(store.read(read_twice))
    await asyncio.to_thread(started.wait, 10)
    await store.write(add("one"))
    go_on.set()
    assert await reading == ([], [])


async def test_foreign_keys_hold(store: Store) -> None:
    stray = insert(events).values(id="e", job_id="none", created_at=1, level="info", type="message", message="m")
    with pytest.raises(IntegrityError):
        await store.write(lambda connection: connection.execute(stray) and None)


async def test_a_json_column_keeps_none_and_null_as_one(store: Store) -> None:
    job = insert(jobs).values(
        id="j",
        created_at=1,
        model="m",
        base="b",
        training_file="f",
        seed=1,
        hyperparameters={"n": 1.5},
        status="queued",
    )
    await store.write(lambda connection: connection.execute(job, {"error": None}) and None)
    row = await store.read(
        lambda connection: connection.execute(
            select(jobs.c.hyperparameters, jobs.c.error).where(jobs.c.error.is_(None))
        ).one()
    )
    assert tuple(row) == ({"n": 1.5}, None)


# cancellation and closing


async def test_a_cancelled_write_that_still_waits_is_withdrawn_and_harms_nobody(store: Store) -> None:
    began, go_on = threading.Event(), threading.Event()

    def hold(connection: Connection) -> str:
        began.set()
        go_on.wait(10)
        return add("held")(connection)

    held = asyncio.ensure_future(store.write(hold))
    await asyncio.to_thread(began.wait, 10)
    withdrawn = asyncio.ensure_future(store.write(add("withdrawn")))
    kept = asyncio.ensure_future(store.write(add("kept")))
    await asyncio.sleep(0)
    withdrawn.cancel()
    held.cancel()  # this one runs: it is committed unheard
    go_on.set()
    assert await kept == "kept"
    assert await store.read(select_ids) == ["held", "kept"]
    assert withdrawn.cancelled() and held.cancelled()


async def test_closing_commits_what_was_accepted_and_refuses_what_comes_later(path: Path) -> None:
    store = Store.open(path)
    accepted = [asyncio.ensure_future(store.write(add(f"file-{n}"))) for n in range(300)]
    await asyncio.sleep(0)
    await asyncio.to_thread(store.close)
    assert len(await asyncio.gather(*accepted)) == 300
    with pytest.raises(StoreUnavailable):
        await store.write(add("late"))
    with pytest.raises(StoreUnavailable):
        await store.read(select_ids)
    store.close()
    assert count_on_disk(path) == 300


# what goes wrong


async def test_a_full_disk_acknowledges_nothing_and_the_next_good_write_works(store: Store) -> None:
    await store.write(add("before"))

    def cap(connection: Connection) -> None:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count={pages + 2}")

    await store.write(cap)  # SQLite then says "database or disk is full", as on a disk that is
    big = [store.write(add(f"big-{n}", "x" * 100_000)) for n in range(5)]
    results = await asyncio.gather(*big, store.write(add("beside")), return_exceptions=True)
    assert all(isinstance(result, StoreUnavailable) for result in results[:5])
    for error in results[:5]:
        assert isinstance(error, StoreUnavailable)
        assert error.status == 503 and error.retry_after_s and "disk is full" in error.message
    acknowledged = [result for result in results if isinstance(result, str)]
    assert await store.read(select_ids) == ["before", *acknowledged]
    await store.write(lambda connection: connection.exec_driver_sql("PRAGMA max_page_count=1000000") and None)
    assert await store.write(add("after")) == "after"
    assert await store.read(select_ids) == ["before", *acknowledged, "after"]


async def test_a_commit_that_fails_is_told_to_all_who_were_in_it(store: Store) -> None:
    # A deferred constraint is judged at COMMIT: the one portable way to have a COMMIT fail on purpose.
    await store.write(
        lambda c: (
            c.exec_driver_sql("CREATE TABLE strict (id TEXT REFERENCES files(id) DEFERRABLE INITIALLY DEFERRED)")
            and None
        )
    )
    began, go_on = threading.Event(), threading.Event()

    def hold(connection: Connection) -> None:
        began.set()
        go_on.wait(10)

    held = asyncio.ensure_future(store.write(hold))
    await asyncio.to_thread(began.wait, 10)
    writes = [
        asyncio.ensure_future(store.write(add("one"))),
        asyncio.ensure_future(
            store.write(lambda c: c.exec_driver_sql("INSERT INTO strict VALUES ('nobody')") and None)
        ),
        asyncio.ensure_future(store.write(add("one"))),  # would have been an IntegrityError, had the first been stored
    ]
    await asyncio.sleep(0)
    go_on.set()
    await held
    results = await asyncio.gather(*writes, return_exceptions=True)
    assert [type(result) for result in results] == [StoreUnavailable] * 3
    assert len({id(result) for result in results}) == 3
    assert await store.read(select_ids) == []
    assert await store.write(add("one")) == "one"


async def test_a_database_that_another_process_locks_gives_503_in_bounded_time(store: Store, path: Path) -> None:
    intruder = sqlite3.connect(path, isolation_level=None)
    intruder.execute("BEGIN IMMEDIATE")
    began = time.monotonic()
    with pytest.raises(StoreUnavailable, match="locked by another process") as caught:
        await store.write(add("one"))
    assert time.monotonic() - began < 5
    assert caught.value.retry_after_s is not None
    assert await store.read(select_ids) == []
    intruder.execute("ROLLBACK")
    intruder.close()
    assert await store.write(add("one")) == "one"


def test_a_store_killed_at_any_moment_keeps_every_write_that_it_acknowledged(path: Path) -> None:
    Store.open(path).close()
    acknowledged: list[str] = []
    for seed in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", ACKNOWLEDGE, str(path), str(seed)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        acknowledged.append(child.stdout.readline().strip())
        time.sleep(random.Random(seed).uniform(0.05, 0.3))
        child.kill()
        lines = child.stdout.read().split("\n")
        acknowledged += lines[:-1]  # the last line may be torn
        child.stdout.close()
        child.wait()
    store = Store.open(path)
    stored = set(asyncio.run(store.read(select_ids)))
    store.close()
    assert len(acknowledged) > 3 and set(acknowledged) <= stored


ACKNOWLEDGE = """
import asyncio, sys
from gateway.store import Store
from tests.store.test_database import add

async def main(path, seed):
    store = Store.open(path)
    async def keep_writing(writer):
        for n in range(1_000_000):
            print(await store.write(add(f"file-{seed}-{writer}-{n}", "x" * 500)), flush=True)
    await asyncio.gather(*(keep_writing(writer) for writer in range(8)))

asyncio.run(main(*sys.argv[1:]))
"""


# opening


def test_a_damaged_database_is_refused_and_left_as_it_is(path: Path) -> None:
    store = Store.open(path)
    asyncio.run(fill(store))
    store.close()
    content = bytearray(path.read_bytes())
    content[4096 * 3 : 4096 * 3 + 2000] = bytes(2000)
    path.write_bytes(content)
    with pytest.raises(SettingsError, match="damaged") as caught:
        Store.open(path)
    assert str(path) in caught.value.message
    assert path.read_bytes() == content


async def fill(store: Store) -> None:
    await asyncio.gather(*(store.write(add(f"file-{n}", "x" * 1000)) for n in range(100)))


def test_a_file_that_is_no_database_is_refused(path: Path) -> None:
    path.write_bytes(b"not a database, but long enough to be looked at" * 100)
    with pytest.raises(SettingsError, match="damaged"):
        Store.open(path)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be opened"):
        Store.open(tmp_path / "none" / "tunegate.db")


def test_a_torn_log_is_recovered_up_to_the_last_whole_transaction(path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ACKNOWLEDGE, str(path), "0"], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    first = child.stdout.readline().strip()
    child.kill()
    child.communicate()
    log = path.with_name(path.name + "-wal")
    assert log.stat().st_size > 0
    with log.open("ab") as file:
        file.write(bytes(range(256)) * 20)
    store = Store.open(path)
    assert first in asyncio.run(store.read(select_ids))
    store.close()


def test_a_database_of_a_newer_version_is_refused_by_name(path: Path) -> None:
    Store.open(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    with pytest.raises(SettingsError, match="newer Tunegate"):
        Store.open(path)


async def test_the_migrations_build_just_the_tables_that_the_code_knows(store: Store) -> None:
    def differences(connection: Connection) -> list[object]:
        return list(
            compare_metadata(MigrationContext.configure(connection, opts={"compare_server_default": True}), metadata)
        )

    assert await store.read(differences) == []


async def test_opening_again_keeps_everything_and_migrates_nothing(store: Store, path: Path) -> None:
    await store.write(add("one"))
    store.close()
    again = Store.open(f"sqlite:///{path.parent}/plain.db")
    again.close()
    again = Store.open(path)
    assert await again.read(select_ids) == ["one"]
    assert await again.read(lambda connection: pragma(connection, "journal_mode")) == "wal"
    assert await again.write(lambda connection: pragma(connection, "synchronous")) == 2
    assert await again.write(lambda connection: pragma(connection, "foreign_keys")) == 1
    again.close()


def pragma(connection: Connection, name: str) -> object:
    return connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()


def count_on_disk(path: Path) -> int:
    connection = sqlite3.connect(path)
    try:
        return int(connection.execute("SELECT count(*) FROM files").fetchone()[0])
    finally:
        connection.close()


async def test_every_table_belongs_to_projects(store: Store) -> None:
    assert all("project_id" in table.c for table in metadata.sorted_tables)
    assert await store.read(lambda connection: connection.scalar(select(func.count()).select_from(jobs))) == 0
