"""Somebody who waits for a registry to list others."""

from __future__ import annotations

import threading
import time

from farmem.registry import Entry, Registry

LIMIT_S = 60


class Watched:
    """What whoever knows these entries is told."""

    def __init__(self, registry: Registry, known: list[Entry]) -> None:
        self.found: list[Entry] = []
        self._thread = threading.Thread(target=self._watch, args=(registry, known), daemon=True)
        self._thread.start()

    def _watch(self, registry: Registry, known: list[Entry]) -> None:
        self.found = registry.watch(known, time.monotonic() + 10 * LIMIT_S)

    def urls(self) -> set[str]:
        """Those that are listed now."""
        self._thread.join(LIMIT_S)
        assert not self._thread.is_alive(), "nothing was told"
        return {entry.url for entry in self.found}
