"""Leases of a real server: what is granted, what is refused and how, and when it ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from farmem.pool.nbd import NbdError
from tests.harness import as_user
from tests.pools.serving import LIMIT_S, MIB, TCP, UNIX, Data, Server, need, serving, until

pytestmark = pytest.mark.pools
EXTENT = 2 * MIB


@pytest.fixture(scope="module")
def shared() -> Iterator[Server]:
    with serving() as found:
        yield found


@pytest.fixture
def server(shared: Server) -> Iterator[Server]:
    """A server without leases."""
    before = shared.about()
    assert before["leases"] == 0 and before["free_bytes"] == before["capacity_bytes"]
    yield shared
    for lease in shared.given:  # what a test that failed has left
        shared.ask("DELETE", f"/v1/leases/{lease['lease']}", token=lease["token"])
    shared.given.clear()
    until(lambda: shared.metrics()["clearing_bytes"] == 0, "the memory")
    assert shared.about()["leases"] == 0


@pytest.mark.parametrize("way", [TCP, UNIX])
def test_a_lease_is_what_was_asked_for(server: Server, way: str) -> None:
    lease = server.lease(EXTENT + 1, way)
    about = server.about()
    assert lease["bytes"] == 2 * EXTENT
    assert lease["epoch"] == about["epoch"] and len(bytes.fromhex(lease["epoch"])) == 8
    assert len(bytes.fromhex(lease["token"])) == 32 and lease["nbd"]["export"] == lease["token"]
    assert lease["ttl_ns"] == 60 * 10**9 and lease["nbd"]["tls"] is False
    assert lease["nbd"]["host"] is None
    assert (lease["nbd"]["port"] is None) == (lease["nbd"]["unix"] is not None) == (way == UNIX)
    assert about["free_bytes"] == about["capacity_bytes"] - 2 * EXTENT and about["leases"] == 1
    with Data(lease) as data:
        assert data.bytes == lease["bytes"]
        data.write(EXTENT, b"right")
        assert data.read(EXTENT - 2, 9) == b"\0\0right\0\0"
    path = f"/v1/leases/{lease['lease']}/renew"
    renewed = server.ask("POST", path, token=lease["token"])
    assert renewed == (200, {"ttl_ns": lease["ttl_ns"], "epoch": lease["epoch"]})
    server.release(lease)
    assert server.renew(lease) == 404


@pytest.mark.parametrize("way", [TCP, UNIX])
def test_curl_is_enough(server: Server, way: str) -> None:
    """With its defaults, as somebody at a terminal would type it."""
    need("curl")

    def curl(path: str, *words: str) -> Any:
        place = f"http://127.0.0.1:{server.port}"
        options = ["--unix-socket", server.path] if way == UNIX else []
        command = ["curl", "-sS", "--fail-with-body", *options, *words, f"{place}{path}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=True)
        return json.loads(done.stdout) if done.stdout else None

    assert curl("/healthz") == {"status": "ok"}
    lease = curl("/v1/leases", "-d", '{"bytes": 1000}')
    server.given.append(lease)
    bearer = ("-H", f"Authorization: Bearer {lease['token']}")
    assert curl(f"/v1/leases/{lease['lease']}/renew", "-X", "POST", *bearer)["ttl_ns"]
    assert curl(f"/v1/leases/{lease['lease']}", "-X", "DELETE", *bearer) is None


def test_what_other_tokens_get(server: Server) -> None:
    lease, other = server.lease(EXTENT), server.lease(EXTENT)
    path = f"/v1/leases/{lease['lease']}"
    for token in ("", other["token"], "0" * 64, lease["token"][:-1], "\xff"):
        assert server.ask("DELETE", path, token=token)[0] == 401
        assert server.ask("POST", f"{path}/renew", token=token)[0] == 401
    wrong = {"Authorization": f"Basic {lease['token']}"}
    assert server.ask("DELETE", path, headers=wrong)[0] == 401
    assert server.ask("DELETE", f"/v1/leases/{'0' * 16}", token=lease["token"])[0] == 404
    server.release(lease)
    assert server.ask("DELETE", path, token=lease["token"])[0] == 404
    server.release(other)


BAD_BODIES: list[Any] = [
    b"", b"{", b"[]", b"7", b"\xff\xff", b"[" * 60000, {}, {"bytes": "1G"}, {"bytes": 0},
    {"bytes": -1}, {"bytes": 1.5}, {"bytes": True}, {"bytes": 1 << 63}, {"bytes": 10**4000},
    {"bytes": None}, {"bytes": EXTENT, "tenant": 7}, {"bytes": EXTENT, "tenant": "x" * 201},
    {"bytes": EXTENT, "job": "a\nb"}, {"bytes": EXTENT, "job": "\ud800"},
]  # fmt: skip


@pytest.mark.parametrize("body", BAD_BODIES, ids=lambda body: repr(body)[:24])
def test_bad_input_is_said_to_be(server: Server, body: Any) -> None:
    status, found = server.ask("POST", "/v1/leases", body)
    assert status == 400 and found["error"] and "send JSON" in found["hint"]


def test_other_paths_and_methods(server: Server) -> None:
    assert server.ask("GET", "/")[0] == 404
    assert server.ask("GET", "/v1/leases/../server")[0] == 404
    assert server.ask("GET", "/v1/leases")[0] == 405  # leases are not listed
    assert server.ask("PUT", "/v1/server", b"x")[0] == 405
    assert server.ask("GET", "/v1/leases/00")[0] == 405
    assert server.ask("HEAD", "/healthz") == (200, "")
    assert server.ask("GET", "/healthz?x=1") == (200, {"status": "ok"})
    assert server.ask("POST", "/v1/leases", b"x" * 70000)[0] == 413
    status, _ = server.ask("POST", "/v1/leases", {"bytes": 1}, headers={"Origin": "http://a.b"})
    assert status == 403


POST = b"POST /v1/leases HTTP/1.1\r\nHost: a\r\n"
RUBBISH = [
    b"\0" * 1000,
    b"NBDMAGIC" * 100,
    b"GET\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nA: " + b"a" * 99999,
    b"GET / HTTP/1.1\r\n\r\n",
    POST + b"Content-Length: -1\r\n\r\n",
    b"GET / HTTP/9.9\r\nHost: a\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    POST + b"Content-Length: 3\r\nTransfer-Encoding: gzip\r\n\r\nabc",
    POST + b"Content-Length: 99\r\n\r\n{",
    POST + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n{",
]


@pytest.mark.parametrize("rubbish", RUBBISH, ids=range(len(RUBBISH)))
@pytest.mark.parametrize("port", ["control", "data"])
def test_rubbish_costs_its_sender_alone(server: Server, rubbish: bytes, port: str) -> None:
    lease = server.lease(EXTENT)
    number = server.port if port == "control" else lease["nbd"]["port"]
    with socket.create_connection(("127.0.0.1", number), LIMIT_S) as sock:
        answer = b""
        with contextlib.suppress(OSError):
            sock.sendall(rubbish)
            sock.shutdown(socket.SHUT_WR)
            while data := sock.recv(65536):
                answer += data
    if port == "control":
        assert not answer or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.1 501")), answer
    assert server.renew(lease) == 200
    with Data(lease) as data_connection:
        assert data_connection.read(0, 1) == b"\0"
    server.release(lease)


def test_a_request_in_pieces_and_two_at_once(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), LIMIT_S) as sock:
        one = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"
        for byte in one:
            sock.sendall(bytes([byte]))
        sock.sendall(one + one)
        answer = b""
        while answer.count(b'"ok"') < 3:
            data = sock.recv(65536)
            assert data, answer
            answer += data


def test_a_full_server_refuses_leases_and_no_page(server: Server) -> None:
    """All that was promised can be written, and what was promised is all there is."""
    leases = [server.lease(16 * MIB) for _ in range(4)]
    status, why = server.refused(1)
    assert status == 507 and "0 bytes free" in why
    for lease in leases:
        with Data(lease) as data:
            for at in range(0, lease["bytes"], MIB):
                data.write(at, os.urandom(MIB))
    metrics = server.metrics()
    assert metrics["used_bytes"] == 64 * MIB and metrics['leases_refused_total{why="full"}'] >= 1
    server.release(leases.pop())
    until(lambda: server.about()["free_bytes"] == 16 * MIB, "the memory")
    assert server.metrics()["used_bytes"] == 48 * MIB
    status, why = server.refused(17 * MIB)
    assert status == 507 and f"{16 * MIB} bytes" in why
    leases.append(server.lease(16 * MIB))
    for lease in leases:
        server.release(lease)


def test_trimmed_memory_is_the_hosts_again(server: Server) -> None:
    lease = server.lease(8 * MIB)
    with Data(lease) as data:
        data.write(0, b"x" * 8 * MIB)
        data.trim(MIB, 4 * MIB)
        assert server.metrics()["used_bytes"] == 4 * MIB
        assert server.about()["free_bytes"] == 56 * MIB  # but it stays promised
    server.release(lease)


def test_metrics_are_what_was_done(server: Server) -> None:
    def figures() -> dict[str, float]:
        return server.metrics()

    before = figures()
    lease = server.lease(EXTENT, tenant='a"b\\c')
    with Data(lease) as data:
        for at in range(5):
            data.write(at * 4096, b"x" * 4096)
        assert data.read(0, 4096) == b"x" * 4096 and data.read(0, 100) == b"x" * 100
        data.trim(0, 8192)
        assert figures()["data_connections"] == before["data_connections"] + 1
    during = figures()
    assert during['leased_bytes{tenant="a\\"b\\\\c"}'] == EXTENT
    assert during["leases"] == 1 and during["capacity_bytes"] == 64 * MIB
    assert during["free_bytes"] == 62 * MIB and during["used_bytes"] == 3 * 4096
    server.release(lease)
    until(lambda: figures()["clearing_bytes"] == 0, "the memory")
    after = figures()
    grown = {key: after[key] - before.get(key, 0) for key in after}
    assert grown['data_requests_total{kind="write"}'] == 5
    assert grown['data_requests_total{kind="read"}'] == 2
    assert grown['data_requests_total{kind="trim"}'] == 1
    assert grown['data_bytes_total{kind="write"}'] == 5 * 4096
    assert grown['data_bytes_total{kind="read"}'] == 4196
    assert grown['data_bytes_total{kind="trim"}'] == 8192
    assert grown["leases_granted_total"] == 1
    assert grown['leases_ended_total{how="released"}'] == 1
    assert after["used_bytes"] == 0 and after["leases"] == 0
    until(lambda: figures()["data_connections"] == 0, "the connections' end")


def test_quotas() -> None:
    with serving("--quota", "8M", "--quota", "big=32M") as server:
        small = server.lease(8 * MIB, tenant="small")
        status, why = server.refused(1, tenant="small")
        assert status == 403 and "0 bytes more" in why and "--quota" in why
        other = server.lease(8 * MIB, tenant="other")
        big = server.lease(24 * MIB, tenant="big")
        assert server.refused(10 * MIB, tenant="big")[0] == 403
        assert server.refused(24 * MIB, tenant="big")[0] == 403  # before it is said to be full
        server.release(small)
        until(lambda: server.about()["free_bytes"] == 32 * MIB, "the memory")
        again = server.lease(6 * MIB, tenant="small")
        assert server.metrics()['leases_refused_total{why="quota"}'] == 3
        # Who says nothing is a tenant as well: its host.
        assert server.refused(10 * MIB)[0] == 403
        for lease in (other, big, again):
            server.release(lease)


def ask_as(user: str, server: Server, tenant: str) -> int:
    """The status of a lease that another user asks for on the Unix socket."""
    code = (
        "import json, socket, sys\n"
        "sock = socket.socket(socket.AF_UNIX); sock.connect(sys.argv[1])\n"
        "body = json.dumps({'bytes': 1, 'tenant': sys.argv[2]})\n"
        "head = 'POST /v1/leases HTTP/1.1\\r\\nHost: x\\r\\nContent-Length: '\n"
        "sock.sendall(f'{head}{len(body)}\\r\\n\\r\\n{body}'.encode())\n"
        "print(sock.recv(65536).split()[1].decode())\n"
    )
    python = ["/usr/bin/python3", "-c", code, server.path, tenant]
    done = subprocess.run(
        [*as_user(user, ()), *python], capture_output=True, text=True, timeout=LIMIT_S, check=True
    )
    return int(done.stdout)


@pytest.mark.root
def test_on_a_unix_socket_the_kernel_says_who_asks() -> None:
    with serving("--quota", "nobody=2M", "--ttl", "1s") as server:
        os.chmod(os.path.dirname(server.path), 0o755)
        os.chmod(server.path, 0o666)
        assert ask_as("nobody", server, "root") == 403
        assert ask_as("nobody", server, "") == 201
        assert ask_as("nobody", server, "nobody") == 403  # its quota is used up
        assert server.metrics()['leased_bytes{tenant="nobody"}'] == EXTENT
        lease = server.lease(EXTENT, UNIX, tenant="somebody")  # root may speak for others
        assert server.metrics()['leased_bytes{tenant="somebody"}'] == EXTENT
        server.release(lease)


def test_a_lease_that_is_not_renewed_ends() -> None:
    with serving("--ttl", "1s") as server:
        kept, lost = server.lease(8 * MIB), server.lease(16 * MIB)
        with Data(lost) as data, Data(kept) as kept_data:
            data.write(0, b"x" * MIB)
            kept_data.write(0, b"kept")
            end = time.monotonic() + LIMIT_S
            while server.about()["leases"] == 2:
                assert server.renew(kept) == 200 and time.monotonic() < end
                time.sleep(0.1)
            for _ in range(5):
                time.sleep(0.3)
                assert server.renew(kept) == 200
            assert server.renew(lost) == 404
            with pytest.raises(NbdError):
                data.read(0, 4096)
            with pytest.raises(NbdError):
                data.write(0, b"late")
            assert kept_data.read(0, 4) == b"kept"
        metrics = server.metrics()
        assert metrics['leases_ended_total{how="expired"}'] == 1
        assert metrics["used_bytes"] == 4096
        assert f"lease {lost['lease']}: expired" in server.log


CLIENT = """
import json, sys, time, urllib.request
url = f"http://127.0.0.1:{sys.argv[1]}/v1/leases"
lease = json.load(urllib.request.urlopen(url, json.dumps({"bytes": 32 << 20}).encode()))
print("leased", flush=True)
while True:
    time.sleep(0.2)
    headers = {"Authorization": "Bearer " + lease["token"]}
    asked = urllib.request.Request(f"{url}/{lease['lease']}/renew", b"", headers, method="POST")
    urllib.request.urlopen(asked).read()
"""


def test_a_client_that_is_killed_leaks_nothing() -> None:
    """As long as it lives it keeps its lease; killed, its memory is free within the TTL."""
    with serving("--ttl", "1s") as server:
        client = subprocess.Popen(
            [sys.executable, "-c", CLIENT, str(server.port)], stdout=subprocess.PIPE
        )
        try:
            assert client.stdout and client.stdout.readline() == b"leased\n"
            time.sleep(1.5)
            assert server.about()["free_bytes"] == 32 * MIB
        finally:
            client.send_signal(signal.SIGKILL)
            client.wait()
            if client.stdout:
                client.stdout.close()
        until(lambda: server.about()["free_bytes"] == 64 * MIB, "the memory")


def test_a_server_that_was_stopped_does_not_take_it_out_on_its_clients() -> None:
    """SIGSTOP for longer than the TTL: whoever renews then still has its lease."""
    with serving("--ttl", "1s") as server:
        lease = server.lease(EXTENT)
        server.process.send_signal(signal.SIGSTOP)
        time.sleep(2.5)
        server.process.send_signal(signal.SIGCONT)
        assert server.renew(lease) == 200
        assert server.about()["leases"] == 1
