"""A server that speaks NBD: a lease of a `farmem serve`, or any NBD server's export.

With TLS what the engines connect to is an agent's socket (tlsagent.py), and the agent connects to
the server.
"""

import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from farmem import _native
from farmem.errors import FarmemError
from farmem.lease import Control, Lease
from farmem.nbd import Export, ask_export, say_goodbye
from farmem.poolentry import Way
from farmem.poolserver import PoolServer
from farmem.servers import Address, Server, addresses_of, connect, reachable
from farmem.tls import HOW_TO, NO_TLS, PLAIN, REQUIRE, NoTls, Tls

if TYPE_CHECKING:
    from farmem.tlsagent import TlsAgent

lib = _native.lib

_AGAIN_SECONDS = 0.1


class PoolNbd(PoolServer):
    """An export that can be used."""

    _agent: "TlsAgent | None" = None

    def _open(self, addresses: list[Address], deadline: float) -> int:
        server = self._server
        self._export = server.export
        tls = self._means.tls.toward(server, addresses)
        if not server.leases:
            return self._ask(addresses, tls, deadline).size_bytes
        control = Control(server, addresses, tls)
        lease = self._acquire(control, deadline)
        addresses = _data_addresses(server, lease, control.addresses, deadline)
        tls = self._tls_of_data(control, lease, addresses)
        self._export = _export_of(lease)
        if self._ask(addresses, tls, deadline).size_bytes < lease.size_bytes:
            raise FarmemError(
                f"pool {server.url!r}: the lease's export is smaller than the lease",
                "see that the server is of this version of farmem",
            )
        return lease.size_bytes

    @property
    def way(self) -> Way:
        """By an address and an export's name."""
        return Way(lib.FM_SERVER_NBD, self._address.packed(), self._export)

    def _tls_of_data(self, control: Control, lease: Lease, addresses: list[Address]) -> Tls:
        """The data is spoken to as the control channel was; the server must think so too."""
        server, wants_tls = self._server, bool(lease.data.get("tls"))
        if isinstance(addresses[0].where, str):
            return PLAIN
        if control.is_tls and not wants_tls:
            raise NoTls(
                f"{server.name} offers no TLS for the data", "see that it is a farmem server"
            )
        if wants_tls and not control.is_tls:
            raise FarmemError(f"{server.name} wants TLS", HOW_TO)
        return self._means.tls.toward(server, addresses)

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

    def keep(self, say: Callable[[str], None]) -> None:
        """And that the agent runs."""
        super().keep(say)
        if self._agent is not None:
            self._agent.keep(say)

    def release(self) -> None:
        """And end the agent."""
        self._stop_agent()
        super().release()

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
