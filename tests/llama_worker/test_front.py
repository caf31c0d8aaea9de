"""/health and Retry-After when the decode loop stands still: the real parts, but for the loop, which is never started."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import anyio
import httpx
import pytest

from gateway.llama_worker.adapters import Adapters
from gateway.llama_worker.embedding import Embedder
from gateway.llama_worker.fields import Limits
from gateway.llama_worker.generation import Generation
from gateway.llama_worker.http import Front
from gateway.llama_worker.metrics import Metrics
from gateway.llama_worker.native import Context, ContextSize, Model, NativeLog
from gateway.llama_worker.prefix_cache import PrefixCache
from gateway.llama_worker.scheduler import LONGEST_RETRY_AFTER_S, Scheduler
from gateway.llama_worker.steady import AdapterForm
from gateway.llama_worker.vocabulary import NativeVocabulary
from gateway.llama_worker.wire import parse_completion
from tests.llama_worker.running import request

pytestmark = pytest.mark.anyio

LIMITS = Limits(64, 2, 320)


@pytest.fixture
def stuck(tiny_model: Path) -> Iterator[tuple[Scheduler, Front]]:
    """A scheduler whose loop does not run, and the HTTP side in front of it."""
    model = Model(tiny_model, NativeLog())
    context = Context(model, ContextSize(64, 2, 64), threads=1)
    adapters, metrics = Adapters(model, "base", 4, AdapterForm.EIGHT_BITS), Metrics()
    scheduler = Scheduler(model, context, adapters, "base", PrefixCache(0), metrics, lambda events: None, rows=8)
    texts = NativeVocabulary(model), Embedder(model, 64, 1)
    yield scheduler, Front(scheduler, adapters, metrics, LIMITS, "base", "key", {}, 0, *texts, silence_s=0.05)
    context.close()
    model.close()


async def health(front: Front) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(front.app), base_url="http://worker") as client:
        return await client.get("/health")


async def test_health_fails_when_the_loop_does_not_take_its_work(stuck: tuple[Scheduler, Front]) -> None:
    scheduler, front = stuck
    assert (await health(front)).status_code == 200
    await anyio.sleep(0.1)
    assert (await health(front)).status_code == 200  # idle is not stuck
    scheduler.submit(Generation(parse_completion(request(), LIMITS), lambda event: None))
    assert (await health(front)).status_code == 200
    await anyio.sleep(0.1)
    response = await health(front)
    assert response.status_code == 503
    assert "no progress" in response.json()["error"]["message"]
    assert int(response.headers["retry-after"]) >= 1


def test_retry_after_grows_with_what_is_ahead_and_is_bounded(stuck: tuple[Scheduler, Front]) -> None:
    scheduler, _ = stuck
    assert 1 <= scheduler.retry_after_s(1) < scheduler.retry_after_s(10) <= LONGEST_RETRY_AFTER_S
    assert scheduler.retry_after_s(10_000) == LONGEST_RETRY_AFTER_S
