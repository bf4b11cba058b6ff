"""`farmem stat` and `farmem set` against a real supervisor with an engine played in Python.

Both sides are tried: the supervisor with rude and strange clients (it holds the userfaultfds
of a job, so nothing that anybody says may stop it), the client with supervisors that are
stopped, crowded or not what they seem.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from farmem import _native, cli, running
from farmem.errors import FarmemError
from farmem.rates import rates_between
from farmem.wire import ANSWER, ANSWER_SEALS
from tests.harness import as_user
from tests.unit.started import (
    LIMIT_SECONDS,
    ONE_PROCESS,
    ROOT,
    TWO_PROCESSES,
    Start,
    Started,
    farmem,
    wait_until,
)

MIB = 1 << 20
lib = _native.lib

# Tells each budget that it sees; ends with stdin.
TELLS_BUDGET = """
import select
e = Engine().hello(); seen = 0
while not select.select([0], [], [], 0.005)[0]:
    now = e.control.budget_bytes
    if now != seen:
        seen = now; print(now, flush=True)
"""


# ---- what is told --------------------------------------------------------------------------


def test_a_job_is_told_by_any_of_its_processes(start: Start) -> None:
    job = start(TWO_PROCESSES).wait_ready()
    status = running.status_of(job.pid)
    members = {member["pid"]: member for member in status["members"]}
    assert status["job"] == job.name
    assert status["uid"] == os.geteuid()
    assert len(members) == 2
    for pid in (*members, status["supervisor_pid"]):
        assert running.status_of(pid)["job"] == job.name
    assert Path(f"/proc/{status['supervisor_pid']}/comm").read_text() == "farmem-job\n"


def test_the_figures_are_the_processes(start: Start) -> None:
    job = start(TWO_PROCESSES).wait_ready()
    status = running.status_of(job.pid)
    first = next(member for member in status["members"] if member["pid"] == job.pid)
    other = next(member for member in status["members"] if member["pid"] != job.pid)
    assert first["state"] == "adopted"
    assert other["state"] == "watched"
    assert first["command"] == Path(f"/proc/{job.pid}/comm").read_text().strip()
    assert (first["local_bytes"], first["remote_bytes"]) == (50 * MIB, 9 * MIB)
    assert (first["managed_bytes"], first["engine_bytes"]) == (60 * MIB, MIB)
    assert (first["faults"], other["faults"]) == (7, 30)
    assert (status["local_bytes"], status["remote_bytes"]) == (57 * MIB, 9 * MIB)
    assert (status["faults"], status["pages_fetched"], status["stall_ns"]) == (37, 300, 5)
    assert status["peak_local_bytes"] >= 57 * MIB
    assert (status["budget_bytes"], status["budget_changes"]) == (64 * MIB, 0)


def test_what_has_ended_still_counts_and_the_names_are_those_of_the_statistics(
    start: Start,
) -> None:
    job = start(
        "e = Engine().hello()\n"
        "if os.fork() == 0: c = Engine().hello(); c.proc.counters.pages_fetched = 5; os._exit(0)\n"
        "os.wait(); e.proc.counters.pages_fetched = 6\n"
        "while e.control.procs[e.slot + 1].state: time.sleep(0.01)\n"
        "os.close(1); sys.stdin.read()\n"
    ).wait_ready()
    status = running.status_of(job.pid)
    assert len(status["members"]) == 1
    assert (status["pages_fetched"], status["processes"]) == (11, 2)
    stats = job.finish()
    assert stats["pages_fetched"] == 11
    assert set(stats) - set(status) == {"exit_known"}
    assert all(type(status[name]) is type(stats[name]) for name in stats if name in status)


def test_every_name_in_the_json_is_documented(start: Start) -> None:
    job = start(TWO_PROCESSES).wait_ready()
    document = json.loads(farmem("stat", str(job.pid), "--json").stdout)
    [status] = document["jobs"]
    counters = {name for name, _ in _native.ffi.typeof("struct fm_counters").fields}
    names = {*document, *status, *status["rates"], *status["members"][0]} - counters
    text = (ROOT / "docs" / "running-jobs.md").read_text()
    assert [name for name in sorted(names) if f"`{name}`" not in text] == []


def test_rates_are_differences_over_the_time_between() -> None:
    names = ("faults", "pages_fetched", "pages_evicted", "bytes_in", "bytes_out", "stall_ns")
    earlier = {"wall_ns": 5_000_000_000, **dict.fromkeys(names, 100)}
    later = {"wall_ns": 7_000_000_000, **dict.fromkeys(names, 300), "stall_ns": 1_000_000_100}
    rates = rates_between(earlier, later)
    assert rates is not None
    assert rates["interval_ns"] == 2_000_000_000
    assert rates["faults_per_second"] == rates["bytes_out_per_second"] == 100.0
    assert rates["stalled_share"] == 0.5
    assert rates_between(later, later) is None


def test_no_secret_is_told(start: Start) -> None:
    """The token and the secret of the hashes: neither as such nor in hex; and the descriptor
    that comes is not the job's memory, and can't be written to."""
    script = "e = Engine().hello(); open(sys.argv[1], 'wb').write(bytes(e.control.secret))\n"
    path = f"/tmp/farmem-test-secret-{os.getpid()}"
    job = start(script + "os.close(1); sys.stdin.read()\n", path).wait_ready()
    secret = Path(path).read_bytes()
    os.unlink(path)
    with job.connect() as sock:
        sock.send(b'{"ask": "status"}')
        _, [fd], _, _ = socket.recv_fds(sock, 64, 4)
    text = os.pread(fd, 1 << 20, 0)
    assert b"wall_ns" in text and any(secret)
    for hidden in (bytes.fromhex(job.token), secret, secret[:16]):
        assert hidden not in text
        assert hidden.hex().encode() not in text
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"x", 0)
    os.close(fd)


# ---- setting the budget --------------------------------------------------------------------


def test_a_budget_that_is_set_is_the_engines_and_the_statistics_say_so(start: Start) -> None:
    job = start(TELLS_BUDGET)
    assert job.process.stdout is not None
    seen = [int(job.process.stdout.readline())]
    for size, said in (("96M", "was 64.0 MiB, is 96.0 MiB"), ("32M", "was 96.0 MiB, is 32.0 MiB")):
        done = farmem("set", str(job.pid), f"local={size}")
        assert (done.returncode, done.stderr) == (0, "")
        assert said in done.stdout
        seen.append(int(job.process.stdout.readline()))
    assert seen == [64 * MIB, 96 * MIB, 32 * MIB]
    status = running.status_of(job.pid)
    assert (status["budget_bytes"], status["budget_changes"]) == (32 * MIB, 2)
    stats = job.finish()
    assert (stats["budget_bytes"], stats["budget_peak_bytes"]) == (32 * MIB, 96 * MIB)
    assert stats["budget_changes"] == 2


def test_a_budget_that_the_job_itself_changes_is_told_too(start: Start) -> None:
    script = ONE_PROCESS.replace("os.close", "e.control.budget_bytes = 80 << 20; os.close", 1)
    job = start(script).wait_ready()
    wait_until(lambda: running.status_of(job.pid)["budget_changes"] == 1)
    assert running.set_budget(job.name, 32 * MIB) == (80 * MIB, 32 * MIB)
    stats = job.finish()
    assert (stats["budget_peak_bytes"], stats["budget_changes"]) == (80 * MIB, 2)


def test_the_summary_says_that_the_budget_was_changed(start: Start) -> None:
    script = ONE_PROCESS.replace("os.close", "e.proc.counters.pages_evicted = 5; os.close", 1)
    job = start(script).wait_ready()
    running.set_budget(job.name, 32 * MIB)
    running.set_budget(job.name, 32 * MIB)
    assert job.finish()["budget_changes"] == 1
    assert "64.0 MiB budget at most (changed while it ran, 32.0 MiB budget at the end)" in job.said


@pytest.mark.parametrize("size_bytes", [16 * MIB - 1, 0, -5, 1 << 63, 1 << 200])
def test_the_supervisor_itself_refuses_a_budget_that_can_not_be(
    start: Start, size_bytes: int
) -> None:
    job = start(ONE_PROCESS).wait_ready()
    with pytest.raises(FarmemError):
        running.set_budget(job.name, size_bytes)
    assert running.status_of(job.pid)["budget_bytes"] == 64 * MIB


@pytest.mark.parametrize(
    ("words", "named", "hint"),
    [
        (["set", "PID", "local=1M"], "1.0 MiB", "farmem set PID local=16M"),
        (["set", "PID", "local=12Q"], "'12Q'", "512M"),
        (["set", "PID", "local"], "'local'", "local=2G"),
        (["set", "PID", "colour=red"], "'colour'", "settings are: local"),
        (["set", "PID", "local=1G", "local=2G"], "twice", "local=2G"),
        (["set", "PID"], "nothing to set", "local=2G"),
        (["set", "me", "local=1G"], "'me'", "1234"),
        (["set", "1", "local=1G"], "process 1 ", "farmem stat"),
        (["stat", "0"], "'0'", "1234"),
        (["stat", "99999999"], "no process 99999999", "farmem stat"),
        (["stat", "1"], "process 1 (", "farmem run"),
        (["stat", "--watch", "1234"], "'1234'", "PID --watch"),
        (["stat", "--watch=nan"], "'nan'", "--watch 2"),
    ],
)
def test_a_mistake_gets_a_sentence_a_hint_and_a_status(
    words: list[str], named: str, hint: str, start: Start
) -> None:
    job = start(ONE_PROCESS).wait_ready()
    done = farmem(*(str(job.pid) if word == "PID" else word for word in words))
    assert (done.returncode, done.stdout) == (125, "")
    assert done.stderr.startswith("farmem: ")
    assert len(done.stderr.splitlines()) == 2
    assert named in done.stderr
    assert hint in done.stderr
    assert running.status_of(job.pid)["budget_bytes"] == 64 * MIB


# ---- who may ---------------------------------------------------------------------------------

ASKS_AS_STRANGER = """
import json, socket, sys
for question in ({"ask": "status"}, {"ask": "set", "budget_bytes": 1 << 30}):
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(20)
    sock.connect("\\0" + sys.argv[1])
    sock.send(json.dumps(question).encode())
    data, fds, _, _ = socket.recv_fds(sock, 4096, 4)
    print(data.hex(), len(fds))
