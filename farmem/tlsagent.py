"""farmem-tls: the agent through which a job's engines reach one server with TLS.

It listens on an abstract Unix socket with a name that nobody can guess before it exists, and
serves this user alone.  The socket is the job's: engines that connect while the agent is being
started again wait in it.
"""

import secrets
import socket
from collections.abc import Callable

from farmem.agent import Agent, program_path
from farmem.errors import FarmemError
from farmem.servers import Address

PROGRAM = "farmem-tls"
PACKAGE = "libssl-dev"
_BACKLOG = 1024  # a job's processes may all connect at once, when the agent was away


class TlsAgent:
    """What listens at `address`, and speaks to the server of that host name."""

    def __init__(self, folder: str, host: str, server: Address) -> None:
        self.address = Address(socket.AF_UNIX, f"\0{PROGRAM}-{secrets.token_hex(16)}")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(self.address.where)
        self._listener.listen(_BACKLOG)
        self._listener.setblocking(False)
        arguments = [folder, host.partition("%")[0], *server.numeric()]
        self._agent = Agent(program_path(PROGRAM, PACKAGE), arguments, [self._listener.fileno()])

    def start(self, deadline: float) -> None:
        """It reads the certificates, and listens."""
        self._agent.start(deadline)

    def failure(self) -> FarmemError | None:
        """Why a connection through it has ended, if it knows."""
        return self._agent.failure()

    def keep(self, say: Callable[[str], None]) -> None:
        """The supervisor's: see that it runs."""
        self._agent.keep(say)

    def stop(self) -> None:
        """The job has ended, or never began."""
        self._agent.stop()
        self._listener.close()
