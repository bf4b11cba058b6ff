"""`farmem run` with TLS: every byte is right and none of it can be read on the way; the agent that
speaks TLS may die, and goes with the job.

The servers are a real `farmem serve --tls=require`, and nbdkit's memory plugin with TLS.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import (
    ROOT,
    as_user,
    assert_ok,
    assert_paged,
    compile_c,
    run_farmem,
    start_farmem,
)
from tests.pools.certificates import agents, make_certificates
from tests.pools.serving import Server, serving, until
from tests.pools.tls_run import Wire, tls_nbdkit, tls_words

pytestmark = [pytest.mark.pools, pytest.mark.uffd]
LIMIT_S = 90
# Fills 64 MiB with pages that all begin with the marker, and looks at each of them twice.
MARKER = b"this is nobody's business but ours"
MARKS = f"""
pages = [({MARKER!r} + str(k).encode()).ljust(4096, b".") for k in range(16384)]
for _ in range(2):
    assert all(page.startswith({MARKER!r} + str(k).encode()) for k, page in enumerate(pages))
print("ok")
"""


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="farmem-tls-") as name:
        yield make_certificates(Path(name) / "ours")


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    with serving(*tls_words(folder), capacity="512M") as found:
        yield found


def options(server: Server, folder: Path) -> tuple[str, ...]:
    """One lease, which does not grow: so there is one agent."""
    pool = f"tcp://127.0.0.1:{server.port}?size=256M"
    return ("--pool", pool, "--tls-certificates", str(folder))


def all_gone(folder: Path) -> None:
    until(lambda: not agents(folder), "the agent's end")


def the_agent(folder: Path) -> int:
    """There is one for a lease, and one lease."""
    [found] = until(lambda: agents(folder), "the agent")
    return int(found)


def is_connected(pid: int) -> bool:
    """Whether it joins an engine to the server: two sockets beside the five that it has."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir())) > 6


def test_every_word(server: Server, folder: Path) -> None:
    """A quarter of the memory is local; the rest goes to and fro over TLS."""
    result = run_farmem(
        [compile_c("verify"), "4", "96", "2"], local="24M", options=options(server, folder)
    )
    assert_ok(result)
    assert_paged(result.stats, 1000, 1000)
    assert result.stats is not None
    for nothing in ("pages_lost", "fetch_retries", "store_errors", "pool_connections_lost"):
        assert result.stats[nothing] == 0, nothing
    assert "lease" in server.log and "'alice'" in server.log
    all_gone(folder)


@pytest.mark.parametrize("mode", ["child", "grand", "malloc", "thread"])
def test_fork(mode: str, server: Server, folder: Path) -> None:
    """A child's engine has connections of its own, through the same agent."""
    result = run_farmem([compile_c("forks"), mode], local="32M", options=options(server, folder))
    assert_ok(result)
    assert_paged(result.stats, 1000, 1000)
    assert result.stats is not None and result.stats["forks"] >= 1, result.stats


@pytest.mark.parametrize("verifies", [True, False])
def test_other_servers(verifies: bool, folder: Path, tmp_path: Path) -> None:
    """nbds:// is any NBD server's export with TLS, whether it wants to know us or not."""
    with tls_nbdkit(tmp_path, folder, verifies=verifies) as other:
        result = run_farmem(
            [compile_c("verify"), "2", "96", "2"],
            local="48M",
            options=(*other.options, "--tls-certificates", str(folder)),
        )
    assert_ok(result)
    assert_paged(result.stats, 1000, 1000)


@pytest.mark.parametrize("offers", ["off", "require"])
@pytest.mark.parametrize("kind", ["tcp", "nbd"])
def test_on_takes_what_is_offered(kind: str, offers: str, folder: Path, tmp_path: Path) -> None:
    def run(url: str) -> bool:
        """Whether TLS was used."""
        with start_farmem(
            [compile_c("endless"), str(tmp_path / "stop")],
            local="32M",
            options=("--pool", url, *tls_words(folder, "on")),
        ) as job:
            job.await_out("ready")
            is_used = bool(agents(folder))
            (tmp_path / "stop").touch()
            assert_ok(job.finish(LIMIT_S))
        return is_used

    if kind == "tcp":
        words = tls_words(folder) if offers == "require" else ()
        with serving(*words, capacity="512M", listens=["127.0.0.1:0"]) as serve:
            assert run(f"tcp://127.0.0.1:{serve.port}") == (offers == "require")
    else:
        with tls_nbdkit(tmp_path, folder, offers) as other:
            assert run(f"nbd://127.0.0.1:{other.port}/") == (offers == "require")


