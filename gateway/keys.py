"""Keys: made and revoked by the `tunegate keys` command, looked up in memory by every request.

Its one rule: revoked is revoked. The command appends a byte to `keys.stamp` once its change is committed, and no request is
answered on what was read before the stamp grew; replies under way are cut within WATCH_S. A key is `tg-ID-SECRET`; only its
sha256 is kept. Once a key was ever made, every request needs one.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import os
import secrets
import string
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection

from gateway.access import ANYBODY, Caller, Limits, Scope
from gateway.errors import SettingsError, StoreUnavailable, Unauthorized
from gateway.limits import Bucket
from gateway.store import keys as statements
from gateway.store import schema, sqlite
from gateway.store.database import Store
from gateway.store.datadir import DataDir
from gateway.store.keys import KeyRow
from gateway.store.metering import GROUPS, Kind, sum_counts

log = logging.getLogger("tunegate.keys")
T = TypeVar("T")

WATCH_S = 0.5
ID_CHARS = string.ascii_lowercase + string.digits
NO_DIGEST = bytes(32)


class Keyring:
    """Every key, by its id. `await open()` first; `find` needs no await as long as `is_stale` says no."""

    def __init__(self, store: Store, stamp: Path) -> None:
        self._store = store
        self._stamp = stamp
        self._read_at = -1  # the stamp's size when the keys were last read
        self._callers: dict[bytes, tuple[bytes, Caller]] = {}  # by id: what the key hashes to, and whose it is
        self._live: dict[str, set[asyncio.Task[None]]] = {}
        self._reading = asyncio.Lock()
        self._watching: asyncio.Task[None] | None = None
        self.required = True

    async def open(self) -> None:
        self._stamp.touch(mode=0o600)
        await self.reload()
        self._watching = asyncio.create_task(self._watch(), name="keys")

    async def close(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)

    def is_stale(self) -> bool:
        """Whether keys were made or revoked since they were read."""
        try:
            return os.stat(self._stamp).st_size != self._read_at
        except OSError:  # somebody removed it: nothing is known until it is back
            return True

    async def reload(self) -> None:
        """Reads the keys again, and ends what runs for those that were revoked. Raises StoreUnavailable."""
        async with self._reading:
            if not self.is_stale():
                return
            try:
                size = self._stamp.stat().st_size
            except OSError as error:
                raise StoreUnavailable(
                    f"{self._stamp.name} is gone from the data folder, so nobody can tell which keys hold; restart the server"
                ) from error
            rows = await self._store.read(statements.select_keys)
            before = {caller.key_id: caller for _, caller in self._callers.values()}
            valid = [row for row in rows if row.revoked_at is None]
            self._callers = {
                _public_part(row.id): (bytes.fromhex(row.digest), _caller(row, before.get(row.id))) for row in valid
            }
            self.required = bool(rows)
            self._read_at = size
        for key_id in self._live.keys() - {row.id for row in valid}:
            for task in self._live.pop(key_id):
                task.cancel()

    def find(self, authorization: bytes) -> Caller:
        """Who presents this Authorization header; anybody as long as there are no keys. Raises Unauthorized."""
        if not self.required:
            return ANYBODY
        scheme, _, presented = authorization.partition(b" ")
        presented = presented.strip()
        if scheme.lower() != b"bearer" or not presented:
            raise Unauthorized(
                "You didn't provide an API key. This server needs one: send the header 'Authorization: Bearer KEY'. Its "
                "operator makes keys with `tunegate keys create`."
            )
        _, _, rest = presented.partition(b"-")
        expected, caller = self._callers.get(rest.partition(b"-")[0], (NO_DIGEST, ANYBODY))
        # Also for an id that is not there: how long it takes tells nothing of which are.
        if not hmac.compare_digest(hashlib.sha256(presented).digest(), expected):
            raise Unauthorized(
                "Incorrect API key provided. It was revoked or never made here: `tunegate keys list` shows what there is."
            )
        return caller

    def begins(self, key_id: str, task: asyncio.Task[None]) -> None:
        """A request under way, to be cancelled when its key is revoked."""
        self._live.setdefault(key_id, set()).add(task)

    def ends(self, key_id: str, task: asyncio.Task[None]) -> bool:
        """Whether it was left alone until its end."""
        live = self._live.get(key_id)
        if live is None or task not in live:
            return False
        live.discard(task)
        return True

    def caller_with(self, key_id: str | None) -> Caller | None:
        """Whose key it is, for work that outlives its request; None once it was revoked."""
        if key_id is None:
            return None
        return next((caller for _, caller in self._callers.values() if caller.key_id == key_id), None)

    def __len__(self) -> int:
        return len(self._callers)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_S)
            if self.is_stale():
                try:
                    await self.reload()
                except StoreUnavailable:
                    continue  # no request is answered either before it was read
                except Exception:  # the boundary of a task: streams of keys that are revoked must not run on
                    log.exception("the keys cannot be read; tried again")


# what the command does, in a process that is not the server


def create_key(
    data: Path, name: str, project_id: str, scopes: Iterable[Scope], limits: dict[str, int]
) -> tuple[KeyRow, str]:
    """The key as it is stored, and its text, which is nowhere afterwards. Blocks; raises SettingsError."""
    public = "".join(secrets.choice(ID_CHARS) for _ in range(12))
    text = f"tg-{public}-{secrets.token_urlsafe(32)}"
    digest = hashlib.sha256(text.encode()).hexdigest()
    row = KeyRow(f"key_{public}", int(time.time()), name, digest, list(scopes), limits, project_id)
    _change(data, lambda connection: statements.insert_key(connection, row))
    return row, text


def revoke_key(data: Path, key_id: str) -> KeyRow | None:
    """The key, revoked from now on for every request that begins. Blocks; raises SettingsError."""
    return _change(data, lambda connection: statements.revoke_key(connection, key_id))


def list_keys(data: Path) -> list[KeyRow]:
    """All that were ever made, oldest first. Blocks; raises SettingsError."""
    if not (data / "tunegate.db").is_file():
        return []
    with _database(data) as connection:
        return statements.select_keys(connection)


def read_usage(data: Path, since: int) -> list[dict[str, Any]]:
    """Sums by key, project, model and kind since a unix second. Blocks; raises SettingsError."""
    if not (data / "tunegate.db").is_file():
        return []
    end, rows = int(time.time()) + 1, []
    with _database(data) as connection:
        kinds: tuple[Kind, ...] = ("completions", "embeddings")
        for kind in kinds:
            found = sum_counts(connection, kind, since, end, width_s=end - since, group_by=GROUPS)
            rows += [{**row, "kind": kind} for row in found]
    return rows


def _change(data: Path, fn: Callable[[Connection], T]) -> T:
    with _database(data) as connection:
        result = fn(connection)
    with (data / "keys.stamp").open("ab") as stamp:
        stamp.write(b".")
    return result


@contextmanager
def _database(data: Path) -> Iterator[Connection]:
    """A transaction on the store of a data folder, whether or not a server has it open."""
    if not (data / "tunegate.db").is_file():
        _prepare(data)
    writer = sqlite.create_writer(data / "tunegate.db")
    try:
        with writer.begin() as connection:
            current = schema.is_current(connection)
        if not current:
            _prepare(data)  # refused while a server of another version has it
        with writer.begin() as connection:
            yield connection
    finally:
        writer.dispose()


def _prepare(data: Path) -> None:
    with closing(DataDir.open(data)) as held:
        Store.open(held.database).close()


def _public_part(key_id: str) -> bytes:
    return key_id.removeprefix("key_").encode()


def _caller(row: KeyRow, before: Caller | None) -> Caller:
    """With what is left of its limits, where it was known before."""
    limits = Limits(**row.limits)
    allowance = before.allowance if before is not None else Bucket.of(limits)
    return Caller(row.project_id, row.id, frozenset(row.scopes), limits, allowance)  # type: ignore[arg-type]


def require_key(data: Path, host: str) -> None:
    """Raises SettingsError unless somebody holds a key to a server that a network can reach."""
    if not any(row.revoked_at is None for row in list_keys(data)):
        raise SettingsError(
            f"host {host!r} is not a loopback address, and without keys anybody on the network could use it; make one with "
            "`tunegate keys create`, or keep 127.0.0.1 and reach it through `ssh -L 8000:127.0.0.1:8000 THIS_MACHINE`"
        )
