"""The decode loop in a thread of the test's own process, with a context that can be told to fail."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

from gateway.errors import TunegateError
from gateway.llama_worker.adapters import Adapters
from gateway.llama_worker.generation import Event, Finished, Generation
from gateway.llama_worker.metrics import Metrics
from gateway.llama_worker.native import Bytes, Context, ContextSize, Model, NativeError, NativeLog
from gateway.llama_worker.prefix_cache import PrefixCache
from gateway.llama_worker.sampling import Sampling
from gateway.llama_worker.scheduler import Reply, Scheduler
from gateway.llama_worker.steady import AdapterForm
from gateway.llama_worker.wire import Choice, Completion


class FailingContext(Context):
    """A context that fails where `failing` names the method, as llama.cpp does when it has no memory left."""

    def __init__(self, model: Model, size: ContextSize) -> None:
        super().__init__(model, size, threads=1)
        self.failing: set[str] = set()
        self.failed: list[str] = []

    def save(self, sequence: int) -> Bytes:
        self._perhaps_fail("save")
        return super().save(sequence)

    def restore(self, sequence: int, blob: Bytes) -> None:
        try:
            self._perhaps_fail("restore")
        except NativeError:
            self.clear(sequence)
            raise
        super().restore(sequence, blob)

    def _perhaps_fail(self, what: str) -> None:
        if what in self.failing:
            self.failed.append(what)
            raise NativeError(f"{what} was told to fail")


class Loop:
    """A decode loop that runs, and how to ask it. Give it the requests of a test before `start`, so that they meet."""

    def __init__(self, model: Model, context: FailingContext, adapters: Adapters) -> None:
        self.context = context
        self.adapters = adapters
        self.over: list[str] = []  # the models of the requests that have ended, in order
        self.scheduler = Scheduler(
            model,
            context,
            adapters,
            "base",
            PrefixCache(2**26),
            Metrics(),
            _deliver,
            rows=8,
        )
        self.ended: Future[None] = Future()

    def start(self) -> None:
        threading.Thread(target=self._run, daemon=True).start()

    def ask(self, prompt_ids: list[int], max_tokens: int, n: int = 1, model: str = "base") -> Future[list[list[int]]]:
        """The ids of each choice, greedily, or the error."""
        sampling = Sampling(max_tokens=max_tokens, temperature=0, ignore_eos=True)
        request = Completion(model, prompt_ids, sampling, n, None, None, stream=False, include_usage=False)
        ids: list[list[int]] = [[] for _ in range(n)]
        reply: Future[list[list[int]]] = Future()

        def deliver(event: Event) -> None:
            if isinstance(event, Choice):
                ids[event.index] += event.ids
            elif isinstance(event, Finished):
                self.over.append(model)
                reply.set_result(ids)
            else:
                self.over.append(model)
                reply.set_exception(event)

        self.scheduler.submit(Generation(request, deliver))
        return reply

    @contextmanager
    def held(self) -> Iterator[None]:
        """What is asked meanwhile comes to the loop together, in order."""
        released = threading.Event()
        self.scheduler._put(lambda: released.wait() and None)
        yield
        released.set()

    def round(self) -> None:
        """Returns when the loop has taken one more round."""
        for _ in range(2):
            taken = threading.Event()
            self.scheduler._put(taken.set)
            assert taken.wait(30)

    def load(self, name: str, folder: Path) -> Future[None]:
        return self._answer(lambda reply: self.scheduler.load(name, str(folder), reply))

    def unload(self, name: str) -> Future[None]:
        return self._answer(lambda reply: self.scheduler.unload(name, reply))

    def _answer(self, ask: Callable[[Reply], None]) -> Future[None]:
        done: Future[None] = Future()

        def reply(error: TunegateError | None) -> None:
            done.set_result(None) if error is None else done.set_exception(error)

        ask(reply)
        return done

    def _run(self) -> None:
        try:
            self.scheduler.run()
        except BaseException as error:
            self.ended.set_exception(error)
        else:
            self.ended.set_result(None)


def _deliver(events: list[tuple[Generation, Event]]) -> None:
    for generation, event in events:
        generation.deliver(event)


@contextmanager
def loop(path: Path, sequences: int = 4, max_adapters: int = 2) -> Iterator[Loop]:
    """A loop over the model at `path` that has not started; stopped and freed on leaving."""
    model = Model(path, NativeLog())
    context = FailingContext(model, ContextSize(256, sequences, 64))
    adapters = Adapters(model, "base", max_adapters, AdapterForm.ODD_RANK)
    made = Loop(model, context, adapters)
    try:
        yield made
    finally:
        made.scheduler.stop(0)
        made.ended.exception(30)
        context.close()
        adapters.close()
        model.close()
