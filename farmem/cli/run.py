"""farmem run: check everything, then become the command, paged beyond its budget."""

import os
from typing import NoReturn

import click

from farmem import _native, checks
from farmem.cli.options import CommandLine, Parsed, complete_words
from farmem.errors import FarmemError
from farmem.filters import Filter, limited, parse_filter
from farmem.job import (
    DEFECTS_VARIABLE,
    EVICT_VARIABLE,
    FILE_IO_VARIABLE,
    JOB_VARIABLE,
    Job,
    Request,
    inherited_environment,
    launch,
)
from farmem.pools import Pool, join_pools, parse_pool
from farmem.sizes import parse_duration, parse_size
from farmem.tls import OFF, ON, REQUIRE, parse_tls

POOL_TIMEOUT_LEAST_NS = 100_000_000
POOL_TIMEOUT_MOST_NS = 86_400_000_000_000


def _defects_from(environment: dict[bytes, bytes]) -> int:
    """The named defects that a test wants (enum fm_defect), for tests alone."""
    prefix = "FM_DEFECT_"
    known: dict[str, int] = _native.ffi.typeof("enum fm_defect").relements
    defects = 0
    for name in os.fsdecode(environment.get(DEFECTS_VARIABLE, b"")).split(","):
        value = known.get(prefix + name.upper(), 0)
        if name and not value:
            names = ", ".join(sorted(key.removeprefix(prefix).lower() for key in known))
            raise FarmemError(f"there is no defect {name!r}", f"defects are: {names}")
        defects |= value
    return defects


def _evict_mode_from(environment: dict[bytes, bytes]) -> int:
    modes: dict[bytes, int] = {
        b"": _native.lib.FM_EVICT_AUTO,
        b"auto": _native.lib.FM_EVICT_AUTO,
        b"copy": _native.lib.FM_EVICT_COPY,
    }
    name = environment.get(EVICT_VARIABLE, b"")
    if name not in modes:
        raise FarmemError(f"there is no way {os.fsdecode(name)!r} to evict", "ways are: auto, copy")
    return modes[name]


def _parse_budget(text: str) -> int:
    budget_bytes = parse_size(text, "local memory")
    checks.check_budget(budget_bytes)
    return budget_bytes


def _parse_pool_timeout(text: str) -> int:
    timeout_ns = parse_duration(text, "pool timeout")
    if not POOL_TIMEOUT_LEAST_NS <= timeout_ns <= POOL_TIMEOUT_MOST_NS:
        raise FarmemError(f"pool timeout {text!r} is not between 100ms and 86400s", "write 30s")
    return timeout_ns


def _parse_stats(path: str) -> str:
    return checks.check_stats_path(path) if path else ""


def _file_io_from(environment: dict[bytes, bytes]) -> tuple[int, bool]:
    """How a test wants transfers with a file made, and whether past the page cache."""
    ways: dict[str, int] = {
        "auto": _native.lib.FM_FILE_IO_AUTO,
        "uring": _native.lib.FM_FILE_IO_URING,
        "threads": _native.lib.FM_FILE_IO_THREADS,
    }
    name, _, cache = os.fsdecode(environment.get(FILE_IO_VARIABLE, b"auto")).partition(",")
    if name not in ways or cache not in ("", "buffered"):
        raise FarmemError(
            f"there is no way {name!r} {cache!r} to use a file",
            "ways are: auto, uring, threads, each with or without ,buffered",
        )
    return ways[name], not cache


