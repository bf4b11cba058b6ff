"""The life of a server: its start, what ends it, what it survives, and what systemd is told."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from farmem.cli import main
from farmem.pool.nbd import NbdError
from tests.harness import FARMEM, exclusive
from tests.pools.serving import (
    LIMIT_S,
    MIB,
    TCP,
    UNIX,
    Data,
    Server,
    can_serve,
    refuses,
    serving,
    until,
)

pytestmark = pytest.mark.pools
HUGE = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short name: a Unix socket's path is short."""
    with tempfile.TemporaryDirectory(prefix="farmem-serve-") as name:
        yield Path(name)


def test_a_drain_waits_for_the_last_lease() -> None:
    with serving("--drain-timeout", "300s") as server:
        lease = server.lease(8 * MIB)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.ask("GET", "/healthz")[1] == {"status": "draining"}, "the drain")
        assert server.about()["draining"] and server.metrics()["draining"] == 1
        status, why = server.refused(1)
        assert status == 503 and "draining" in why
        with Data(lease) as data:
            data.write(0, b"still")
            assert data.read(0, 5) == b"still"
        assert server.renew(lease) == 200 and server.process.poll() is None
        server.release(lease)
        assert server.process.wait(LIMIT_S) == 0
        assert "STOPPING=1" in server.notes()


def test_a_drain_has_an_end() -> None:
    with serving("--drain-timeout", "300ms") as server:
        server.lease(8 * MIB)
        assert server.end() == 0
        assert "1 leases (8.0 MiB) end with this server" in server.log


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_at_once(number: int) -> None:
    with serving("--drain-timeout", "300s") as server:
        server.lease(8 * MIB)
        server.process.send_signal(number)
        until(lambda: server.about()["draining"], "the drain")
        assert server.end(number) == 0


def test_an_idle_server_ends_at_once() -> None:
    with serving("--drain-timeout", "300s") as server:
        path, nbdkit = server.path, server.nbdkit()
        assert server.end() == 0
        assert not Path(path).exists() and not Path(f"{path}.nbd").exists()
        assert not Path(f"/proc/{nbdkit}").exists()


def test_a_restart_is_a_new_epoch(folder: Path) -> None:
    listens = [f"unix:{folder}/pool", "127.0.0.1:0"]
    with serving(listens=listens) as server:
        old = server.lease(8 * MIB, UNIX)
        assert server.end(signal.SIGKILL) == -signal.SIGKILL
    with serving(listens=listens) as server:
        assert server.about()["epoch"] != old["epoch"]
        assert server.renew(old) == 404
        with pytest.raises(NbdError):
            Data(old)


def has_gone(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] in "ZX"
    return True


def test_no_data_without_the_server() -> None:
    """Killed, it takes nbdkit with it: nobody goes on writing to memory that nobody keeps."""
    with serving() as server:
        lease = server.lease(8 * MIB)
        with Data(lease) as data:
            data.write(0, b"x")
            nbdkit = server.nbdkit()
            server.end(signal.SIGKILL)
            until(lambda: has_gone(nbdkit), "the end of nbdkit")
            with pytest.raises((NbdError, OSError)):
                data.read(0, 1)


def test_leases_outlive_nbdkit() -> None:
    """Killed while it serves, it is started again: same port, same leases, same bytes."""
    with serving() as server:
        lease, mark = server.lease(8 * MIB), os.urandom(MIB)
        gone = server.lease(8 * MIB)
        for round_ in range(3):
            with Data(lease) as data, Data(gone if round_ == 0 else lease) as other:
                data.write(round_ * MIB, mark)
                nbdkit = server.nbdkit()
                os.kill(nbdkit, signal.SIGKILL)
                until(lambda nbdkit=nbdkit: has_gone(nbdkit), "the end of nbdkit")
                with pytest.raises((NbdError, OSError)):
                    other.read(0, 1)
        with Data(lease) as data:
            assert [data.read(at * MIB, MIB) == mark for at in range(3)] == [True] * 3
        server.release(gone)
        until(lambda: server.metrics()["clearing_bytes"] == 0, "the memory")
        metrics = server.metrics()
        assert metrics["data_restarts_total"] == 3 and metrics["used_bytes"] == 3 * MIB
        until(lambda: server.metrics()["data_connections"] == 0, "the connections' end")
        assert "every lease lives on" in server.log


