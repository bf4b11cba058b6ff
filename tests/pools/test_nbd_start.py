"""Before the program starts: a server that can't be used is an error within five seconds, which
names the server and says what to do, with status 125; a lease is got, kept and given back.

The control channel is a fake one here, so that it can say anything.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from tests.harness import Result, assert_ok, assert_paged, compile_c, run_farmem, start_farmem
from tests.pools.fake_nbd import FLAGS, fake_nbd
from tests.pools.fake_serve import TOKEN, FakeServe, fake_serve
from tests.pools.nbd_servers import MIB, NbdServer, free_port, nbd_server, until

pytestmark = [pytest.mark.pools, pytest.mark.uffd]
LIMIT_S = 60


def refused(url: str, *words: str) -> Result:
    """The pool is refused, soon, with an error that holds these words, and no traceback."""
    begin = time.monotonic()
    result = run_farmem(["true"], local="32M", options=("--pool", url), check=False)
    assert time.monotonic() - begin < 20, "a limit to end a hang; the promise is five seconds"
    assert result.returncode == 125, result.describe()
    text = result.stderr.decode()
    assert all(word in text for word in words), (words, text)
    assert "Traceback" not in text and len(text.splitlines()) >= 2, text
    return result


def data_of(server: NbdServer) -> dict[str, object]:
    where = {"unix": str(server.socket)} if server.socket else {"port": server.port}
    return {**where, "export": TOKEN}


# ---- any NBD server


@pytest.mark.parametrize("scheme", ["tcp", "nbd"])
def test_nobody_is_there(scheme: str, tmp_path: Path) -> None:
    port = free_port()
    refused(f"{scheme}://127.0.0.1:{port}", f"127.0.0.1:{port}", "Connection refused")
    refused(f"{scheme}://no.such.host.invalid:7", "no.such.host.invalid:7", "can't be reached")
    local = f"unix://{tmp_path}/s" if scheme == "tcp" else f"nbd+unix:///?socket={tmp_path}/s"
    refused(local, f"{tmp_path}/s", "No such file")


@pytest.mark.parametrize("scheme", ["tcp", "nbd"])
def test_somebody_is_there_and_says_nothing(scheme: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        refused(f"{scheme}://127.0.0.1:{port}", f"127.0.0.1:{port}", "does not answer")


@pytest.mark.parametrize("scheme", ["tcp", "nbd"])
@pytest.mark.parametrize("words", [b"", b"SSH-2.0-x\r\n", b"HTTP/1.1 200 OK\r\n\r\nx", bytes(64)])
def test_somebody_else_is_there(scheme: str, words: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            sock, _ = listener.accept()
            with sock, contextlib.suppress(OSError):
                sock.sendall(words)
                sock.shutdown(socket.SHUT_WR)
                sock.recv(1000)

        threading.Thread(target=serve, daemon=True).start()
        port = listener.getsockname()[1]
        refused(f"{scheme}://127.0.0.1:{port}", f"127.0.0.1:{port}")


def test_an_endless_answer_is_not_waited_for() -> None:
    """A byte now and then: the deadline is for all of it together."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            sock, _ = listener.accept()
            with sock, contextlib.suppress(OSError):
                while True:
                    sock.sendall(b"H")
                    time.sleep(0.5)

        threading.Thread(target=serve, daemon=True).start()
        refused(f"tcp://127.0.0.1:{listener.getsockname()[1]}", "does not answer")


@pytest.mark.parametrize(
    ("refusal", "word"),
    [(0x80000006, "no such export"), (0x80000005, "wants TLS"), (0x80000002, "refuses")],
)
def test_an_export_that_is_refused(refusal: int, word: str) -> None:
    with fake_nbd() as server:
        server.refusal = refusal
        refused(server.url, word)


def test_an_export_that_can_only_be_read() -> None:
    with nbd_server("read-only") as server:
        refused(server.url, "read-only")
    with fake_nbd() as fake:
        fake.flags = FLAGS | 2
        refused(fake.url, "read-only")


def test_an_export_that_is_too_small() -> None:
    with fake_nbd(size_mib=1) as server:
        refused(server.url, "2.0 MiB are the least")


# ---- leases


@pytest.mark.parametrize("over", ["tcp", "unix"])
def test_a_lease_is_got_kept_and_given_back(over: str, tmp_path: Path) -> None:
    path = tmp_path / "control" if over == "unix" else None
    with nbd_server(over=over) as data, fake_serve(data_of(data), path=path) as server:
        with start_farmem(
            [compile_c("endless"), str(tmp_path / "stop")], local="32M", options=server.options
        ) as job:
            job.await_out("ready")
            assert len(server.leases) == 1
            until(lambda: server.renewals >= 3, "renewals")
            (tmp_path / "stop").touch()
            result = job.finish(LIMIT_S)
            until(lambda: not server.leases, "the lease was not given back")
        assert_ok(result)
        assert_paged(result.stats, 1000, 1000)
        assert TOKEN.encode() not in result.stderr
        assert result.stats is not None and TOKEN not in repr(result.stats)
        assert result.stats["pool_capacity_bytes"] == 256 * MIB


def test_what_the_job_before_had_is_waited_for_a_moment() -> None:
    with nbd_server() as data, fake_serve(data_of(data)) as server:
        server.free_bytes = 0
        comes = threading.Timer(0.5, lambda: setattr(server, "free_bytes", 64 * MIB))
        comes.start()
        result = run_farmem(["true"], local="32M", options=("--pool", server.url))
        comes.join()
    assert result.stats is not None and result.stats["pool_capacity_bytes"] == 64 * MIB


