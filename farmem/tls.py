"""TLS of `farmem run`: whether a pool's server is to speak it, and who we are and whom we believe.

The names are nbdkit's, as for `farmem serve`: off, on (where the server offers it), require.  If
nothing is said, servers on this host are spoken to in plain text, and others not at all, unless
certificates are given: then TLS is required.  The control channel is Python's ssl; the data goes
through an agent (tlsagent.py).  ssl itself is imported only where TLS is used.
"""

import os
import socket
from typing import TYPE_CHECKING, NamedTuple

from farmem.errors import FarmemError

if TYPE_CHECKING:
    import ssl

    from farmem.servers import Address, Server

OFF, ON, REQUIRE = "off", "on", "require"
AUTHORITY, CERTIFICATE, KEY, REVOKED = (
    "ca-cert.pem", "client-cert.pem", "client-key.pem", "ca-crl.pem",
)  # fmt: skip
HOW_TO = "say --tls=require --tls-certificates FOLDER (docs/pools.md says how to make certificates)"
NO_TLS = "offers no TLS"  # how the agent's sentence ends
CERTIFICATES_HINT = "docs/pools.md says how to make certificates"
_TRUST_HINT = "or say --tls=off, if you trust everybody on the way"
# X509_V_ERR_...: what OpenSSL finds wrong with a certificate.
_EXPIRED = 10
_OTHER_NAME = (62, 64)
_OTHER_AUTHORITY = (7, 18, 19, 20, 21)
_NO_TLS = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG")


class NoTls(FarmemError):
    """The server does not offer TLS."""


class Tls(NamedTuple):
    """What was said; an empty mode: nothing."""

    mode: str = ""
    folder: str = ""

    @property
    def is_wanted(self) -> bool:
        """Whether it is to be tried."""
        return self.mode in (ON, REQUIRE)

    def toward(self, server: "Server", addresses: "list[Address]", whose: str = "") -> "Tls":
        """What holds for a server: its mode is never empty.  `whose`: what messages call it."""
        from farmem.servers import is_loopback

        whose = whose or f"pool {server.url!r}"
        if server.path:
            return PLAIN
        mode = self.mode or (REQUIRE if self.folder else "")
        if server.is_tls:
            mode = REQUIRE
        if not mode and not all(map(is_loopback, addresses)):
            raise FarmemError(
                f"{whose} is on another host, and it is not said whether TLS is spoken there",
                f"{HOW_TO}; {_TRUST_HINT}",
            )
        if mode in (ON, REQUIRE):
            return Tls(mode, self._checked_folder(whose))
        return PLAIN

    def _checked_folder(self, whose: str) -> str:
        if not self.folder:
            raise FarmemError(
                f"{whose} is to be spoken to with TLS, and that needs certificates",
                f"name their folder: --tls-certificates FOLDER; {CERTIFICATES_HINT}",
            )
        for name in (AUTHORITY, CERTIFICATE, KEY):
            path = os.path.join(self.folder, name)
            if not os.access(path, os.R_OK):
                raise FarmemError(f"there is no {path} that can be read", CERTIFICATES_HINT)
        return self.folder


PLAIN = Tls(OFF)


def parse_tls(mode: str, folder: str) -> Tls:
    """The same from words that nobody has checked yet.  The folder holds from anywhere: a
    supervisor, which leases more, has another current folder."""
    if mode not in ("", OFF, ON, REQUIRE):
        raise FarmemError(f"there is no TLS mode {mode!r}", "modes are: off, on, require")
    return Tls(mode, os.path.abspath(folder) if folder else "")


def client_context(folder: str) -> "ssl.SSLContext":
    """Our certificate, and trust in its authority alone."""
    import ssl

    def path(name: str) -> str:
        return os.path.join(folder, name)

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.hostname_checks_common_name = False
    try:
        # A key with a pass phrase can't be used: nobody is asked.
        context.load_cert_chain(path(CERTIFICATE), path(KEY), password=lambda: "")
        context.load_verify_locations(path(AUTHORITY))
        if os.path.exists(path(REVOKED)):
            context.load_verify_locations(path(REVOKED))
            context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF
    except (OSError, ValueError) as error:
        what = f"the certificates in {folder} can't be used: {_reason(error)}"
        raise FarmemError(what, CERTIFICATES_HINT) from error
    return context


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
    return str(reason).replace("_", " ").lower() if str(reason).isupper() else str(reason)


class Secure:
    """How a server is spoken to with TLS."""

    def __init__(self, server: "Server", folder: str) -> None:
        self._server = server
        self._folder = folder
        self._context = client_context(folder)

    def begin(self, sock: socket.socket, deadline: float) -> socket.socket:
        """The same connection with TLS; it is closed where that fails.  OSError: it broke off."""
        import ssl

        from farmem.servers import seconds_left

        try:
            sock.settimeout(seconds_left(deadline))
            host = self._server.host.partition("%")[0]
            return self._context.wrap_socket(sock, server_hostname=host)
        except ssl.SSLError as error:
            sock.close()
            raise self.error_of(error) from error
        except OSError:
            sock.close()
            raise

    def error_of(self, error: "ssl.SSLError") -> FarmemError:
        """What is wrong, in words: with the server's certificate, ours, or that there is no TLS."""
        import ssl

        name, reason = self._server.name, error.reason or ""
        if isinstance(error, ssl.SSLCertVerificationError):
            return FarmemError(self._verdict(error), CERTIFICATES_HINT)
        if reason in _NO_TLS or isinstance(error, ssl.SSLEOFError):
            hint = "start it with --tls=require"
            hint += "" if self._server.is_tls else f"; {_TRUST_HINT}"
            return NoTls(f"{name} does not speak TLS", hint)
        if "ALERT" in reason:
            what = f"{name} does not take the certificate in {self._folder}: {_reason(error)}"
            return FarmemError(what, CERTIFICATES_HINT)
        what = f"the TLS handshake with {name} has failed: {_reason(error)}"
        return FarmemError(what, CERTIFICATES_HINT)

    def unanswered(self) -> FarmemError:
        """It has ended the connection where an answer should be.  With TLS 1.3 a server judges our
        certificate when we believe that all is well, and not every one says what it found."""
        return FarmemError(
            f"{self._server.name} has ended the connection behind the TLS handshake: "
            f"does it take the certificate in {self._folder}?",
            CERTIFICATES_HINT,
        )

    def _verdict(self, error: "ssl.SSLCertVerificationError") -> str:
        whose = f"the certificate of {self._server.name}"
        if error.verify_code == _EXPIRED:
            return f"{whose} has expired"
        if error.verify_code in _OTHER_NAME:
            return f"{whose} is not for the name '{self._server.host}'"
        if error.verify_code in _OTHER_AUTHORITY:
            return f"{whose} is not of the authority in {os.path.join(self._folder, AUTHORITY)}"
        return f"{whose} is refused: {error.verify_message}"
