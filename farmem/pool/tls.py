"""TLS of the server, for TCP alone: both sides show a certificate, for leases and for data.

The folder of certificates is laid out as nbdkit's: ca-cert.pem, server-cert.pem,
server-key.pem, and ca-crl.pem if there is one.  Whoever has a certificate of that authority
may lease; its common name is the tenant.
"""

import os
import ssl
from typing import Any, NamedTuple

from farmem.errors import FarmemError

OFF, ON, REQUIRE = "off", "on", "require"
HANDSHAKE_SECONDS = 10.0
AUTHORITY, CERTIFICATE, KEY, REVOKED = (
    "ca-cert.pem", "server-cert.pem", "server-key.pem", "ca-crl.pem",
)  # fmt: skip
CLIENT_CERTIFICATE, CLIENT_KEY = "client-cert.pem", "client-key.pem"
# What a TLS connection begins with: a record of the handshake.
FIRST_BYTE = b"\x16"
_HINT = "docs/pools.md says how to make certificates"


class Tls(NamedTuple):
    """What was asked for; an empty mode: nothing, so only this host is listened to."""

    mode: str = ""
    folder: str = ""

    @property
    def is_offered(self) -> bool:
        """Whether there are certificates to show."""
        return self.mode in (ON, REQUIRE)


def check_tls(mode: str, folder: str) -> Tls:
    """The mode and the folder, if they go together."""
    tls = Tls(mode, os.path.abspath(folder) if folder else "")
    if tls.is_offered and not folder:
        raise FarmemError(
            f"--tls={mode} needs certificates",
            f"name their folder, as --tls-certificates /etc/farmem/tls; {_HINT}",
        )
    if folder and not tls.is_offered:
        raise FarmemError("--tls-certificates is given, and TLS is not", "say --tls=require")
    for name in (AUTHORITY, CERTIFICATE, KEY) if folder else ():
        path = os.path.join(tls.folder, name)
        if not os.access(path, os.R_OK):
            raise FarmemError(f"there is no {path} that can be read", _HINT)
    return tls


def _loaded(context: ssl.SSLContext, tls: Tls, certificate: str, key: str) -> ssl.SSLContext:
    def path(name: str) -> str:
        return os.path.join(tls.folder, name)

    try:
        context.load_cert_chain(path(certificate), path(key))
        context.load_verify_locations(path(AUTHORITY))
        if os.path.exists(path(REVOKED)):
            context.load_verify_locations(path(REVOKED))
            context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF
    except (OSError, ValueError) as error:
        raise FarmemError(f"the certificates in {tls.folder} can't be used: {error}", _HINT) from (
            error
        )
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def server_context(tls: Tls) -> ssl.SSLContext:
    """For the control plane."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    return _loaded(context, tls, CERTIFICATE, KEY)


def client_context(tls: Tls) -> ssl.SSLContext:
    """For the self-test, which needs a client's certificate in the same folder."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # it knows whom it talks to: itself
    return _loaded(context, tls, CLIENT_CERTIFICATE, CLIENT_KEY)


def nbdkit_words(tls: Tls) -> list[str]:
    """The same for nbdkit."""
    if not tls.is_offered:
        return ["--tls=off"]
    return [f"--tls={tls.mode}", f"--tls-certificates={tls.folder}", "--tls-verify-peer"]


def name_in(certificate: dict[str, Any]) -> str:
    """Whose certificate it is."""
    for pairs in certificate.get("subject", ()):
        for key, value in pairs:
            if key == "commonName":
                return str(value)
    return f"certificate {certificate.get('serialNumber', '')}"