def test_a_data_process_that_dies_again_and_again_is_started_as_often() -> None:
    """To end the server would lose what is lent; whoever waits gets its bytes."""
    with serving() as server:
        lease = server.lease(8 * MIB)
        for number in range(8):
            until(server.nbdkit, "nbdkit")
            with Data(lease) as data:
                assert data.read(0, 1) == bytes([number])
                data.write(0, bytes([number + 1]))
            os.kill(server.nbdkit(), signal.SIGKILL)
        with Data(lease) as data:
            assert data.read(0, 1) == b"\x08"
        assert server.metrics()["data_restarts_total"] == 8


def test_a_data_process_that_can_not_start_any_more_ends_the_server(folder: Path) -> None:
    can_serve()
    flag, fake = folder / "broken", folder / "nbdkit"
    real = shutil.which("nbdkit")
    fake.write_text(
        f"#!/bin/sh\n[ -e {flag} ] && echo 'all broken' >&2 && exit 3\nexec {real} \"$@\"\n"
    )
    fake.chmod(0o755)
    with serving(env={"PATH": f"{folder}:{os.environ['PATH']}"}) as server:
        lease = server.lease(MIB)
        with Data(lease) as data:
            data.write(0, b"x")
        flag.touch()
        os.kill(server.nbdkit(), signal.SIGKILL)
        assert server.process.wait(LIMIT_S) == 125
        assert "nbdkit has ended with status 3 (all broken)" in server.log


def test_what_is_busy_in_a_lease_that_ended_is_waited_for() -> None:
    """A stopped data process: the memory is not lent again before its accesses are over."""
    with serving("--ttl", "1s", capacity="8M") as server:
        lease = server.lease(8 * MIB)
        data = Data(lease)
        nbdkit = server.nbdkit()
        os.kill(nbdkit, signal.SIGSTOP)
        server.release(lease)
        os.kill(nbdkit, signal.SIGCONT)
        until(lambda: server.about()["free_bytes"] == 8 * MIB, "the memory")
        with pytest.raises(NbdError, match="error 108"):
            data.read(0, 1)
        data.close()


BAD_WORDS = [
    ([], "how much to lend"),
    (["--capacity", "much"], "is not a size"),
    (["--listen", "7717"], "is not an address"),
    (["--listen", "127.0.0.1:99999"], "is not an address"),
    (["--listen", ":7717"], "is not an address"),
    (["--listen", "::1:7717"], "in brackets"),
    (["--listen", "unix:pool"], "names no path"),
    (["--listen", f"unix:/{'x' * 200}"], "a shorter path"),
    (["--ttl", "1ms"], "too short"),
    (["--ttl", "soon"], "is not a time"),
    (["--quota", "=1G"], "gives nobody anything"),
    (["--quota", "0"], "gives nobody anything"),
    (["--quota", "a=b=c"], "is not a size"),
    (["--data-port", "-1"], "is no port"),
    (["--name", "a\nb"], "printable"),
    (["--tls", "maybe"], "maybe"),
    (["--capacity", "8M", "--tls", "on"], "needs certificates"),
    (["--capacity", "8M", "--tls", "require"], "needs certificates"),
]


