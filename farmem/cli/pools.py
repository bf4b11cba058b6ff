"""farmem pools: look at servers that lend memory: how much they have, and whether they answer."""

import json
import sys
import time
from functools import partial
from typing import Any, NamedTuple

import click

from farmem.cli.options import Parsed, parse_registry
from farmem.errors import FarmemError
from farmem.pools import Pool, parse_pool
from farmem.running import printable
from farmem.servers import REACH_SECONDS, Address, Server, addresses_of, at_once, connect
from farmem.sizes import format_bytes
from farmem.tls import OFF, ON, REQUIRE, Tls, parse_tls

_RTT_TRIES = 3
_NS = 1_000_000_000
_TEXT_MAX = 100


class Look(NamedTuple):
    """What is known of a server; error is empty if it has answered."""

    url: str
    error: str = ""
    name: str = ""
    epoch: str = ""
    capacity_bytes: int | None = None
    free_bytes: int | None = None
    leases: int | None = None
    is_draining: bool = False
    rtt_ns: int | None = None


def _rtt_ns(addresses: list[Address], deadline: float) -> int:
    """The shortest time that it took to connect: a round trip."""
    best_ns = 0
    for _ in range(_RTT_TRIES):
        begin_ns = time.perf_counter_ns()
        sock, address = connect(addresses, deadline)
        took_ns = time.perf_counter_ns() - begin_ns
        sock.close()
        addresses, best_ns = [address], min(best_ns or took_ns, took_ns)
    return best_ns


def _look_at(server: Server, tls: Tls) -> Look:
    from farmem.lease import Control, no_answer

    deadline = time.monotonic() + REACH_SECONDS
    try:
        addresses = addresses_of(server, deadline)
        wanted = tls.toward(server, addresses, server.name)
        rtt_ns = _rtt_ns(addresses, deadline)
        if not server.leases:
            return Look(
                server.url, capacity_bytes=_export_bytes(server, deadline, tls), rtt_ns=rtt_ns
            )
        found = Control(server, addresses, wanted).asked("GET", "/v1/server", deadline)
    except OSError as error:
        return Look(server.url, no_answer(server, error))
    except FarmemError as error:
        what = error.what.removeprefix(f"pool {server.url!r}: ")
        return Look(server.url, f"{what}; {error.hint}" if error.hint else what)
    return Look(
        server.url,
        name=_text(found, "name"),
        epoch=_text(found, "epoch"),
        capacity_bytes=_number(found, "capacity_bytes"),
        free_bytes=_number(found, "free_bytes"),
        leases=_number(found, "leases"),
        is_draining=found.get("draining") is True,
        rtt_ns=rtt_ns,
    )


def _export_bytes(server: Server, deadline: float, tls: Tls) -> int:
    """Of any NBD server's export its size is all that there is to know: asked for as by a job."""
    from farmem.poolserver import Chunk, Means, reach_server
    from farmem.rdmaagent import CHOSEN, RdmaAgent

    there = reach_server(server, Chunk(0), deadline, Means(RdmaAgent(CHOSEN), tls))
    there.release()
    return there.capacity_bytes


def _text(found: dict[str, Any], key: str) -> str:
    value = found.get(key)
    return value[:_TEXT_MAX] if isinstance(value, str) else ""


def _number(found: dict[str, Any], key: str) -> int | None:
    value = found.get(key)
    return value if type(value) is int and value >= 0 else None


def _look_at_all(servers: list[Server], tls: Tls) -> list[Look]:
    """One that does not answer holds nobody up."""
    return at_once([partial(_look_at, server, tls) for server in servers])


_HEAD = ("SERVER", "NAME", "CAPACITY", "FREE", "LEASES", "EPOCH", "RTT")


def _row(look: Look) -> tuple[str, ...]:
    sizes = (look.capacity_bytes, look.free_bytes)
    rtt = "-" if look.rtt_ns is None else f"{look.rtt_ns / 1e6:.2f} ms"
    return (
        printable(look.url),
        printable(look.name) or "-",
        *("-" if size is None else format_bytes(size) for size in sizes),
        "-" if look.leases is None else str(look.leases),
        printable(look.epoch) or "-",
        f"{rtt}, draining" if look.is_draining else rtt,
    )


def _as_text(looks: list[Look]) -> list[str]:
    rows = [_HEAD, *(_row(look) for look in looks if not look.error)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    lines = [
        "  ".join(f"{word:{width}}" for word, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines = lines if len(rows) > 1 else []
    return lines + [f"{printable(x.url)}: {printable(x.error)}" for x in looks if x.error]


def _as_json(looks: list[Look]) -> str:
    keys = {"is_draining": "draining"}
    found = [
        {keys.get(key, key): value for key, value in look._asdict().items()}
        | {"error": look.error or None}
        for look in looks
    ]
    return json.dumps({"servers": found}, indent=2)


def _servers(pools: tuple[Pool, ...], registry: Any, tls: Tls) -> list[Server]:
    found: dict[str, Server] = {}
    for pool in pools:
        if not pool.servers:
            raise FarmemError(f"pool {pool.url!r} is no server", "name servers, as tcp://HOST:PORT")
        found |= {server.url: server for server in pool.servers}
    if registry is not None:
        registry.tls = tls
        for entry in registry.entries(time.monotonic() + REACH_SECONDS):
            [server] = parse_pool(entry.url).servers
            found.setdefault(server.url, server)
    elif not pools:
        raise FarmemError(
            "it is not said which servers to look at",
            "name them, as: farmem pools tcp://HOST:PORT, or where they register: "
            "farmem pools --registry registry+http://HOST:PORT",
        )
    return list(found.values())


@click.command(
    "pools",
    help="Show servers that lend memory: how much they have, how much of it is free, how many "
    "leases there are, the epoch, and how long a round trip takes.",
    epilog="Exit status: 0 if every server has answered, 1 if one has not.",
)
@click.option(
    "--registry",
    metavar="URL",
    type=Parsed("registry", parse_registry),
    help="All that are registered there: registry+http://HOST:PORT, "
    "registry+etcd://HOST:PORT[,HOST:PORT]/PREFIX (registry+https:, registry+etcds: with TLS), "
    "registry+file:///PATH.toml.",
)
@click.option(
    "--tls",
    type=click.Choice([OFF, ON, REQUIRE]),
    default=None,
    help="For servers and registries on other hosts, as for farmem run: require, on (where it is "
    "offered), off. Without it: require if there are certificates; else off on this host, and "
    "others are not asked.",
)
@click.option(
    "--tls-certificates",
    metavar="FOLDER",
    type=Parsed("path", str),
    default="",
    help="Where ca-cert.pem, client-cert.pem and client-key.pem are.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.argument("pools", metavar="[URL]...", nargs=-1, type=Parsed("pool", parse_pool))
def command(
    registry: Any, tls: str | None, tls_certificates: str, as_json: bool, pools: tuple[Pool, ...]
) -> None:
    """See the help above."""
    wanted = parse_tls(tls or "", tls_certificates)
    looks = _look_at_all(_servers(pools, registry, wanted), wanted)
    if as_json:
        print(_as_json(looks))
    elif looks:
        print("\n".join(_as_text(looks)))
    else:
        print("farmem: no server is registered", file=sys.stderr)
    if any(look.error for look in looks):
        raise SystemExit(1)
