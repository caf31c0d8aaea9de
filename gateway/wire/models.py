"""`/v1/models`: the bodies. Pure."""

from __future__ import annotations

from typing import Any


def model_body(name: str, created_at: int, owned_by: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created_at, "owned_by": owned_by}


def deleted_body(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "deleted": True}
