"""Two models tuned through the running server, once for the session."""

from __future__ import annotations

import pytest

from tests.conftest import ALIAS
from tests.e2e import training
from tests.server import Server


@pytest.fixture(scope="session")
def tuned(server: Server) -> dict[str, str]:
    """ "alpha" and "beta": models trained to answer with that word first, one from the base's name, one from an alias."""
    client = server.client()
    jobs = {
        prefix: training.create(client, base, training.upload(client, training.examples(prefix)), suffix=prefix)
        for prefix, base in (("alpha", "tunegate-demo"), ("beta", ALIAS))
    }
    models = {}
    for prefix, job in jobs.items():
        ended = training.wait_for_end(client, job.id)
        assert ended.status == "succeeded", (ended.error, training.messages(client, job.id), server.log_tail())
        assert ended.fine_tuned_model is not None
        models[prefix] = ended.fine_tuned_model
    return models
