"""What Prometheus is told: the server's figures in its text format."""

from collections.abc import Iterator

from farmem import __version__
from farmem.pool.facts import Facts

KIND = "text/plain; version=0.0.4; charset=utf-8"

Sample = tuple[dict[str, str], float]


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _lines(name: str, kind: str, text: str, samples: list[Sample]) -> Iterator[str]:
    yield f"# HELP farmem_pool_{name} {text}"
    yield f"# TYPE farmem_pool_{name} {kind}"
    for labels, value in samples:
        pairs = ",".join(f'{key}="{_escaped(word)}"' for key, word in labels.items())
        yield f"farmem_pool_{name}{f'{{{pairs}}}' if pairs else ''} {value}"


def text_of(server: Facts) -> str:
    """The whole page."""
    leases = server.leases
    counters = leases.counters()
    tenants: dict[str, int] = {}
    for lease in leases.live:
        tenants[lease.tenant] = tenants.get(lease.tenant, 0) + lease.size_bytes
    doors = [leases.table.struct.doors[door.index] for door in server.doors]
    rdma = server.queue_pairs
    plain: list[tuple[str, str, str, float]] = [
        ("capacity_bytes", "gauge", "What may be lent at once.", leases.capacity_bytes),
        ("free_bytes", "gauge", "What a lease could have now.", leases.free_bytes),
        ("clearing_bytes", "gauge", "Come back and not cleared yet.", leases.clearing_bytes),
        ("used_bytes", "gauge", "Memory of this host in use.", leases.memory.used_bytes()),
        ("leases", "gauge", "Leases that live.", len(leases.live)),
        ("draining", "gauge", "1: no new leases are granted.", int(leases.is_draining)),
        ("start_time_seconds", "gauge", "When this epoch began.", server.started_seconds),
        ("leases_granted_total", "counter", "Leases granted.", leases.granted),
        ("data_restarts_total", "counter", "Starts of a data process that had died.",
         sum(door.restarts for door in server.doors)),
        ("data_connections", "gauge", "Data connections open.",
         sum(door.connections for door in doors)),
        ("data_refused_total", "counter", "Data connections without a lease.",
         sum(door.refused for door in doors)),
        ("rdma_queue_pairs", "gauge", "Queue pairs that clients have.", rdma.count if rdma else 0),
        ("rdma_registered_bytes", "gauge", "Memory that an RDMA device can reach.",
         rdma.registered_bytes if rdma else 0),
        ("data_errors_total", "counter", "Requests that failed.", counters["errors"]),
    ]  # fmt: skip
    labelled: list[tuple[str, str, str, list[Sample]]] = [
        ("info", "gauge", "The server.",
         [({"name": server.name, "version": __version__, "epoch": server.epoch}, 1)]),
        ("leased_bytes", "gauge", "Bytes lent, by tenant.",
         [({"tenant": tenant}, size) for tenant, size in sorted(tenants.items())]),
        ("leases_ended_total", "counter", "Leases that ended, by how.",
         [({"how": how}, number) for how, number in leases.ended.items()]),
        ("leases_refused_total", "counter", "Leases refused, by why.",
         [({"why": why}, number) for why, number in sorted(leases.refused.items())]),
        ("data_requests_total", "counter", "Requests for data.",
         [({"kind": kind}, counters[f"{kind}s"]) for kind in ("read", "write", "trim")]),
        ("data_bytes_total", "counter", "Bytes read, written and trimmed.",
         [({"kind": kind}, counters[f"{word}_bytes"])
          for kind, word in (("read", "read"), ("write", "written"), ("trim", "trimmed"))]),
    ]  # fmt: skip
    lines: list[str] = []
    for name, kind, text, value in plain:
        lines += _lines(name, kind, text, [({}, value)])
    for name, kind, text, samples in labelled:
        lines += _lines(name, kind, text, samples)
    return "\n".join(lines) + "\n"