def test_a_program_with_regions(folder: Path, tmp_path: Path) -> None:
    """The Python API takes the same words, and says what is wrong with them."""
    script = (
        "import sys, farmem\n"
        "words = dict(pool=sys.argv[1], tls_certificates=sys.argv[2])\n"
        "try:\n"
        "    farmem.Budget('16M', pool=words['pool'])\n"
        "except farmem.FarmemError as error:\n"
        "    print(error.what)\n"
        "region = farmem.Region(64 << 20, budget=farmem.Budget('16M', **words))\n"
        "view = region.view()\n"
        "for at in range(0, len(view), 4096):\n"
        "    view[at:at + 8] = at.to_bytes(8, 'little')\n"
        "print(all(view[at:at + 8] == at.to_bytes(8, 'little')"
        " for at in range(0, len(view), 4096)), region.stats().remote_bytes > 32 << 20)\n"
    )
    with tls_nbdkit(tmp_path, folder) as other:
        done = subprocess.run(
            [sys.executable, "-c", script, other.url, str(folder)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=LIMIT_S,
        )
    assert done.returncode == 0, done.stderr
    refusal, verdict = done.stdout.splitlines()
    assert "needs certificates" in refusal and verdict == "True True"
    all_gone(folder)


# ---- what can be seen on the way


@pytest.mark.parametrize("scheme", ["nbd", "nbds"])
def test_pages_are_not_readable_on_the_way(scheme: str, folder: Path, tmp_path: Path) -> None:
    """The twin without TLS shows that the marker would be seen."""
    with tls_nbdkit(tmp_path, folder, "on") as other:
        wire = Wire(other.port)
        url = f"{scheme}://127.0.0.1:{wire.port}/"
        certificates = ("--tls-certificates", str(folder)) if scheme == "nbds" else ()
        result = run_farmem(
            [sys.executable, "-c", MARKS], local="32M", options=("--pool", url, *certificates)
        )
        wire.close()
    assert_ok(result)
    assert_paged(result.stats, 1000, 1000)
    seen = wire.bytes_seen()
    assert len(seen) > 1000 * 4096
    assert (MARKER in seen) == (scheme == "nbd")


@pytest.mark.parametrize("mode", ["off", "require"])
def test_leases_are_not_readable_on_the_way(mode: str, folder: Path) -> None:
    words = tls_words(folder, mode) if mode == "require" else ("--tls=off",)
    with serving(*words, listens=["127.0.0.1:0"]) as serve:
        wire = Wire(serve.port)
        run_farmem(
            ["true"], local="32M", options=("--pool", f"tcp://127.0.0.1:{wire.port}", *words)
        )
        wire.close()
    seen = wire.bytes_seen()
    assert len(seen) > 100
    assert (b"/v1/leases" in seen) == (b'"token"' in seen) == (mode == "off")


# ---- the server


def test_a_server_that_stands_still_or_dies_and_comes_back(folder: Path, tmp_path: Path) -> None:
    """nbdkit is stopped, goes on, is killed and started again, and what it serves lives on."""
    with (
        serving(*tls_words(folder), capacity="512M", listens=["127.0.0.1:0"]) as server,
        start_farmem(
            [compile_c("endless"), str(tmp_path / "stop")],
            local="32M",
            options=options(server, folder),
        ) as job,
    ):
        job.await_out("ready")
        before = server.nbdkit()
        os.kill(before, signal.SIGSTOP)
        job.await_err("does not answer")
        os.kill(before, signal.SIGCONT)
        job.await_err("answers again")
        os.kill(before, signal.SIGKILL)
        until(lambda: server.nbdkit() != before, "another nbdkit")
        until(lambda: is_connected(the_agent(folder)), "a connection to it")
        (tmp_path / "stop").touch()
        result = job.finish(LIMIT_S)
    assert_ok(result)
    assert result.stats is not None
    assert result.stats["pages_lost"] == 0 and result.stats["pool_connections_lost"] >= 1


# ---- the agent


def test_an_agent_that_is_killed_is_started_again(
    server: Server, folder: Path, tmp_path: Path
) -> None:
    """The program goes on with the right bytes: what was under way is asked for again."""
    with start_farmem(
        [compile_c("endless"), str(tmp_path / "stop")],
        local="32M",
        options=options(server, folder),
    ) as job:
        job.await_out("ready")
        for _ in range(5):
            before = the_agent(folder)
            os.kill(before, signal.SIGKILL)
            until(lambda before=before: agents(folder) not in ([], [before]), "another agent")
            until(lambda: is_connected(the_agent(folder)), "an engine's connection")
        (tmp_path / "stop").touch()
        result = job.finish(LIMIT_S)
    assert_ok(result)
    assert b"farmem-tls has ended; it is started again" in result.stderr
    assert result.stats is not None
    assert result.stats["pages_lost"] == 0 and result.stats["pool_connections_lost"] >= 1
    all_gone(folder)


def test_an_agent_that_stands_still_is_waited_for(
    server: Server, folder: Path, tmp_path: Path
) -> None:
    with start_farmem(
        [compile_c("endless"), str(tmp_path / "stop")],
        local="32M",
        options=options(server, folder),
    ) as job:
        job.await_out("ready")
        pid = the_agent(folder)
        os.kill(pid, signal.SIGSTOP)
        job.await_err("does not answer")
        os.kill(pid, signal.SIGCONT)
        job.await_err("answers again")
        (tmp_path / "stop").touch()
        result = job.finish(LIMIT_S)
    assert_ok(result)
    assert result.stats is not None and result.stats["pages_lost"] == 0


def test_a_job_without_its_supervisor_goes_on(server: Server, folder: Path, tmp_path: Path) -> None:
    """The agent stays as long as an engine is connected to it, and no longer."""
    with start_farmem(
        [compile_c("endless"), str(tmp_path / "stop")],
        local="32M",
        options=options(server, folder),
    ) as job:
        job.await_out("ready")
        pid = the_agent(folder)
        os.kill(job.supervisor(), signal.SIGKILL)
        until(lambda: the_agent(folder) == pid, "the same agent")
        (tmp_path / "stop").touch()
        assert_ok(job.finish(LIMIT_S, wait_stats_s=0))
    all_gone(folder)


def test_nothing_is_left_when_all_others_are_killed(
    server: Server, folder: Path, tmp_path: Path
) -> None:
    with start_farmem(
        [compile_c("endless"), str(tmp_path / "stop")],
        local="32M",
        options=options(server, folder),
    ) as job:
        job.await_out("ready")
        the_agent(folder)
        os.kill(job.supervisor(), signal.SIGKILL)
        os.kill(job.process.pid, signal.SIGKILL)
        all_gone(folder)


def test_the_agent_has_nothing_of_the_callers(server: Server, folder: Path, tmp_path: Path) -> None:
    """No descriptor (a pipe's reader waits for its last writer), no folder, no environment; and
    nobody but root looks into it: the key is there."""
    read, write = os.pipe()
    with start_farmem(
        [compile_c("bystander"), str(tmp_path / "stop")],
        local="32M",
        options=options(server, folder),
        env={"SECRET_OF_THE_CALLER": "1"},
        pass_fds=[write],
    ) as job:
        job.await_out("ready")
        place = Path(f"/proc/{the_agent(folder)}")
        held = {os.readlink(fd) for fd in (place / "fd").iterdir()}
        kinds = {name.partition(":")[0] for name in held}
        assert kinds <= {"socket", "anon_inode"}, held
        assert set((place / "environ").read_bytes().split(b"\0")) == {
            b"PATH=" + os.defpath.encode(), b"LC_ALL=C", b"",
        }  # fmt: skip
        assert os.readlink(place / "cwd") == "/"
        assert os.stat(place / "environ").st_uid == 0
        (tmp_path / "stop").touch()
        assert_ok(job.finish(LIMIT_S))
    os.close(write)
    os.close(read)


@pytest.mark.root
def test_the_agent_serves_its_user_alone(server: Server, folder: Path, tmp_path: Path) -> None:
    """Its address stands in /proc/net/unix; the kernel says who connects."""
    script = (
        "import socket, sys\n"
        "sock = socket.socket(socket.AF_UNIX)\n"
        "sock.connect('\\0' + sys.argv[1])\n"
        "print(len(sock.recv(18)))\n"
    )
    with start_farmem(
        [compile_c("bystander"), str(tmp_path / "stop")],
        local="32M",
        options=options(server, folder),
    ) as job:
        job.await_out("ready")
        [name] = set(re.findall(r"@(farmem-tls-\S+)", Path("/proc/net/unix").read_text()))
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(f"\0{name}")
            assert sock.recv(18)[:8] == b"NBDMAGIC"
        done = subprocess.run(
            [*as_user("nobody", ()), "/usr/bin/python3", "-c", script, name],
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
            timeout=LIMIT_S,
        )
        assert done.stdout == "0\n", done
        (tmp_path / "stop").touch()
        assert_ok(job.finish(LIMIT_S))
