"""A gateway as the SDK's tests suppose it: the models that they name, and rows under the ids that they ask for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf

from tests.server import ROOT, Server
from tests.tiny_gguf import write_tiny_gguf

MODEL = "tunegate-demo"
ALIASES = ("gpt-6-astra", "gpt-3.5-turbo-instruct", "gpt-4o-mini", "gpt-4o-mini-2024-07-18", "model")
# What the SDK's tests send beside all else and no engine here can do. Unread, so that the rest of their requests is tested.
IGNORED = (
    "chat.web_search_options",
    "completions.suffix",
    "responses.conversation",
    "responses.context_management",
    "responses.prompt",
)
SETTINGS = """
default_model = "tunegate-demo"
ignored_fields = [{ignored}]

[jobs]
parallel = 0  # they are created, listed, paused and cancelled, and nothing is trained

[bases.tunegate-demo]
path = "{demo}"

[bases.text-embedding-3-small]
path = "{pooled}"

[aliases]
{aliases}
"""


@contextmanager
def start_gateway(folder: Path) -> Iterator[Server]:
    """Up, until the block ends."""
    pooled = write_tiny_gguf(folder / "pooled.gguf", pooling=gguf.PoolingType.MEAN)
    aliases = "\n".join(f'"{alias}" = "{MODEL}"' for alias in ALIASES)
    demo = ROOT / "deploy" / "demo_model"
    ignored = ", ".join(f'"{name}"' for name in IGNORED)
    settings = SETTINGS.format(ignored=ignored, demo=demo, pooled=pooled, aliases=aliases)
    server = Server(folder / "server", settings)
    try:
        yield server.start()
    finally:
        server.stop()


def upload(server: Server) -> str:
    """A file whose bytes the seeded ones share. As training data it is too short, so a job over it ends soon."""
    with server.client() as client:
        line = b'{"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]}\n'
        return client.files.create(file=("seed.jsonl", line), purpose="fine-tune").id