@pytest.mark.parametrize(("words", "said"), BAD_WORDS, ids=range(len(BAD_WORDS)))
def test_words_that_make_no_sense(
    words: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What was wrong and what to type instead, before anything is begun."""
    monkeypatch.setattr("asyncio.run", lambda coroutine: pytest.fail("it began to serve"))
    assert main(["serve", *words]) == 125
    what, hint = capsys.readouterr().err.strip().split("\n")
    assert said in what + hint and hint.strip()


def test_what_can_not_be_had_here() -> None:
    can_serve()
    cap = ("--capacity", "8M")
    assert "2.0 MiB are the least" in refuses("--capacity", "1M")
    assert "and this host has" in refuses("--capacity", "8000T")
    assert "huge pages" in refuses("--capacity", "1000G", "--huge-pages")
    assert "can't listen on" in refuses(*cap, "--listen", "unix:/nosuch/folder/pool")
    assert "can't listen on 203.0.113.7" in refuses(*cap, "--listen", "203.0.113.7:0", "--tls=off")
    assert "no-such-host.invalid" in refuses(*cap, "--listen", "no-such-host.invalid:1")


def test_off_host_needs_a_word() -> None:
    """In plain text only where this host alone can listen in, unless it is said."""
    can_serve()
    said = refuses("--capacity", "8M", "--listen", "0.0.0.0:0")
    assert "--tls=off" in said and "other hosts" in said
    assert "--tls=off" in refuses("--capacity", "8M", "--listen", "[::]:0")
    with serving("--tls=off", listens=["0.0.0.0:0"]) as server:
        assert "listening on tcp://0.0.0.0:" in server.log


def test_without_nbdkit() -> None:
    env = {"PATH": os.path.dirname(FARMEM)}
    said = refuses("--capacity", "8M", "--listen", "127.0.0.1:0", env=env)
    assert "nbdkit is not installed" in said and "apt-get install nbdkit" in said


def test_a_port_that_is_taken() -> None:
    can_serve()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert port in refuses("--capacity", "8M", "--listen", f"127.0.0.1:{port}")
        said = refuses("--capacity", "8M", "--listen", "127.0.0.1:0", "--data-port", port)
        assert f"--data-port {port}" in said


def test_unix_sockets_that_are_there(folder: Path) -> None:
    """What a killed server left is replaced; what somebody listens on, or no socket, is not."""
    path = folder / "pool"
    with serving(listens=[f"unix:{path}"]) as server:
        said = refuses("--capacity", "8M", "--listen", f"unix:{path}")
        assert "somebody listens" in said
        assert server.ask("GET", "/healthz", way=UNIX)[0] == 200
        server.end(signal.SIGKILL)
    assert path.exists()
    with serving(listens=[f"unix:{path}"]) as server:
        assert server.ask("GET", "/healthz", way=UNIX)[0] == 200
    path.write_text("precious")
    assert "no socket" in refuses("--capacity", "8M", "--listen", f"unix:{path}")
    assert path.read_text() == "precious"


def test_what_systemd_is_told() -> None:
    with serving(env={"WATCHDOG_USEC": "200000"}) as server:
        assert server.notes()[0] == "READY=1"
        until(lambda: server.notes().count("WATCHDOG=1") >= 3, "the watchdog's food")
        server.process.send_signal(signal.SIGSTOP)
        time.sleep(0.3)
        fed = server.notes().count("WATCHDOG=1")
        time.sleep(0.5)
        assert server.notes().count("WATCHDOG=1") == fed
        server.process.send_signal(signal.SIGCONT)
        until(lambda: server.notes().count("WATCHDOG=1") > fed, "the watchdog's food")
        server.end()
        assert "STOPPING=1" in server.notes()


HAND_OVER = """
import fcntl, os, sys
high = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 20) for fd in sys.argv[1:4]]
for number, fd in enumerate(high, 3):
    os.dup2(fd, number)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.argv[4], sys.argv[4:])
"""


def test_sockets_that_systemd_hands_over(folder: Path) -> None:
    """As with a .socket unit: descriptors from 3 on, told in the environment."""
    control = socket.create_server(("127.0.0.1", 0))
    unix, data = (socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(2))
    unix.bind(str(folder / "control"))
    data.bind(str(folder / "bytes"))
    unix.listen()
    data.listen()
    can_serve()
    fds = [sock.fileno() for sock in (control, unix, data)]
    launcher = [sys.executable, "-c", HAND_OVER, *map(str, fds)]
    command = [*launcher, str(FARMEM), "serve", "--capacity", "8M"]
    env = {**os.environ, "LISTEN_FDS": "3", "LISTEN_FDNAMES": "control:control:data"}
    with (folder / "log").open("wb") as log, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
        s.bind(str(folder / "notify"))
        s.setblocking(False)
        env["NOTIFY_SOCKET"] = str(folder / "notify")
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, pass_fds=fds)
        server = Server(process, folder / "log", s)
        try:
            until(server.has_started, "the server's start")
            assert server.port == control.getsockname()[1]
            assert server.path == str(folder / "control")
            for way in (TCP, UNIX):
                lease = server.lease(MIB, way)
                assert lease["nbd"]["unix"] == (str(folder / "bytes") if way == UNIX else None)
                with Data(lease) as found:
                    found.write(0, b"right")
                    assert found.read(0, 6) == b"right\0"
                server.release(lease)
            assert server.end() == 0
            assert (folder / "control").exists()  # systemd's
            server.check_what_it_said()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            for sock in (control, unix, data):
                sock.close()


def test_the_configuration(folder: Path) -> None:
    """A file says what a command line would."""
    path = folder / "farmem.toml"
    listens = [f"unix:{folder}/pool", "127.0.0.1:0"]
    lines = ["[serve]", 'ttl = "7s"', 'quota = ["4M"]', 'name = "rack7"']
    path.write_text("\n".join([*lines, f"listen = {json.dumps(listens)}"]))
    with serving(listens=[], env={"FARMEM_CONFIG": str(path)}) as server:
        assert server.about()["name"] == "rack7"
        lease = server.lease(4 * MIB, UNIX)
        assert lease["ttl_ns"] == 7 * 10**9 and server.refused(MIB, UNIX)[0] == 403


def test_the_server_is_small() -> None:
    """No JIT, no numerics, one process beside nbdkit, and the memory of neither is the pool's."""
    with serving(capacity="512M") as server:
        maps = Path(f"/proc/{server.process.pid}/maps").read_text()
        assert not re.search(r"numba|llvm|numpy", maps)
        children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
        assert children.read_text().split() == [str(server.nbdkit())]
        assert len(os.listdir(f"/proc/{server.process.pid}/task")) == 1
        assert server.metrics()["used_bytes"] == 0


