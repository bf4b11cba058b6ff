"""A server of a pool: what the job needs to know of it, and what keeps its memory ours.

With TLS what the engines connect to is an agent's socket (tlsagent.py), and the agent connects to
the server.
"""

import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from farmem import _native
from farmem.errors import FarmemError
from farmem.lease import FREE_SECONDS, Control, Lease, acquire, standing, unreachable
from farmem.nbd import Export, ask_export, say_goodbye
from farmem.poolentry import Way, end_entry, fill_entry
from farmem.pools import EXTENT_BYTES, host_memory_bytes
from farmem.servers import (
    Address,
    Server,
    addresses_of,
    connect,
    reachable,
)
from farmem.sizes import format_bytes
from farmem.tls import HOW_TO, NO_TLS, PLAIN, REQUIRE, NoTls, Tls

if TYPE_CHECKING:
    from farmem.tlsagent import TlsAgent

lib = _native.lib

_AGAIN_SECONDS = 0.1


class Chunk(NamedTuple):
    """How much to lease, at most, where the URL does not say, and how long to wait for it."""

    most_bytes: int
    patience_seconds: float = FREE_SECONDS


class PoolServer:
    """A server that was reached, and an export that can be used."""

    def __init__(self, server: Server, chunk: Chunk, deadline: float, tls: Tls) -> None:
        self._server = server
        self._chunk = chunk
        self._tls = tls
        self.limit_bytes = 0  # what may be had of it in all; 0: no more than this
        self._lease: Lease | None = None
        self._agent: TlsAgent | None = None
        self._export = server.export
        self._there: Any = None
        try:
            self._open(deadline)
        except OSError as error:
            self.release()
            raise unreachable(self._server, error) from error
        except FarmemError:
            self.release()
            raise

    @property
    def place(self) -> tuple[bytes, bytes]:
        """What tells it from others, however they are called."""
        return self._address.packed(), self._export

    @property
    def url(self) -> str:
        """As it was asked for."""
        return self._server.url

    def _open(self, deadline: float) -> None:
        server = self._server
        addresses = addresses_of(server, deadline)
        tls = self._tls.toward(server, addresses)
        most_bytes: int | None = None
        if server.leases:
            control = Control(server, addresses, tls)
            chunk = self._chunk
            self._lease = acquire(
                control, server.size_bytes, chunk.most_bytes, deadline, chunk.patience_seconds
            )
            if server.size_bytes is None:
                self.limit_bytes = min(standing(control, deadline)[0], host_memory_bytes())
            addresses = _data_addresses(server, self._lease, control.addresses, deadline)
            tls = self._tls_of_data(control, addresses)
            self._export = _export_of(self._lease)
            most_bytes = self._lease.size_bytes
        export = self._ask(addresses, tls, deadline)
        size_bytes = export.size_bytes if most_bytes is None else most_bytes
        if export.size_bytes < size_bytes:
            raise FarmemError(
                f"pool {server.url!r}: the lease's export is smaller than the lease",
                "see that the server is of this version of farmem",
            )
        self.capacity_bytes = size_bytes // EXTENT_BYTES * EXTENT_BYTES
        if self.capacity_bytes == 0:
            raise FarmemError(
                f"pool {server.url!r} has {format_bytes(size_bytes)}",
                f"{format_bytes(EXTENT_BYTES)} are the least",
            )

    def _tls_of_data(self, control: Control, addresses: list[Address]) -> Tls:
        """The data is spoken to as the control channel was; the server must think so too."""
        assert self._lease is not None
        server, wants_tls = self._server, bool(self._lease.data.get("tls"))
        if isinstance(addresses[0].where, str):
            return PLAIN
        if control.is_tls and not wants_tls:
            raise NoTls(
                f"{server.name} offers no TLS for the data", "see that it is a farmem server"
            )
        if wants_tls and not control.is_tls:
            raise FarmemError(f"{server.name} wants TLS", HOW_TO)
        return self._tls.toward(server, addresses)

    def _ask(self, addresses: list[Address], tls: Tls, deadline: float) -> Export:
        """What the export is; and from now on it is known how engines get there."""
        if tls.is_wanted:
            try:
                return self._ask_agent(reachable(addresses, deadline), tls.folder, deadline)
            except NoTls:
                self._stop_agent()
                if tls.mode == REQUIRE:
                    raise
        while True:
            sock, self._address = connect(addresses, deadline)
            try:
                return ask_export(sock, self._export, f"pool {self._server.url!r}", deadline)
            except ConnectionError:
                # A server that lends starts its data process again when that has died.
                if self._lease is None or deadline - time.monotonic() < _AGAIN_SECONDS:
                    raise
                time.sleep(_AGAIN_SECONDS)
            finally:
                say_goodbye(sock)

    def _ask_agent(self, address: Address, folder: str, deadline: float) -> Export:
        from farmem.tlsagent import TlsAgent

        host = self._server.host
        if self._lease is not None:
            host = self._lease.data.get("host") or host
        self._agent = agent = TlsAgent(folder, host, address)
        agent.start(deadline)
        sock, self._address = connect([agent.address], deadline)
        try:
            export = ask_export(sock, self._export, f"pool {self._server.url!r}", deadline)
            say_goodbye(sock, deadline)
            return export
        except OSError as error:
            failure = agent.failure()
            if failure is None:
                raise
            kind = NoTls if failure.what.endswith(NO_TLS) else FarmemError
            what = f"pool {self._server.url!r}: {failure.what}"
            raise kind(what, failure.hint) from error
        finally:
            sock.close()

    def fill(self, there: Any, timeout_ns: int) -> None:
        """Tell the engine where it is: a struct fm_pool_server."""
        self._there = there
        way = Way(lib.FM_SERVER_NBD, self._address.packed(), self._export)
        fill_entry(there, self._server.name, way, timeout_ns)

    def keep(self, say: Callable[[str], None]) -> None:
        """The supervisor's: see that the memory stays ours, and can be reached."""
        if self._lease is not None:
            self._lease.keep(say, self._is_lost)
        if self._agent is not None:
            self._agent.keep(say)

    def _is_lost(self) -> None:
        end_entry(self._there, lib.FM_SERVER_GONE)

    @property
    def is_useful(self) -> bool:
        """Whether more can be stored there, as far as anybody knows."""
        return not self._there.gone and not self._there.down

    @property
    def grows(self) -> bool:
        """Whether it is one lease of several that the server may give us."""
        return self._lease is not None and self._server.size_bytes is None

    def give_back(self) -> None:
        """Nothing is stored there: the engines let go of it, and say nothing."""
        end_entry(self._there, lib.FM_SERVER_GIVEN_BACK)
        self.release()

    def release(self) -> None:
        """Give the lease back, if there is one, and end the agent."""
        self._stop_agent()
        if self._lease is not None:
            self._lease.release()
            self._lease = None

    def _stop_agent(self) -> None:
        if self._agent is not None:
            self._agent.stop()
            self._agent = None


def _export_of(lease: Lease) -> bytes:
    export = lease.data.get("export")
    if not isinstance(export, str) or not 0 < len(export.encode()) <= lib.FM_POOL_EXPORT_BYTES:
        raise FarmemError("the server's lease has no export", "see that it is a farmem server")
    return export.encode()


def _data_addresses(
    server: Server, lease: Lease, control: list[Address], deadline: float
) -> list[Address]:
    """Where the bytes go: a socket, another host, or another port of the host that was asked."""
    path, host, port = (lease.data.get(key) for key in ("unix", "host", "port"))
    if isinstance(path, str) and path and (server.path or type(port) is not int):
        return [Address(socket.AF_UNIX, path)]
    if type(port) is not int or not 0 < port < 1 << 16:
        raise FarmemError(
            f"{server.name} said no port for the data", "see that it is a farmem server"
        )
    if isinstance(host, str) and host:
        return addresses_of(server._replace(host=host, port=port, path=""), deadline)
    if server.path:
        raise FarmemError(f"{server.name} said no host for the data", "ask it by tcp://")
    return [address.with_port(port) for address in control]
