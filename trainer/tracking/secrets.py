"""Texts without the secrets that this process was handed.

Place in the flow: whatever a tracker's library says → **secrets** → an event, a log. One rule: a library's words leave the
process through `Secrets.hide` or not at all, since no library promises that its errors do not quote a key.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping
from urllib.parse import quote, urlsplit

from gateway.jobdir import TRACKER_SECRETS

PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")
_SHORTEST = 4  # characters: replacing less than that would leave no text
_HIDDEN = "[hidden]"


class Secrets:
    """The values that stand in an environment, and the forms that headers and URLs give them."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        names = [name for names in TRACKER_SECRETS.values() for name in names]
        values = [environ[name] for name in names if name in environ]
        values += filter(None, (urlsplit(environ.get(name, "")).password for name in PROXIES))
        user = environ.get("MLFLOW_TRACKING_USERNAME", "")
        forms = {form for value in values for form in _forms(value, ("api", user))}
        long = sorted((form for form in forms if len(form) >= _SHORTEST), key=len, reverse=True)
        self._any = re.compile("|".join(map(re.escape, long)) or "(?!)")

    def hide(self, text: str) -> str:
        return self._any.sub(_HIDDEN, text)


def _forms(value: str, users: Iterable[str]) -> Iterable[str]:
    value = value.strip()
    yield value
    yield quote(value, safe="")
    yield repr(value)[1:-1]
    for user in users:  # as in a header of basic authentication
        yield base64.b64encode(f"{user}:{value}".encode()).decode()
