"""`/v1/embeddings` through the SDK, from texts and ids down to a real worker whose model pools."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any, cast

import gguf
import httpx
import numpy as np
import pytest
from openai import AsyncOpenAI, BadRequestError, NotFoundError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gateway.access import Caller
from gateway.chat.bundle import Bundle, make_bundle
from gateway.engines.catalog import Base, Catalog
from gateway.engines.client import Deadlines
from gateway.errors import RateLimited, TunegateError
from gateway.inference import Inference
from gateway.limits import Bucket
from gateway.routes import embeddings
from gateway.settings import LimitSettings, Settings
from tests.engines.parts import At, pool_of
from tests.llama_worker.running import KEY, RunningWorker, running
from tests.tiny_gguf import Shape, write_tiny_gguf
from tests.tiny_tokenizers import sentencepiece_like

pytestmark = pytest.mark.anyio

TEXTS = ["The quick brown fox", "weather in Boston, café 😀", "x"]


class RunningEngine(At):
    """A worker as the catalog sees an engine."""

    def __init__(self, worker: RunningWorker) -> None:
        self.version = worker.ready()
        super().__init__(self.version["port"], KEY)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return make_bundle("vicuna_v1.1", sentencepiece_like(), [2])


@pytest.fixture(scope="module")
def workers(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, RunningWorker]]:
    """One worker whose model pools, and one whose model does not."""
    folder = tmp_path_factory.mktemp("embeddings")
    shape = Shape(vocab_size=bundle.tokenizer.vocab_size)
    pooled = write_tiny_gguf(folder / "pooled.gguf", shape=shape, pooling=gguf.PoolingType.MEAN)
    plain = write_tiny_gguf(folder / "plain.gguf", shape=shape)
    with running(folder / "pooled", pooled) as first, running(folder / "plain", plain) as second:
        yield {"pooled": first, "plain": second}


@asynccontextmanager
async def client(
    workers: dict[str, RunningWorker], bundle: Bundle, *, strict: bool = False
) -> AsyncIterator[AsyncOpenAI]:
    """The SDK on the route alone, its engines real.

    Its strict mode refuses the base64 that it asks for by default.
    """
    catalog = Catalog(Deadlines(30, 30))
    for name, worker in workers.items():
        catalog.add_base(
            Base(name, bundle, pool_of(RunningEngine(worker), name="base"), "base", 512, 1, cast(Any, None))
        )
    app = Starlette(routes=embeddings.routes, exception_handlers={TunegateError: tell})  # type: ignore[dict-item]
    app.state.inference, app.state.catalog = Inference(catalog, 8), catalog
    app.state.settings = Settings(limits=LimitSettings(body_bytes=1_000_000))
    transport = httpx.ASGITransport(app)
    async with AsyncOpenAI(
        base_url="http://gateway/v1",
        api_key="unused",
        max_retries=0,
        http_client=httpx.AsyncClient(transport=transport),
        _strict_response_validation=strict,
    ) as sdk:
        yield sdk
    catalog.close()


async def tell(_: Request, error: TunegateError) -> Response:
    return JSONResponse(error.body(), error.status)


async def test_texts_and_their_ids_give_the_same_vectors(workers: dict[str, RunningWorker], bundle: Bundle) -> None:
    tokenizer = bundle.tokenizer
    ids = [[*tokenizer.prefix_ids, *tokenizer.encode(text), *tokenizer.suffix_ids] for text in TEXTS]
    assert ids[0][0] == 1, "a text begins with what the tokenizer puts before it"
    async with client(workers, bundle, strict=True) as sdk:
        by_ids = await sdk.embeddings.create(model="pooled", input=ids, encoding_format="float")
    async with client(workers, bundle) as sdk:
        by_text = await sdk.embeddings.create(model="pooled", input=TEXTS)
        single = await sdk.embeddings.create(model="pooled", input=TEXTS[1])
        single_ids = await sdk.embeddings.create(model="pooled", input=ids[1], dimensions=64)
    assert [entry.index for entry in by_text.data] == [0, 1, 2]
    for a, b in zip(by_text.data, by_ids.data, strict=True):
        assert np.linalg.norm(a.embedding) == pytest.approx(1, abs=1e-5)
        assert len(a.embedding) == 64
        assert a.embedding == pytest.approx(b.embedding, abs=1e-7)
    assert single.data[0].embedding == by_text.data[1].embedding
    assert single_ids.data[0].embedding == pytest.approx(single.data[0].embedding, abs=1e-7)
    assert by_text.usage.prompt_tokens == by_text.usage.total_tokens == sum(map(len, ids))
    assert by_text.model == "pooled"


async def test_many_inputs_keep_their_order(workers: dict[str, RunningWorker], bundle: Bundle) -> None:
    inputs = [[3 + number % 200, 5, 3 + number // 200] for number in range(450)]
    async with client(workers, bundle) as sdk:
        every = await sdk.embeddings.create(model="pooled", input=inputs)
        last = await sdk.embeddings.create(model="pooled", input=inputs[-1])
    assert len(every.data) == 450
    assert every.data[-1].embedding == last.data[0].embedding
    assert len({tuple(entry.embedding) for entry in every.data}) > 400


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": [1, "a"]}, "input"),
        ({"input": [10**8]}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": [5] * 513}, "input"),
        ({"input": "word " * 600}, "input"),
        ({"input": "a", "dimensions": 32}, "dimensions"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "model": "plain"}, "model"),
        ({"input": "a", "extra_body": {"colour": 1}}, "colour"),
    ],
)
async def test_what_breaks_a_rule_is_refused_with_its_param(
    workers: dict[str, RunningWorker], bundle: Bundle, fields: dict[str, Any], param: str
) -> None:
    async with client(workers, bundle) as sdk:
        with pytest.raises(BadRequestError) as refused:
            await sdk.embeddings.create(**{"model": "pooled", **fields})
        assert refused.value.param == param
        with pytest.raises(NotFoundError):
            await sdk.embeddings.create(model="nobody", input="a")
        assert (await sdk.embeddings.create(model="pooled", input="a")).data


async def test_more_tokens_than_a_key_has_are_refused_before_an_engine_is_asked(
    workers: dict[str, RunningWorker], bundle: Bundle
) -> None:
    catalog = Catalog(Deadlines(30, 30))
    engine = pool_of(RunningEngine(workers["pooled"]), name="base")
    catalog.add_base(Base("pooled", bundle, engine, "base", 512, 1, cast(Any, None)))
    inference, caller = Inference(catalog, 8), Caller(allowance=Bucket(None, 5))
    with pytest.raises(RateLimited, match="its prompt has 8 tokens"):
        await inference.embed("pooled", [[3] * 8], caller=caller)
    assert (await inference.embed("pooled", [[3] * 4], caller=caller)).prompt_tokens == 4
    with pytest.raises(RateLimited, match="requested 4"):
        await inference.embed("pooled", [[3] * 4], caller=caller)
    assert inference.in_flight == 0
    catalog.close()