def self_test(*options: str) -> subprocess.CompletedProcess[str]:
    can_serve()
    command = [str(FARMEM), "serve", "--self-test", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)


def test_the_self_test() -> None:
    done = self_test()
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["tcp", "unix", "all is well"]
    assert "written, read and checked" in lines[0]


@pytest.mark.parametrize("defect", ["keep_bytes,space=32M", "no_generation"])
def test_the_self_test_can_fail(defect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FARMEM_TEST_POOL", defect)
    done = self_test()
    assert done.returncode == 125, done.stdout
    assert "self-test of tcp" in done.stderr and "failed" in done.stderr


@contextlib.contextmanager
def huge_pages(number: int) -> Iterator[None]:
    """So many huge pages more than are in use, while it lasts."""
    with exclusive("huge-pages"):
        before = (HUGE / "nr_hugepages").read_text()
        (HUGE / "nr_hugepages").write_text(str(int(before) + number))
        try:
            if int((HUGE / "free_hugepages").read_text()) < number:
                pytest.skip("this host has no room for huge pages")
            yield
        finally:
            (HUGE / "nr_hugepages").write_text(before)


def huge(name: str) -> int:
    return int((HUGE / f"{name}_hugepages").read_text())


@pytest.mark.root
def test_huge_pages() -> None:
    """They are held back when they are promised, all of them can be used, and all come back."""
    with huge_pages(8):
        free = huge("free")
        with serving("--huge-pages", capacity="16M") as server:
            lease = server.lease(12 * MIB)
            assert huge("resv") >= 6 and huge("free") == free
            with Data(lease) as data, Data(lease) as other:
                for at in range(12):
                    data.write(at * MIB, bytes([at + 1]) * MIB)
                for at in range(12):
                    assert other.read(at * MIB, MIB) == bytes([at + 1]) * MIB
                data.trim(MIB, 3 * MIB)
                assert other.read(0, 5 * MIB) == b"\1" * MIB + bytes(3 * MIB) + b"\5" * MIB
                assert server.metrics()["used_bytes"] == 12 * MIB
            assert huge("free") == free - 6
            server.release(lease)
            until(lambda: server.about()["free_bytes"] == 16 * MIB, "the memory")
            until(lambda: huge("free") == free and huge("resv") == 0, "the pages")
            again = server.lease(16 * MIB)
            with Data(again) as data:
                assert data.read(0, 16 * MIB).count(0) == 16 * MIB
        until(lambda: huge("free") == free and huge("resv") == 0, "the pages")


@pytest.mark.root
def test_huge_pages_that_others_took() -> None:
    """A promise is kept back by the kernel, so a lease that can't be backed is refused."""
    with huge_pages(8), serving("--huge-pages", capacity="16M") as server:
        with serving("--huge-pages", capacity="16M") as other:
            taken = other.lease(10 * MIB)
            status, why = server.refused(16 * MIB)
            assert status == 507 and "huge pages" in why
            assert server.about()["free_bytes"] == 6 * MIB
            server.release(server.lease(6 * MIB))
            other.release(taken)
            until(lambda: server.about()["free_bytes"] == 16 * MIB, "the pages")
        server.release(server.lease(16 * MIB))


def test_no_interpreter_of_a_jit() -> None:
    """Nor are they imported where nobody maps them yet."""
    code = "import sys, farmem.pool.server, farmem.pool.selftest\nprint([n for n in "
    code += "('numba', 'numpy', 'llvmlite') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
