"""Waits for a registry to list other servers, in a thread, for whoever looks now and then.

A registry that can't be asked is asked again later; that it can't be is said by whoever needs it.
"""

import threading
import time

from farmem.errors import FarmemError
from farmem.registry import Entry, Registry, ids_of

_WATCH_SECONDS = 60.0
_AGAIN_SECONDS = 2.0


class Watcher:
    """Of one registry."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._changed = threading.Event()
        self._stopped = threading.Event()

    def start(self) -> None:
        """From now on.  The thread ends with the process, or soon after it was stopped."""
        threading.Thread(target=self._work, daemon=True).start()

    def stop(self) -> None:
        """Nobody looks any more."""
        self._stopped.set()

    def take(self) -> bool:
        """Whether others are listed than when this was asked last."""
        if not self._changed.is_set():
            return False
        self._changed.clear()
        return True

    def _work(self) -> None:
        known: list[Entry] = []
        while not self._stopped.is_set():
            try:
                found = self._registry.watch(known, time.monotonic() + _WATCH_SECONDS)
            except FarmemError:
                self._stopped.wait(_AGAIN_SECONDS)
                continue
            if ids_of(found) != ids_of(known):
                known = found
                self._changed.set()
