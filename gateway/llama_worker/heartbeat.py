"""Whether the decode loop makes progress: beaten by the loop, read by /health on the HTTP thread."""

from __future__ import annotations

import time


class Heartbeat:
    """Knows for how long the loop has had work and done none of it."""

    def __init__(self) -> None:
        self._resting = True
        self._since = time.monotonic()

    def beat(self) -> None:
        """The loop has finished a round."""
        self._since, self._resting = time.monotonic(), False

    def rest(self) -> None:
        """The loop waits for work."""
        self._resting = True

    def asked(self) -> None:
        """There is work from now on. For any thread."""
        if self._resting:
            self._since, self._resting = time.monotonic(), False

    def silent_s(self) -> float:
        """How long work has been waiting for the next beat; 0 while there is none. For any thread."""
        return 0.0 if self._resting else time.monotonic() - self._since