"""


@pytest.mark.root
def test_another_user_is_refused_by_the_supervisor(start: Start) -> None:
    """Not only by good manners of `farmem stat`: a program of its own asks."""
    job = start(ONE_PROCESS).wait_ready()
    python = "/usr/bin/python3"
    if not os.path.exists(python):
        python = os.path.realpath(sys.executable)
    command = [*as_user("daemon", ()), python, "-I", "-S", "-c", ASKS_AS_STRANGER, job.name]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/", timeout=60)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 2
    for data, fds in lines:
        _, _, kind = struct.unpack_from("QII", bytes.fromhex(data))
        assert (kind, fds) == (lib.FM_WIRE_REFUSED, "0")
    assert running.status_of(job.pid)["budget_bytes"] == 64 * MIB


@pytest.mark.root
def test_another_user_sees_and_sets_nothing(start: Start) -> None:
    job = start(ONE_PROCESS).wait_ready()
    stranger = tuple(as_user("daemon", ()))
    listed = farmem("stat", "--json", prefix=stranger)
    assert listed.returncode == 0, listed.stderr
    assert json.loads(listed.stdout)["jobs"] == []
    for words in (("stat", str(job.pid)), ("set", str(job.pid), "local=1G")):
        done = farmem(*words, prefix=stranger)
        assert (done.returncode, done.stdout) == (125, "")
        assert f"process {job.pid}" in done.stderr
        assert "another user's" in done.stderr
    assert running.status_of(job.pid)["budget_bytes"] == 64 * MIB


@pytest.mark.root
def test_in_a_user_namespace_nobody_is_not_trusted() -> None:
    """Users that the namespace does not know look like nobody there; so do we ourselves."""
    code = "import os; from farmem.answers import may_ask; print(os.geteuid(), may_ask(65534))"
    inside = subprocess.run(
        ["unshare", "--user", sys.executable, "-c", code],
        capture_output=True, text=True, check=True, cwd=ROOT, timeout=60,
    )  # fmt: skip
    assert inside.stdout == "65534 False\n"
    command = [*as_user("nobody", ()), sys.executable, "-c", code]
    outside = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=60
    )
    assert outside.stdout == "65534 True\n"


# ---- rude clients ------------------------------------------------------------------------------

RUBBISH = [
    b"{",
    b"{}",
    b'{"ask": "status", "more": 1}',
    b'{"ask": ["status"]}',
    b'{"ask": "set"}',
    b'{"ask": "set", "budget_bytes": true}',
    b'{"ask": "set", "budget_bytes": 1e9}',
    b'{"ask": "set", "budget_bytes": "1G"}',
    b'{"ask": "set", "budget_bytes": NaN}',
    b'{"ask": "set", "budget_bytes": 99999999999, "token": 1}',
    b'{"ask": "set", "budget_bytes": ' + b"9" * 900 + b"}",
    b'{"a":' * 200,
    b'{"ask": "\xff\xfe"}',
    b'{"ask": "status"}' + b" " * 2000,
    b"{" * 100_000,
]


def still_well(job: Started) -> None:
    """The supervisor answers, and nothing has been changed."""
    status = running.status_of(job.pid)
    assert status["budget_bytes"] == 64 * MIB
    assert len(status["members"]) == 1


def test_rubbish_is_answered_or_cut_off_and_the_job_goes_on(start: Start) -> None:
    job = start(ONE_PROCESS).wait_ready()
    for rubbish in RUBBISH:
        with job.connect() as sock:
            sock.send(rubbish)
            data, fds, _, _ = socket.recv_fds(sock, 4096, 4)
            if data:
                assert data == ANSWER
                assert "error" in json.loads(os.pread(fds[0], 65536, 0))
            for fd in fds:
                os.close(fd)
    still_well(job)


def test_random_messages_change_nothing(start: Start) -> None:
    job = start(ONE_PROCESS).wait_ready()
    rng = random.Random(7)
    alphabet = b'{}[]":,0123456789asktubdge_ \x00\xff'
    for _ in range(300):
        head = rng.choice([b"", b"{", b'{"ask":', b"farmem\0\0"])
        body = bytes(rng.choices(alphabet, k=rng.randrange(1, 1500)))
        with job.connect() as sock, contextlib.suppress(ConnectionError):
            sock.send(head + body)
    still_well(job)


def test_descriptors_with_a_question_are_closed_and_the_question_is_not_answered(
    start: Start,
) -> None:
    job = start(ONE_PROCESS).wait_ready()
    read_end, write_end = os.pipe()
    with job.connect() as sock:
        socket.send_fds(sock, [b'{"ask": "status"}'], [write_end] * 5)
        os.close(write_end)
        assert sock.recv(100) == b""
    assert os.read(read_end, 1) == b""
    os.close(read_end)
    still_well(job)


def test_clients_that_go_or_never_read_do_not_hold_the_supervisor(start: Start) -> None:
    job = start(ONE_PROCESS).wait_ready()
    kept = []
    for n in range(200):
        sock = job.connect()
        with contextlib.suppress(ConnectionError, BrokenPipeError):
            for _ in range(3):
                sock.send(b'{"ask": "status"}')
        if n % 2:
            sock.close()
        else:
            kept.append(sock)
    still_well(job)
    for sock in kept:
        sock.close()


def test_silent_clients_do_not_use_up_the_supervisors_descriptors(start: Start) -> None:
    """Far more of them than are kept; an engine can join all the same, and what they held
    is free again."""
    script = (
        "e = Engine().hello(); os.close(1)\n"
        "sys.stdin.readline(); Engine().hello(); open(sys.argv[1], 'w').close(); sys.stdin.read()\n"
    )
    mark = f"/tmp/farmem-test-joined-{os.getpid()}"
    job = start(script, mark).wait_ready()
    supervisor = running.status_of(job.pid)["supervisor_pid"]
    before = len(os.listdir(f"/proc/{supervisor}/fd"))
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(job.connect()) for _ in range(600)]
        assert job.process.stdin is not None
        job.process.stdin.write(b"join\n")
        job.process.stdin.flush()
        wait_until(lambda: os.path.exists(mark))
        os.unlink(mark)
        still_well(job)
        held = len(os.listdir(f"/proc/{supervisor}/fd")) - before
        assert held < 200, f"{held} descriptors are held for clients that said nothing"
        assert silent[0].recv(1) == b""  # the oldest was cut off
    wait_until(lambda: len(os.listdir(f"/proc/{supervisor}/fd")) <= before + 2)


# ---- supervisors that are not well -------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "ANSWER_SECONDS", 0.3)


@contextlib.contextmanager
def stopped(job: Started) -> Iterator[int]:
    supervisor: int = running.status_of(job.pid)["supervisor_pid"]
    os.kill(supervisor, signal.SIGSTOP)
    try:
        wait_until(lambda: ") T" in Path(f"/proc/{supervisor}/stat").read_text())
        yield supervisor
    finally:
        os.kill(supervisor, signal.SIGCONT)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("words", [["stat", "PID"], ["stat"], ["set", "PID", "local=1G"]])
def test_a_stopped_supervisor_is_named(
    words: list[str], start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    job = start(ONE_PROCESS).wait_ready()
    with stopped(job) as supervisor:
        assert cli.main([str(job.pid) if word == "PID" else word for word in words]) == 125
        error = capsys.readouterr().err
    assert f"(process {supervisor}) does not answer: it is stopped" in error
    assert f"kill -CONT {supervisor}" in error
    still_well(job)


@pytest.mark.usefixtures("impatient")
def test_a_stopped_supervisor_does_not_hide_the_other_jobs(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    job, other = start(ONE_PROCESS).wait_ready(), start(ONE_PROCESS).wait_ready()
    with stopped(job) as supervisor:
        assert running.status_of(other.pid)["job"] == other.name
        assert cli.main(["stat", "--json"]) == 125
    document = json.loads(capsys.readouterr().out)
    assert other.name in [each["job"] for each in document["jobs"]]
    [silent] = [each for each in document["unanswered"] if each["job"] == job.name]
    assert silent["supervisor_pid"] == supervisor


@pytest.mark.usefixtures("impatient")
def test_a_supervisor_that_takes_no_more_connections_is_named(start: Start) -> None:
    job = start(ONE_PROCESS).wait_ready()
    with stopped(job) as supervisor:
        crowd = []
        for _ in range(1000):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            sock.setblocking(False)
            crowd.append(sock)
            if sock.connect_ex(f"\0{job.name}"):
                break
        with pytest.raises(FarmemError, match="takes no connections: it is stopped") as raised:
            running.ask_one(job.name, {"ask": "status"})
        assert f"(process {supervisor})" in raised.value.what
    for sock in crowd:
        sock.close()
    still_well(job)


def sealed(text: bytes, seals: int = ANSWER_SEALS) -> int:
    fd = os.memfd_create("answer", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.write(fd, text)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def huge() -> int:
    fd = os.memfd_create("answer", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.ftruncate(fd, 1 << 40)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, ANSWER_SEALS)
    return fd


def good_status() -> bytes:
    sizes = {
        "faults": 1,
        "local_bytes": 2,
        "remote_bytes": 3,
        "managed_bytes": 4,
        "engine_bytes": 5,
    }
    member = {"pid": 1, "command": "x", "state": "adopted", **sizes}
    counted = ("wall_ns", "budget_bytes", "pool_stored_bytes", "pages_fetched", "pages_evicted",
               "bytes_in", "bytes_out", "stall_ns")  # fmt: skip
    status = {"command": ["x"], "pool": "mem:", "members": [member], **sizes}
    return json.dumps({**status, **dict.fromkeys(counted, 6)}).encode()


LIES: dict[str, tuple[bytes, Callable[[], int] | None]] = {
    "another word": (b"hello", None),
    "no descriptor": (ANSWER, None),
    "a pipe": (ANSWER, lambda: os.pipe()[0]),
    "a file": (ANSWER, lambda: os.open("/proc/self/status", os.O_RDONLY)),
    "no seals": (ANSWER, lambda: sealed(good_status(), 0)),
    "not JSON": (ANSWER, lambda: sealed(b"\xff{")),
    "too deep": (ANSWER, lambda: sealed(b"[" * 200_000)),
    "a list": (ANSWER, lambda: sealed(b"[]")),
    "nothing in it": (ANSWER, lambda: sealed(b"{}")),
    "wrong types": (ANSWER, lambda: sealed(b'{"wall_ns": "x", "members": [1]}')),
    "huge": (ANSWER, huge),
    "silence": (b"", None),
}


def told_by(word: bytes, make: Callable[[], int] | None) -> running.Round:
    """What is made of such an answer.  Anybody can listen under such a name; we do."""
    name = f"farmem-{random.getrandbits(64):016x}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"\0{name}")
        listener.listen(4)
        child = os.fork()
        if child == 0:
            try:
                sock, _ = listener.accept()
                sock.recv(1000)
                if word:
                    socket.send_fds(sock, [word], [make()] if make else [])
                time.sleep(LIMIT_SECONDS)
            finally:
                os._exit(0)
        before = sorted(os.listdir("/proc/self/fd"))
        found = running.statuses([name])
        after = sorted(os.listdir("/proc/self/fd"))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert before == after
    return found


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("lie", list(LIES))
def test_a_false_supervisor_is_not_believed(lie: str) -> None:
    found = told_by(*LIES[lie])
    assert found.answers == []
    assert len(found.silent) == 1
    assert (found.silent[0].supervisor_pid, found.silent[0].uid) == (os.getpid(), os.geteuid())


def test_a_right_answer_is_believed_but_not_about_who_gave_it() -> None:
    """Without this, the test above could pass for a reason of its own."""
    found = told_by(ANSWER, lambda: sealed(good_status()))
    assert found.silent == []
    assert found.answers[0]["pages_fetched"] == 6
    assert (found.answers[0]["supervisor_pid"], found.answers[0]["uid"]) == (
        os.getpid(),
        os.geteuid(),
    )


def test_a_job_that_has_ended_is_no_error() -> None:
    assert running.statuses(["farmem-0000000000000000"]) == ([], [])
    with pytest.raises(FarmemError, match="has ended"):
        running.set_budget("farmem-0000000000000000", 64 * MIB)


def test_nothing_that_a_terminal_would_obey_is_printed() -> None:
    assert running.printable("ls\x1b[31m\n\x9b\u202e\udc80 ok é") == "ls?[31m???? ok é"
