"""Registries: where servers that lend memory say so, and whoever needs memory finds them.

One small interface and three implementations: a file (static.py), a `farmem serve` that keeps a
registry (http.py), and etcd (etcd.py).  What is registered has a time to live and is renewed; it
is a hint and no promise: a server that is listed may be full or gone.  Every call has a deadline.
"""

import time
from typing import Any, NamedTuple

from farmem.errors import FarmemError
from farmem.servers import REACH_SECONDS, parse_server

HINT = (
    "write it as registry+http://HOST:PORT (a `farmem serve --registry`), "
    "registry+etcd://HOST:PORT[,HOST:PORT]/PREFIX, or registry+file:///PATH.toml"
)
TEXT_CHARACTERS_MAX = 200
ENTRIES_MAX = 1024
_POLL_SECONDS = 1.0


class Entry(NamedTuple):
    """A server that lends memory: one start of it, and how it stood a moment ago."""

    id: str
    url: str  # as --pool takes it
    name: str = ""
    epoch: str = ""
    capacity_bytes: int = 0  # 0: it is not known
    free_bytes: int = 0

    def document(self) -> dict[str, Any]:
        """As it is sent and stored."""
        return {key: value for key, value in self._asdict().items() if key != "id"}


def entry_of(number: str, document: Any) -> Entry | None:
    """What somebody has registered; None: it is nothing that can be used."""
    if not isinstance(document, dict):
        return None
    texts = [document.get(key, "") for key in ("url", "name", "epoch")]
    sizes = [document.get(key, 0) for key in ("capacity_bytes", "free_bytes")]
    if not all(_is_text(text) for text in texts) or not all(map(_is_size, sizes)):
        return None
    try:
        if not parse_server(texts[0]).leases:
            return None
    except (FarmemError, KeyError):
        return None
    return Entry(number, *texts, *sizes)


def _is_text(found: Any) -> bool:
    return isinstance(found, str) and len(found) <= TEXT_CHARACTERS_MAX and found.isprintable()


def _is_size(found: Any) -> bool:
    return type(found) is int and 0 <= found < 1 << 63


class Registry:
    """What every registry can do.  What goes wrong is a FarmemError that names it."""

    def __init__(self, url: str) -> None:
        self.url = url

    def register(self, entry: Entry, ttl_seconds: float, deadline: float) -> None:
        """List a server, for as long as it is renewed."""
        raise FarmemError(
            f"registry {self.url!r} can't be registered with", f"write it there, or {HINT}"
        )

    def renew(self, entry: Entry, ttl_seconds: float, deadline: float) -> None:
        """It is still there, and stands like this now."""
        self.register(entry, ttl_seconds, deadline)

    def withdraw(self, entry: Entry, deadline: float) -> None:
        """List it no more."""

    def entries(self, deadline: float) -> list[Entry]:
        """All that are listed."""
        raise NotImplementedError

    def watch(self, known: list[Entry], deadline: float) -> list[Entry]:
        """All that are listed, as soon as these are others than those that are known, or when
        the deadline has come.  How much is free counts as no change."""
        while True:
            found = self.entries(time.monotonic() + REACH_SECONDS)
            left = deadline - time.monotonic()
            if {entry.id for entry in found} != {entry.id for entry in known} or left <= 0:
                return found
            time.sleep(min(_POLL_SECONDS, left))


def parse_registry(url: str) -> Registry:
    """A registry by its URL; nobody is asked yet."""
    scheme, _, rest = url.partition("://")
    if scheme == "registry+file":
        from farmem.registry.static import FileRegistry

        return FileRegistry(url, rest)
    if scheme == "registry+http":
        from farmem.registry.http import HttpRegistry

        return HttpRegistry(url, rest)
    if scheme == "registry+etcd":
        from farmem.registry.etcd import EtcdRegistry

        return EtcdRegistry(url, rest)
    raise FarmemError(f"there is no registry {url!r}", HINT)
