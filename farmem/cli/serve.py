"""farmem serve: lend this host's memory to jobs on other hosts, or on this one."""

import socket
from typing import Any

import click

from farmem.cli.options import Parsed, parse_registry
from farmem.errors import FarmemError
from farmem.sizes import parse_duration, parse_size

DEFAULT_LISTEN = "127.0.0.1:7717"
TTL_NS_MIN = 1_000_000_000
SELF_TEST_BYTES = 64 << 20
_PORT_MAX = 65535
_GID_INDEX_MAX = 65535
_NAME_CHARACTERS_MAX = 64


def _parse_listen(text: str) -> Any:
    from farmem.pool.sockets import parse_listen

    return parse_listen(text)


def _parse_ttl(text: str) -> int:
    ttl_ns = parse_duration(text, "--ttl")
    if ttl_ns < TTL_NS_MIN:
        raise FarmemError(f"--ttl {text!r} is too short", "give a second or more, as --ttl 60s")
    return ttl_ns


def _parse_capacity(text: str) -> int:
    return parse_size(text, "--capacity")


def _parse_drain(text: str) -> int:
    return parse_duration(text, "--drain-timeout")


def _parse_quota(text: str) -> tuple[str, int]:
    tenant, equals, size = text.rpartition("=")
    size_bytes = parse_size(size, "--quota")
    if size_bytes == 0 or (equals and not tenant):
        raise FarmemError(
            f"--quota {text!r} gives nobody anything",
            "write it as --quota 8G (for each tenant) or --quota alice=16G",
        )
    return tenant, size_bytes


def _parse_name(text: str) -> str:
    if not text.isprintable() or len(text) > _NAME_CHARACTERS_MAX:
        raise FarmemError(
            f"--name {text!r} is not printable text of at most {_NAME_CHARACTERS_MAX} characters",
            "choose a short name, as --name rack7",
        )
    return text


def _parse_advertise(text: str) -> str:
    from farmem.servers import parse_server

    if text and not (text.startswith(("tcp://", "unix://")) and parse_server(text).leases):
        raise FarmemError(
            f"--advertise {text!r} is no URL of a farmem serve", "write it as tcp://HOST:PORT"
        )
    return text


def _parse_port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= _PORT_MAX):
        raise FarmemError(f"--data-port {text!r} is no port", "give a number, as --data-port 7718")
    return int(text)


def _parse_gid_index(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= _GID_INDEX_MAX):
        raise FarmemError(
            f"--rdma-gid-index {text!r} is no index",
            "give a number, as --rdma-gid-index 3; "
            "/sys/class/infiniband/DEVICE/ports/1/gids lists them",
        )
    return int(text)


