"""Ids that clients see: a prefix, and letters and digits that cannot be guessed."""

from __future__ import annotations

import secrets
import string

ID_CHARS = string.ascii_letters + string.digits


def new_id(prefix: str) -> str:
    return prefix + secrets.token_hex(12)
