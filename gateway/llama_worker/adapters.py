"""The adapters that requests may name, and those of them that are in memory.

Any number is registered: llama.cpp proves the file once, and from then on the name means that very file until it is
unloaded. At most `limit` are in memory; one that is asked for comes in, and the one that was used longest ago and that
nobody is using goes. It happens on the decode loop's thread, between steps, which is the only one that may call llama.cpp; a
thread of its own does beforehand what takes longer: it reads the file, and makes the form for decode steps.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
from collections import OrderedDict
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from gateway.errors import NotFound, RequestError, TunegateError
from gateway.llama_worker.adapter_forms import Forms, ReadFile, identity, read
from gateway.llama_worker.native import Context, Model, NativeError
from gateway.llama_worker.steady import AdapterForm

log = logging.getLogger(__name__)

ADAPTER_FILE = "adapter.gguf"


@dataclass(frozen=True)
class Registered:
    """A name and the file it means. `serial` is never given twice in the life of a process."""

    name: str
    serial: int
    path: Path
    identity: tuple[int, ...]  # of the file: device, inode, size and time of its last change


class Adapters:
    """Registers adapters for one model and has them in memory when they are needed."""

    def __init__(self, model: Model, served_name: str, limit: int, form: AdapterForm) -> None:
        self._model = model
        self._served_name = served_name
        self._limit = limit
        self._form = form
        self._serials = itertools.count(1)
        self._registered: dict[str, Registered] = {}
        self._leaving: dict[str, Registered] = {}
        self._in_memory: OrderedDict[int, Forms] = OrderedDict()  # by serial, the least recently used first
        self._reading: dict[int, Future[ReadFile | None]] = {}  # of files that are asked for and not in memory
        self._thread = ThreadPoolExecutor(1, "adapters")

    def names(self) -> dict[str, Path]:
        """The names that requests may use, and the folder of each. For any thread."""
        return {
            name: entry.path.parent for name, entry in list(self._registered.items())
        }  # a copy: it may grow meanwhile

    def get(self, name: str) -> Registered | None:
        """The adapter of a name, or None when there is none (any more). For any thread."""
        return self._registered.get(name)

    @property
    def in_memory(self) -> int:
        """How many are in memory."""
        return len(self._in_memory)

    def read(self, directory: str | None) -> Future[ReadFile | None]:
        """Reads the file that `load` will want, so that the loop need not wait; None where that fails. For any thread."""
        return self._thread.submit(_read, directory, self._form)

    def load(
        self, name: str, directory: str | None, read: ReadFile | None, context: Context, used: Collection[int]
    ) -> None:
        """Registers DIRECTORY/adapter.gguf, which was `read`, as `name` once llama.cpp has taken it.

        RequestError (400), or NotFound when there is no such file. It stays in memory if there is room beside those `used`.
        """
        if name == self._served_name or name in self._registered or name in self._leaving:
            raise RequestError(
                f"lora_name is {name!r}, which is taken; a name is never reused while it is loaded.", param="lora_name"
            )
        path = _adapter_path(directory)
        try:
            known = identity(path)
            if read is None or read.identity != known:
                raise RequestError(f"{path} changed while it was loaded; load it again.", param="lora_path")
            forms = Forms(self._model, path, self._form, read.made)
        except (NativeError, OSError) as error:
            raise RequestError(f"llama.cpp refused {path}: {error}", param="lora_path") from None
        entry = Registered(name, next(self._serials), path, known)
        self._registered[name] = entry
        if self._make_room(context, used):
            self._in_memory[entry.serial] = forms
        else:
            forms.close()
        log.info("adapter %r registered from %r", name, str(path))

    def bring_in(self, entry: Registered, context: Context, used: Collection[int]) -> bool:
        """Has the adapter in memory; False when its file is being read, or those `used` (serials) leave no room yet.

        TunegateError when the file is not what was registered.
        """
        if entry.serial in self._in_memory:
            self._in_memory.move_to_end(entry.serial)
            self._in_memory[entry.serial].prepare(self._thread)
            return True
        reading = self._reading.get(entry.serial)
        if reading is None:
            reading = self._reading[entry.serial] = self.read(str(entry.path.parent))
        if not reading.done() or not self._make_room(context, used):
            return False
        del self._reading[entry.serial]
        try:
            read = reading.result()
            # Now as well as then: it may have been read some time before there was room.
            if identity(entry.path) != entry.identity or read is None or read.identity != entry.identity:
                raise TunegateError(
                    f"The file of adapter {entry.name!r}, {entry.path}, has changed since it was loaded; a name means one "
                    "adapter for as long as it is loaded. Unload it and load the new file under another name."
                )
            forms = Forms(self._model, entry.path, self._form, read.made)
        except (NativeError, OSError) as error:
            raise TunegateError(f"Adapter {entry.name!r} cannot be loaded again from {entry.path}: {error}") from None
        self._in_memory[entry.serial] = forms
        forms.prepare(self._thread)
        return True

    def give_up(self, entry: Registered) -> None:
        """Forgets what was read of an adapter that nobody waits for any more."""
        self._reading.pop(entry.serial, None)

    def holds(self, serial: int) -> bool:
        """Whether an adapter is in memory; the base (0) is none."""
        return serial in self._in_memory

    def prepared(self, serial: int) -> bool:
        """Whether a decode step under an adapter can be taken now, without waiting; of the base (0) always."""
        forms = self._in_memory.get(serial)
        return forms is None or forms.prepared

    def forms(self, entry: Registered) -> Forms:
        """The adapter, which must have been brought in."""
        return self._in_memory[entry.serial]

    def withdraw(self, name: str) -> Registered:
        """Takes `name` from new requests; `free` ends it once nothing uses it. NotFound when it is unknown."""
        entry = self._registered.pop(name, None)
        if entry is None:
            raise NotFound(f"lora_name is {name!r}; no adapter of that name is loaded.", param="lora_name")
        self._leaving[name] = entry
        return entry

    def free(self, entry: Registered, context: Context) -> None:
        """Frees a withdrawn adapter that nothing uses."""
        del self._leaving[entry.name]
        self._reading.pop(entry.serial, None)
        if entry.serial in self._in_memory:
            self._evict(entry.serial, context)
        log.info("adapter %r unloaded", entry.name)

    def close(self) -> None:
        """Frees them all; after the context."""
        for forms in self._in_memory.values():
            forms.close()
        self._in_memory.clear()
        self._thread.shutdown()

    def _make_room(self, context: Context, used: Collection[int]) -> bool:
        while len(self._in_memory) >= self._limit:
            idle = next((serial for serial in self._in_memory if serial not in used), None)
            if idle is None:
                return False
            self._evict(idle, context)
        return True

    def _evict(self, serial: int, context: Context) -> None:
        forms = self._in_memory.pop(serial)
        if forms.owns(context.adapter):
            context.use_adapter(None)  # a freed adapter must be on no context
        forms.close()


def _read(directory: str | None, form: AdapterForm) -> ReadFile | None:
    with contextlib.suppress(OSError, RequestError):  # whoever loads it says what is wrong
        return read(_adapter_path(directory), form)
    return None


def _adapter_path(directory: str | None) -> Path:
    if not directory or "\0" in directory or not os.path.isabs(directory):
        raise RequestError(f"lora_path is {directory!r}; it must be an absolute directory.", param="lora_path")
    path = Path(directory) / ADAPTER_FILE
    if not path.is_file():
        raise NotFound(f"lora_path is {directory!r}; there is no {ADAPTER_FILE} in it.", param="lora_path")
    return path