@click.command(
    "serve",
    help="Lend SIZE of this host's memory: `farmem run --pool tcp://HOST:PORT`, or "
    "`--pool unix:///PATH`, uses it.",
    epilog="SIGTERM and Ctrl-C drain: no new leases are granted, and it ends when the last one "
    "has ended, or after --drain-timeout. A second signal ends it at once.",
)
@click.option(
    "--capacity",
    "capacity_bytes",
    metavar="SIZE",
    type=Parsed("size", _parse_capacity),
    help="How much to lend at once, at most: 8G, 512M. It must be given, but for --self-test.",
)
@click.option(
    "--listen",
    "listens",
    metavar="ADDRESS",
    type=Parsed("listen", _parse_listen),
    multiple=True,
    help="Where clients ask for leases: HOST:PORT, [IPV6]:PORT or unix:PATH; port 0: one that is "
    f"free. May be repeated. [default: {DEFAULT_LISTEN}, or what systemd hands over]",
)
@click.option(
    "--data-port",
    metavar="PORT",
    type=Parsed("port", _parse_port),
    default="0",
    help="The TCP port of the data; 0: one that the kernel chooses, told with each lease. The data "
    "of unix:PATH goes through PATH.nbd. [default: 0]",
)
@click.option(
    "--tls",
    type=click.Choice(["off", "on", "require"]),
    default=None,
    help="For TCP. require: clients must use TLS and show a certificate; on: they may; off: none "
    "can. Without it only addresses that this host alone can reach are listened on, in plain text.",
)
@click.option(
    "--tls-certificates",
    metavar="FOLDER",
    type=Parsed("path", str),
    default="",
    help="Where ca-cert.pem, server-cert.pem and server-key.pem are. Whoever has a certificate of "
    "that authority may lease, as the tenant that its common name says. To register with TLS "
    "client-cert.pem and client-key.pem are needed there too.",
)
@click.option(
    "--rdma",
    type=click.Choice(["off", "on", "require"]),
    default=None,
    help="on: clients may use RDMA, if there is a device that can be used; require: don't start "
    "without; off: nobody can. Needs pyverbs. [default: on; require, if a device is named]",
)
@click.option(
    "--rdma-device",
    metavar="NAME",
    type=Parsed("device", str),
    default="",
    help="The RDMA device, as mlx5_0. [default: the first with a port that is up]",
)
@click.option(
    "--rdma-gid-index",
    metavar="N",
    type=Parsed("gid-index", _parse_gid_index),
    default=None,
    help="Which of the port's addresses (GIDs) to use. [default: RoCE v2 over IPv4, else over "
    "IPv6; on InfiniBand the first]",
)
@click.option(
    "--quota",
    "quotas",
    metavar="[TENANT=]SIZE",
    type=Parsed("quota", _parse_quota),
    multiple=True,
    help="The most that each tenant, or this one, may have at once. May be repeated.",
)
@click.option(
    "--ttl",
    "ttl_ns",
    metavar="TIME",
    type=Parsed("time", _parse_ttl),
    default="60s",
    show_default=True,
    help="A lease that is not renewed for so long ends, and its memory is free again.",
)
@click.option(
    "--drain-timeout",
    "drain_ns",
    metavar="TIME",
    type=Parsed("time", _parse_drain),
    default="60s",
    show_default=True,
    help="How long to wait for leases to end when asked to stop; 0s: not at all.",
)
@click.option(
    "--huge-pages",
    is_flag=True,
    help="Lend huge pages of 2 MiB, which must have been set aside (vm.nr_hugepages). The kernel "
    "then holds back for a lease all that it was promised.",
)
@click.option(
    "--name",
    metavar="TEXT",
    type=Parsed("name", _parse_name),
    default="",
    help="What the server calls itself. [default: this host's name]",
)
@click.option(
    "--registry",
    is_flag=True,
    help="Keep a registry: other servers register here, and `farmem run --pool "
    "registry+http://HOST:PORT` (with TLS registry+https:) uses all that are registered, this one "
    "included.",
)
@click.option(
    "--register",
    "registries",
    metavar="URL",
    type=Parsed("registry", parse_registry),
    multiple=True,
    help="Register in a registry, as long as this server grants leases: registry+http://HOST:PORT, "
    "or registry+etcd://HOST:PORT[,HOST:PORT]/PREFIX; registry+https: and registry+etcds: with TLS "
    "always, the others as --tls says. May be repeated.",
)
@click.option(
    "--advertise",
    metavar="URL",
    type=Parsed("address", _parse_advertise),
    default="",
    help="The URL to register: tcp://HOST:PORT, where others reach this server. [default: the "
    "first address that it listens on, by this host's name if that is any address]",
)
@click.option(
    "--self-test",
    is_flag=True,
    help="Start as told, write, read and check through every data path, say what came of it, and "
    "end: status 0 if all is well.",
)
@click.option("-q", "--quiet", is_flag=True, help="Say nothing but warnings and errors.")
def command(**options: Any) -> None:
    """See the help above."""
    import asyncio

    from farmem.pool.queuepairs import check_wanted
    from farmem.pool.server import Settings, serve
    from farmem.pool.sockets import is_activated
    from farmem.pool.tls import check_tls

    is_test = options["self_test"]
    if options["capacity_bytes"] is None and not is_test:
        raise FarmemError(
            "it is not said how much to lend",
            "give --capacity, set FARMEM_SERVE_CAPACITY, or write "
            'capacity = "8G" under [serve] in farmem.toml',
        )
    tls = check_tls(options["tls"] or "", options["tls_certificates"])
    settings = Settings(
        capacity_bytes=options["capacity_bytes"] or SELF_TEST_BYTES,
        listens=options["listens"],
        name=options["name"] or socket.gethostname(),
        ttl_ns=options["ttl_ns"],
        drain_ns=options["drain_ns"],
        quotas=_quotas(options["quotas"]),
        data_port=options["data_port"],
        has_huge_pages=options["huge_pages"],
        tls=tls,
        rdma=check_wanted(options["rdma"] or "", options["rdma_device"], options["rdma_gid_index"]),
        is_quiet=options["quiet"] or is_test,
        keeps_registry=options["registry"],
        registries=() if is_test else _registries(options["registries"], tls.mode, tls.folder),
        advertise=options["advertise"],
    )
    if is_test:
        from farmem.pool.selftest import run_self_test

        asyncio.run(run_self_test(settings))
        return
    if not settings.listens and not is_activated():
        settings = settings._replace(listens=(_parse_listen(DEFAULT_LISTEN),))
    asyncio.run(serve(settings))


def _registries(given: tuple[Any, ...], mode: str, folder: str) -> tuple[Any, ...]:
    """They are spoken to as it was said for who comes to us."""
    import time

    from farmem.servers import REACH_SECONDS
    from farmem.tls import Tls

    deadline = time.monotonic() + REACH_SECONDS
    for registry in given:
        registry.tls = Tls(mode, folder)
        registry.check(deadline)
    return given


def _quotas(given: tuple[tuple[str, int], ...]) -> Any:
    """The last one counts, for each tenant."""
    from farmem.pool.leases import Quotas

    by_tenant = dict(given)
    return Quotas(by_tenant.pop("", 0), by_tenant)
