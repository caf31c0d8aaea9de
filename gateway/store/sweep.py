"""Gives disk space back: bytes that no file names, temporary files, files past their time."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable

from gateway.store import files, uploads
from gateway.store.blobs import Blobs
from gateway.store.database import Store

logger = logging.getLogger("tunegate.store")


async def sweep_all(store: Store, blobs: Blobs) -> None:
    """Removes all that nothing refers to. For start-up, before the first request."""
    await sweep_expired(store, blobs)
    if await store.read(files.was_ever_used):
        removed = await blobs.sweep(await store.read(files.select_referenced))
    else:
        # A fresh database beside old blobs is more likely a lost database than a folder of strays: keep them.
        removed = await blobs.sweep(blobs.digests())
    if removed:
        logger.info("Removed %d blob(s) that no file refers to", removed)


async def sweep_expired(store: Store, blobs: Blobs) -> None:
    """Deletes the files and ends the uploads whose time is over, and their bytes."""
    now = int(time.time())
    if await store.read(lambda connection: uploads.has_expired(connection, now)):
        await remove_unreferenced(store, blobs, await store.write(lambda c: uploads.expire_uploads(c, now)))
    if await store.read(lambda connection: files.has_expired(connection, now)):
        await remove_unreferenced(store, blobs, await store.write(lambda c: files.delete_expired(c, now)))


async def remove_unreferenced(store: Store, blobs: Blobs, digests: Iterable[str]) -> None:
    """Removes those bytes that no file names any more."""

    async def is_referenced(digest: str) -> bool:
        return await store.read(lambda connection: files.is_referenced(connection, digest))

    for digest in digests:
        await blobs.remove(digest, is_referenced)