def test_a_lease_of_so_much() -> None:
    with nbd_server() as data, fake_serve(data_of(data)) as server:
        url = f"{server.url}?size=101M"
        result = run_farmem(["true"], local="32M", options=("--pool", url))
        assert result.stats is not None
        assert result.stats["pool_capacity_bytes"] == 100 * MIB
        [body] = [body for method, path, body in server.asked if path == "/v1/leases"]
        assert body["bytes"] == 100 * MIB and body["job"] and body["tenant"]


def test_the_token_is_no_argument_and_in_no_environment(tmp_path: Path) -> None:
    with (
        nbd_server() as data,
        fake_serve(data_of(data)) as server,
        start_farmem(
            [compile_c("bystander"), str(tmp_path / "stop")], local="32M", options=server.options
        ) as job,
    ):
        job.await_out("ready")
        for pid in (job.process.pid, job.supervisor()):
            for name in ("cmdline", "environ"):
                assert TOKEN.encode() not in Path(f"/proc/{pid}/{name}").read_bytes()
        (tmp_path / "stop").touch()
        assert_ok(job.finish(LIMIT_S))


def test_a_job_that_never_began_gives_its_lease_back(tmp_path: Path) -> None:
    """The command can't be executed, which shows at the very end only: somebody writes to it."""
    command = tmp_path / "true"
    shutil.copy(shutil.which("true") or "/bin/true", command)
    with nbd_server() as data, fake_serve(data_of(data)) as server:
        with command.open("ab"):
            result = run_farmem([command], local="32M", options=server.options, check=False)
        assert result.returncode == 126, result.describe()
        assert any(path == "/v1/leases" for _, path, _ in server.asked)
        until(lambda: not server.leases, "the lease was not given back")


def test_a_lease_whose_memory_cant_be_reached_is_given_back() -> None:
    with fake_serve({"port": free_port(), "export": TOKEN}) as server:
        refused(server.url, "can't be reached")
        assert any(path == "/v1/leases" for _, path, _ in server.asked)
        assert not server.leases


@pytest.mark.parametrize(
    ("refuses", "words"),
    [
        ({"POST": (507, {"error": "so much is not free", "hint": "ask for less"})},
         ("so much is not free", "ask for less")),
        ({"POST": (403, {"error": "over the quota of this tenant", "hint": "wait"})}, ("quota",)),
        ({"GET": (503, {})}, ("status 503",)),
        ({"POST": (201, {"lease": "x"})}, ("has no token",)),
        ({"POST": (201, {"lease": "../x", "token": "y"})}, ("has no lease",)),
        ({"GET": (200, {"extent_bytes": 1 << 21, "free_bytes": 0})}, ("no memory free",)),
        ({"GET": (200, {"extent_bytes": "x"})}, ("extent_bytes",)),
    ],
)  # fmt: skip
def test_a_server_that_refuses(
    refuses: dict[str, tuple[int, dict[str, str]]], words: tuple[str, ...]
) -> None:
    with fake_serve({}) as server:
        server.refuses = refuses
        refused(server.url, *words)


def test_a_server_that_wants_tls() -> None:
    with fake_serve({"port": 1, "export": TOKEN, "tls": True}) as server:
        refused(server.url, "wants TLS")


def lose(server: FakeServe, how: str) -> None:
    if how == "expired":
        server.leases.clear()
    else:
        server.epoch = "feedface00000002"


@pytest.mark.parametrize("how", ["expired", "anew"])
def test_a_lease_that_is_lost_is_said(how: str, tmp_path: Path) -> None:
    with (
        nbd_server() as data,
        fake_serve(data_of(data)) as server,
        start_farmem(
            [compile_c("bystander"), str(tmp_path / "stop")], local="32M", options=server.options
        ) as job,
    ):
        job.await_out("ready")
        lose(server, how)
        job.await_err("pages that are there are lost")
        (tmp_path / "stop").touch()
        result = job.finish(LIMIT_S)
    assert_ok(result)
    assert TOKEN.encode() not in result.stderr


def test_a_lost_lease_is_sigbus_and_not_a_wait(tmp_path: Path) -> None:
    """The server was started anew, elsewhere: nothing answers, and nothing will."""
    with (
        nbd_server() as data,
        fake_serve(data_of(data)) as server,
        start_farmem(
            [compile_c("endless"), str(tmp_path / "stop")],
            local="32M",
            options=(*server.options, "--pool-timeout", "600s"),
        ) as job,
    ):
        job.await_out("ready")
        data.kill()
        lose(server, "anew")
        result = job.finish(LIMIT_S)
    assert result.returncode == -signal.SIGBUS, result.describe()
    assert b"has ended our lease" in result.stderr


def test_a_server_that_does_not_renew_for_a_while(tmp_path: Path) -> None:
    """Said once, and tried again; the supervisor goes on all the while."""
    with (
        nbd_server() as data,
        fake_serve(data_of(data)) as server,
        start_farmem(
            [compile_c("bystander"), str(tmp_path / "stop")], local="32M", options=server.options
        ) as job,
    ):
        job.await_out("ready")
        server.refuses = {"POST": (503, {"error": "busy", "hint": ""})}
        job.await_err("can't be renewed: busy")
        server.refuses = {}
        job.await_err("was renewed again")
        (tmp_path / "stop").touch()
        assert_ok(job.finish(LIMIT_S))


def test_a_job_that_is_killed_gives_its_lease_back(tmp_path: Path) -> None:
    """The supervisor outlives it."""
    with (
        nbd_server() as data,
        fake_serve(data_of(data)) as server,
        start_farmem(
            [compile_c("endless"), str(tmp_path / "stop")], local="32M", options=server.options
        ) as job,
    ):
        job.await_out("ready")
        os.kill(job.process.pid, signal.SIGKILL)
        assert job.finish(LIMIT_S).returncode == -signal.SIGKILL
        until(lambda: not server.leases, "the lease was not given back")
