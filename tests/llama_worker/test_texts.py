"""Embeddings, tokenise and detokenise over the real worker; the vectors against llama.cpp's own pooling."""

from __future__ import annotations

import base64
import ctypes
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import httpx
import llama_cpp.llama_cpp as llama
import numpy as np
import numpy.typing as npt
import pytest

from gateway.llama_worker.native import Model, NativeLog
from tests.llama_worker.running import RunningWorker, prompt, running
from tests.llama_worker.words import WORDS
from tests.tiny_gguf import BOS, BYTE_TOKENS, Shape, write_tiny_gguf

TEXTS = [prompt(3), prompt(64, 1), prompt(200, 2), [7]]
POOLINGS = {"mean": gguf.PoolingType.MEAN, "last": gguf.PoolingType.LAST, "cls": gguf.PoolingType.CLS}


@pytest.fixture(scope="module", params=sorted(POOLINGS))
def embedder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningWorker]:
    """A worker whose model pools in one of the ways."""
    folder = tmp_path_factory.mktemp("embedder")
    shape = Shape(vocab_size=3 + BYTE_TOKENS + len(WORDS))
    model = write_tiny_gguf(folder / "model.gguf", shape=shape, words=WORDS, pooling=POOLINGS[request.param])
    with running(folder, model) as started:
        yield started


def embed(worker: RunningWorker, texts: Any, **fields: Any) -> list[npt.NDArray[np.float32]]:
    """The vectors of token ids."""
    response = worker.client.post("/v1/embeddings", json={"model": "base", "input": texts, **fields})
    assert response.status_code == 200, response.text
    data = response.json()["data"]
    assert [(entry["index"], entry["object"]) for entry in data] == [(n, "embedding") for n in range(len(data))]
    return [np.array(entry["embedding"], dtype=np.float32) for entry in data]


def pooled_by_llama_cpp(path: Path, ids: list[int]) -> npt.NDArray[np.float32]:
    """What llama.cpp gives for a text in one batch, scaled to length 1."""
    model = Model(path, NativeLog())
    params = llama.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 512
    params.embeddings = True
    params.flash_attn_type = 0
    context = llama.llama_init_from_model(model.pointer, params)
    tokens = np.array(ids, dtype=np.int32)
    batch = llama.llama_batch_get_one(tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)), len(ids))
    assert llama.llama_decode(context, batch) == 0
    width = llama.llama_model_n_embd(model.pointer)
    found = np.ctypeslib.as_array(llama.llama_get_embeddings_seq(context, 0), shape=(width,)).copy()
    llama.llama_free(context)
    model.close()
    return found / np.linalg.norm(found)


def test_vectors_are_those_of_llama_cpps_pooling(embedder: RunningWorker) -> None:
    vectors = embed(embedder, TEXTS)
    for ids, vector in zip(TEXTS, vectors, strict=True):
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
        # Chunks of 64 against one of 200: q4_0 rounds apart.
        assert vector @ pooled_by_llama_cpp(embedder.model_path, ids) > 0.999
    assert abs(vectors[0] @ vectors[1]) < 0.98, "texts must differ for this to say anything"


def test_one_text_alone_and_among_others_and_beside_streams_is_one_vector(embedder: RunningWorker) -> None:
    alone = embed(embedder, TEXTS[2])[0]
    streams = [{"prompt": prompt(30, salt), "max_tokens": 100, "ignore_eos": True} for salt in range(3)]
    expected = [embedder.ids(**fields) for fields in streams]
    with ThreadPoolExecutor(5) as pool:
        busy = pool.submit(embedder.ids_together, streams)
        found = list(pool.map(lambda n: embed(embedder, TEXTS[n:] + TEXTS), range(4)))
        assert busy.result() == expected
    for number, vectors in enumerate(found):
        assert (vectors[4 - number + 2] == alone).all()


def test_base64_holds_the_same_floats(embedder: RunningWorker) -> None:
    fields = {"model": "base", "input": TEXTS[0], "encoding_format": "base64"}
    body = embedder.client.post("/v1/embeddings", json=fields).json()
    (entry,) = body["data"]
    decoded = np.frombuffer(base64.b64decode(entry["embedding"]), dtype="<f4")
    assert (decoded == embed(embedder, TEXTS[0])[0]).all()
    assert body["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    assert embedder.client.get("/version").json()["embedding_width"] == len(decoded)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("input", None),
        ("input", "text"),
        ("input", []),
        ("input", [[]]),
        ("input", [[1], "a"]),
        ("input", [1, 10**6]),
        ("input", [1.5]),
        ("input", [[1]] * 2049),
        ("input", [[5] * 513]),
        ("encoding_format", "int8"),
        ("model", 5),
    ],
)
def test_a_bad_embedding_request_is_refused_by_name(embedder: RunningWorker, field: str, value: Any) -> None:
    response = embedder.client.post("/v1/embeddings", json={"model": "base", "input": [1], field: value})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field


def test_a_client_that_leaves_gives_its_texts_up(embedder: RunningWorker) -> None:
    body = {"model": "base", "input": [prompt(500, salt) for salt in range(500)]}
    with pytest.raises(httpx.ReadTimeout):
        embedder.client.post("/v1/embeddings", json=body, timeout=httpx.Timeout(5, read=0.2))
    assert len(embed(embedder, [TEXTS[0]] * 3)) == 3


def test_a_model_without_pooling_says_so(worker: RunningWorker) -> None:
    response = worker.client.post("/v1/embeddings", json={"model": "base", "input": [1]})
    assert response.status_code == 400
    assert "no embeddings" in response.json()["error"]["message"]
    assert worker.client.get("/version").json()["embedding_width"] is None
    for model, status in (("red", 400), ("nobody", 404)):
        assert worker.client.post("/v1/embeddings", json={"model": model, "input": [1]}).status_code == status


def test_text_becomes_ids_and_text_again(embedder: RunningWorker) -> None:
    asked = {"prompt": 'é {"name": 12} 😀\n', "return_token_strs": True}
    body = embedder.client.post("/tokenize", json=asked).json()
    assert body["tokens"][0] == BOS
    assert body["count"] == len(body["tokens"]) == len(body["token_strs"])
    assert body["max_model_len"] == 512
    plain = embedder.client.post("/tokenize", json={**asked, "add_special_tokens": False, "return_token_strs": False})
    assert plain.json()["tokens"] == body["tokens"][1:]
    assert plain.json()["token_strs"] is None
    again = embedder.client.post("/detokenize", json={"tokens": body["tokens"][1:]}).json()["prompt"]
    assert again.lstrip(" ") == asked["prompt"]
    assert embedder.client.post("/tokenize", json={"prompt": ""}).json()["tokens"] == [BOS]
    assert embedder.client.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}


def test_a_control_tokens_name_is_text_when_it_is_typed(embedder: RunningWorker) -> None:
    body = embedder.client.post("/tokenize", json={"prompt": "a</s>", "add_special_tokens": False}).json()
    assert 2 not in body["tokens"]
    assert embedder.client.post("/detokenize", json={"tokens": [2]}).json() == {"prompt": "</s>"}


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": [1]}, "prompt"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": 1}, "add_special_tokens"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
    ],
)
def test_a_bad_text_request_is_refused_by_name(
    worker: RunningWorker, path: str, fields: dict[str, Any], param: str
) -> None:
    response = worker.client.post(path, content=json.dumps(fields))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
