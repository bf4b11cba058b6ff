"""Programs of ours that are started again when they die: how soon, and how much of what they say.

Here are only the two measures; agent.py and pool/nbdkit.py start the programs and hear them.
"""

import collections
import time

LINES_PER_SECOND = 5
# The more often it has died of late, the longer it is waited before it is started again.
_AGAIN_SECONDS = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0)
_RECENTLY_SECONDS = 60.0


class Pauses:
    """How long to wait before a program is started again."""

    def __init__(self) -> None:
        self._deaths: collections.deque[float] = collections.deque(maxlen=len(_AGAIN_SECONDS) - 1)

    def next_seconds(self) -> float:
        """It has died, once more."""
        now = time.monotonic()
        recent = sum(now - death < _RECENTLY_SECONDS for death in self._deaths)
        self._deaths.append(now)
        return _AGAIN_SECONDS[recent]


class Talk:
    """How much may be said: a few lines a second."""

    def __init__(self) -> None:
        self._second = 0
        self._lines = 0

    def may(self) -> bool:
        """Whether one line more may."""
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._lines = second, 0
        self._lines += 1
        return self._lines <= LINES_PER_SECOND
