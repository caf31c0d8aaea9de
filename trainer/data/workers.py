"""Chunks of a file rendered on several processes, in the order of the file.

Place in the flow: beside `dataset`, for large files. One rule: a worker ends when its pipe does, so that none is left behind
by a check that was killed. Spawned, never forked.
"""

from __future__ import annotations

import contextlib
import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection

from gateway.chat.bundle import Bundle
from gateway.jobdir import Method, TrainOn, Turns
from trainer.data.examples import Examples
from trainer.data.forms import FORMS, Form
from trainer.data.lines import BadLine, Raw
from trainer.data.rendering import Renderer, Rendering
from trainer.data.survey import Survey, render_chunk

Chunk = list[Raw | BadLine]


def render_in_parallel(
    rendering: Rendering, form: Form | None, chunks: Iterable[Chunk], processes: int
) -> Iterator[tuple[Survey, Examples]]:
    """What `render_chunk` gives of each chunk. Raises ChildProcessError when a worker dies."""
    context = multiprocessing.get_context("spawn")
    number = None if form is None else FORMS.index(form)
    how = (rendering.max_length, rendering.turns, rendering.train_on, rendering.method)
    pipes: list[Connection] = []
    workers = []
    try:
        for _ in range(processes):
            ours, theirs = context.Pipe()
            pipes.append(ours)
            worker = context.Process(target=_work, args=(theirs, rendering.bundle.to_files(), how, number), daemon=True)
            worker.start()
            theirs.close()
            workers.append(worker)
        yield from _in_order(pipes, chunks)
    finally:
        for pipe in pipes:
            pipe.close()
        for worker in workers:
            worker.join()


def _in_order(pipes: list[Connection], chunks: Iterable[Chunk]) -> Iterator[tuple[Survey, Examples]]:
    """One chunk at a worker at a time: so it reads when it is sent to, and neither side waits for the other."""
    waiting: deque[Connection] = deque()
    try:
        for chunk in chunks:
            found = None
            if len(waiting) < len(pipes):
                pipe = pipes[len(waiting)]
            else:
                pipe = waiting.popleft()
                found = pipe.recv()
            pipe.send(chunk)
            waiting.append(pipe)
            if found is not None:
                yield found
        while waiting:
            yield waiting.popleft().recv()
    except (EOFError, ConnectionError) as error:
        raise ChildProcessError("a process that renders the file ended; was there too little memory?") from error


def _work(
    pipe: Connection, files: dict[str, bytes], how: tuple[int, Turns, TrainOn, Method | None], number: int | None
) -> None:
    """In the worker: chunks in, what they hold out, until nobody is there any more."""
    max_length, turns, train_on, method = how
    rendering = Rendering(Bundle.from_files(files), max_length, turns, train_on, method)
    renderer = Renderer(rendering, None if number is None else FORMS[number])
    with contextlib.suppress(EOFError, OSError):
        while True:
            pipe.send(render_chunk(renderer, pipe.recv()))
