"""The tests of the SDK that are not run here, each with its reason."""

from __future__ import annotations

import re

# A pattern over the test's id → why.
SKIPPED = {
    r"test_embeddings.py.*(test_method_create|response_create)\[(strict|aiohttp)\]": (
        "the SDK asks for base64 by default, gets it, and refuses it in its own strict mode: it would at OpenAI too"
    ),
    r"test_embeddings.py.*test_method_create_with_all_params": (
        "asks for 1 dimension: cutting a vector short is refused, since no model here says that it was trained for it"
    ),
    r"test_uploads.py.*test_method_complete_with_all_params": "sends 'md5' as the MD5 of its file, which is refused",
    r"test_moderations.py": "no model here classifies texts, and the endpoint says so (404) instead of inventing scores",
}


def reason_to_skip(nodeid: str) -> str | None:
    """Why a test is left out; None: it runs."""
    return next((reason for pattern, reason in SKIPPED.items() if re.search(pattern, nodeid)), None)
