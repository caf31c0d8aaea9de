"""Embeddings and a structured reply from a ready `.gguf` that the settings name: nothing but the file is needed."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from openai import BadRequestError, OpenAI

from tests.server import Server
from tests.tiny_gguf import write_tiny_gguf


def test_a_gguf_file_that_pools_makes_embeddings_and_replies(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "pooled.gguf", pooling=gguf.PoolingType.MEAN)
    server = Server(tmp_path / "server", f'[bases.pooled]\npath = "{path}"\n')
    try:
        server.start()
        with OpenAI(base_url=server.base_url, api_key="unused", max_retries=0) as client:
            made = client.embeddings.create(model="pooled", input=["one text", "another", "one text"])
            vectors = np.array([entry.embedding for entry in made.data])
            assert vectors.shape == (3, 64)
            assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)
            assert (vectors[0] == vectors[2]).all()
            assert (vectors[0] != vectors[1]).any()
            with pytest.raises(BadRequestError) as refused:
                client.embeddings.create(model="pooled", input="a", dimensions=8)
            assert refused.value.param == "dimensions"
            wish = {"structured_outputs": {"choice": ["yes", "no"]}}
            reply = client.completions.create(model="pooled", prompt="Is it?", max_tokens=9, extra_body=wish)
            assert reply.choices[0].text in ("yes", "no")
    finally:
        server.stop()
