"""Registries: where servers that lend memory say so, and whoever needs memory finds them.

One small interface and three implementations: a file (static.py), a `farmem serve` that keeps a
registry (http.py), and etcd (etcd.py).  What is registered has a time to live and is renewed; it
is a hint and no promise: a server that is listed may be full or gone.  Every call has a deadline.

TLS is for registries what it is for servers (tls.py): `registry+https://` and `registry+etcds://`
speak it always, the others as was said.  Parameters of its own can say it for one registry alone.
"""

import contextlib
import os
import time
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qsl

from farmem.errors import FarmemError
from farmem.servers import REACH_SECONDS, Server, addresses_of, parse_server
from farmem.tls import PLAIN, REQUIRE, Tls

if TYPE_CHECKING:
    from farmem.lease import Control

HINT = (
    "write it as registry+http://HOST:PORT (a `farmem serve --registry`), "
    "registry+etcd://HOST:PORT[,HOST:PORT]/PREFIX, or registry+file:///PATH.toml; with TLS "
    "registry+https: or registry+etcds:"
)
_PARAMETERS_HINT = "it takes certificates=FOLDER, or tls=off if its name does not say TLS"
TEXT_CHARACTERS_MAX = 200
ENTRIES_MAX = 1024
# How often a registry is asked that can't tell by itself; and nobody is asked more often.
POLL_SECONDS = 1.0


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


def ids_of(entries: list[Entry]) -> set[str]:
    """What tells one set of servers from another."""
    return {entry.id for entry in entries}


class Registry:
    """What every registry can do.  What goes wrong is a FarmemError that names it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.tls = Tls()  # what was said for all; whoever uses it says it here
        self._own_tls: Tls | None = None
        self._servers: list[Server] = []

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"registry {self.url!r}"

    def check(self, deadline: float) -> None:
        """Refuse at once what would be refused before anything is sent."""
        for server in self._servers:
            with contextlib.suppress(OSError):  # a name that is not known yet
                self._control(server, deadline)

    def _control(self, server: Server, deadline: float) -> "Control":
        from farmem.lease import Control

        addresses = addresses_of(server, deadline)
        tls = self.tls if self._own_tls is None else self._own_tls
        return Control(server, addresses, tls.toward(server, addresses, self.name))

    def _without_parameters(self, rest: str, is_tls: bool) -> str:
        """What stands before the parameters; these say how it is spoken to."""
        place, _, query = rest.partition("?")
        for key, value in parse_qsl(query, keep_blank_values=True):
            if key == "certificates" and value and self._own_tls is None:
                self._own_tls = Tls(REQUIRE, os.path.abspath(value))
            elif (key, value) == ("tls", "off") and not is_tls and self._own_tls is None:
                self._own_tls = PLAIN
            else:
                what = f"{self.name} can't have the parameter '{key}={value}'"
                raise FarmemError(what, _PARAMETERS_HINT)
        return place

    def register(self, entry: Entry, ttl_seconds: float, deadline: float) -> None:
        """List a server, for as long as it is renewed."""
        raise FarmemError(f"{self.name} can't be registered with", f"write it there, or {HINT}")

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
            if ids_of(found) != ids_of(known) or left <= 0:
                return found
            time.sleep(min(POLL_SECONDS, left))


def parse_registry(url: str) -> Registry:
    """A registry by its URL; nobody is asked yet."""
    scheme, _, rest = url.partition("://")
    if scheme == "registry+file":
        from farmem.registry.static import FileRegistry

        return FileRegistry(url, rest)
    if scheme in ("registry+http", "registry+https"):
        from farmem.registry.http import HttpRegistry

        return HttpRegistry(url, rest, is_tls=scheme == "registry+https")
    if scheme in ("registry+etcd", "registry+etcds"):
        from farmem.registry.etcd import EtcdRegistry

        return EtcdRegistry(url, rest, is_tls=scheme == "registry+etcds")
    raise FarmemError(f"there is no registry {url!r}", HINT)