@click.command(
    "run",
    cls=CommandLine,
    context_settings={"allow_interspersed_args": False},
    help="Run CMD with SIZE of local memory; what does not fit is paged to the pool.",
    epilog="Exit status: that of CMD; 125 when farmem itself fails, 126 when CMD can't be "
    "executed, 127 when it is not found.",
)
@click.option(
    "-m",
    "--local",
    "budget_bytes",
    metavar="SIZE",
    type=Parsed("size", _parse_budget),
    required=True,
    help="Local memory: 512M, 4G, 1.5GiB.",
)
@click.option(
    "--pool",
    "pools",
    metavar="URL",
    type=Parsed("pool", parse_pool),
    multiple=True,
    default=("mem:",),
    show_default=True,
    help="Where pages go. file:FOLDER: an unnamed file in a folder on a disk, gone with the job; "
    "file:PATH: a new or empty file; file:SIZE:PATH: at most SIZE of it (else nine tenths of what "
    "is free there, up to 1T). tcp://HOST:PORT, unix:///PATH: memory of another host that runs "
    "`farmem serve`, by its address or its socket (?size=8G behind it: so much, at once; else "
    "more and more of what it has, as it is needed). rdma://HOST:PORT: the same, read and "
    "written by one-sided RDMA. nbd://HOST[:PORT]/EXPORT, "
    "nbds://... (with TLS), nbd+unix:///EXPORT?socket=PATH: the export of any NBD server; all of "
    "it is overwritten. Of servers there can be several, each with a --pool of its own: what is "
    "evicted is spread over them. registry+http://HOST:PORT, "
    "registry+etcd://HOST:PORT[,HOST:PORT]/PREFIX (registry+https:, registry+etcds: with TLS), "
    "registry+file:///PATH.toml: as many servers as are needed of those that are registered. "
    "mem: or mem:SIZE: memory of this host, for trying and testing.",
)
@click.option(
    "--pool-timeout",
    "pool_timeout_ns",
    metavar="TIME",
    type=Parsed("time", _parse_pool_timeout),
    default="30s",
    show_default=True,
    help="How long a pool's server may take to answer. Until then whoever needs a page waits; "
    "then a page that should have come is lost, and one that should have gone stays.",
)
@click.option(
    "--tls",
    type=click.Choice([OFF, ON, REQUIRE]),
    default=None,
    help="For pools and registries on other hosts. require: leases and pages go there with TLS "
    "alone, and both sides show a certificate; on: where the server offers it; off: everybody on "
    "the way can read and change them. Without it: require if there are certificates; else off on "
    "this host, and servers on others are refused.",
)
@click.option(
    "--tls-certificates",
    metavar="FOLDER",
    type=Parsed("path", str),
    default="",
    help="Where ca-cert.pem, client-cert.pem and client-key.pem are. The server's certificate must "
    "be of that authority and for the name in the pool's URL.",
)
@click.option(
    "--rdma-device",
    metavar="NAME",
    default="",
    help="For rdma:// the device of this host to use, as `rdma link` names it. Default: the first "
    "with an active port.",
)
@click.option(
    "--rdma-gid-index",
    metavar="N",
    type=click.IntRange(0, 255),
    default=None,
    help="For rdma:// the device's GID by which the server is reached. Default: RoCE v2 over IPv4 "
    "if there is one, else over IPv6, else what there is.",
)
@click.option(
    "--filter",
    "filters",
    metavar="NAME[:key=value,...]",
    type=Parsed("filter", parse_filter),
    multiple=True,
    help="Put a filter before the pool: checksum, stats, delay:rtt=10us,bandwidth=1G, "
    "error:fetch=0.01,... May be repeated; the first is outermost.",
)
@click.option(
    "--stats",
    "stats_path",
    metavar="FILE",
    type=Parsed("path", _parse_stats),
    default="",
    help="Write statistics to FILE (JSON) when the job has ended.",
)
@click.option("-q", "--quiet", is_flag=True, help="Say nothing but warnings and errors.")
@click.option(
    "--no-pinned-io",
    is_flag=True,
    help="Vouch that CMD pins no memory (O_DIRECT, io_uring, RDMA): "
    "lets kernels before 6.8 be used.",
)
@click.argument(
    "words",
    metavar="[--] CMD [ARG]...",
    nargs=-1,
    type=click.UNPROCESSED,
    shell_complete=complete_words,
)
def command(  # noqa: PLR0913, PLR0917 - click gives each option by its name
    budget_bytes: int,
    pools: tuple[Pool, ...],
    pool_timeout_ns: int,
    tls: str | None,
    tls_certificates: str,
    rdma_device: str,
    rdma_gid_index: int | None,
    filters: tuple[Filter, ...],
    stats_path: str,
    quiet: bool,
    no_pinned_io: bool,
    words: tuple[str, ...],
) -> NoReturn:
    """See the help above; never returns where all is well."""
    environment = inherited_environment()
    if JOB_VARIABLE in environment:
        raise FarmemError("this runs in a farmem job already", "leave the inner `farmem run` out")
    if not words:
        raise FarmemError("there is no command to run", "type: farmem run -m 1G -- CMD ARG...")
    checks.check_descriptors()
    library = checks.library_path()
    search = os.fsdecode(environment.get(b"PATH", os.fsencode(os.defpath)))
    path = checks.find_command(words[0], search)
    checks.check_program(path, search, checks.machine_of(library))
    access = checks.check_userfaultfd(no_pinned_io)
    file_io, file_direct = _file_io_from(environment)
    request = Request(
        command=words,
        budget_bytes=budget_bytes,
        pool=join_pools(pools),
        filters=limited(filters),
        stats_path=stats_path,
        quiet=quiet,
        no_pinned_io=no_pinned_io,
        userfaultfd_way=access.way,
        defects=_defects_from(environment),
        evict_mode=_evict_mode_from(environment),
        file_io=file_io,
        file_direct=file_direct,
        pool_timeout_ns=pool_timeout_ns,
        tls=parse_tls(tls or "", tls_certificates),
        rdma_device=rdma_device,
        rdma_gid_index=rdma_gid_index,
    )
    job = Job(request)
    launch(job, path, job.environment(environment, library))
