"""Finding the jobs that run on this host, and asking their supervisors.

A job is found by the name of its socket, which /proc/net/unix tells to everybody; who made
the socket is the kernel's word.  Nothing is asked of other users' jobs, but by root.  An
answer may come from anybody's process, so it is not trusted: it lies in a sealed memfd, so
reading it can't block, its size is bounded, its types are checked, and a supervisor that
says nothing is given up after a while.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import select
import socket
import time
from typing import Any, NamedTuple

from farmem.errors import FarmemError
from farmem.wire import ANSWER, ANSWER_SEALS, credentials_of

ANSWER_SECONDS = 5.0
_NOT_UNDERSTOOD = "gave an answer that is not understood"
_ANSWER_BYTES_MAX = 16 << 20
_CONNECT_AGAIN_SECONDS = 0.02
# /proc/net/unix: the flag of a socket that listens, "unconnected", the inode, the name.
_LISTENING = re.compile(r" 00010000 \S+ 01 +(\d+) @(farmem-[0-9a-f]{16})$", re.MULTILINE)

# What an answer to "status" must hold, by its types; further names may be there.
_MEMBER_SHAPE: dict[str, type] = {
    "pid": int,
    "command": str,
    "state": str,
    "faults": int,
    "local_bytes": int,
    "remote_bytes": int,
    "managed_bytes": int,
    "engine_bytes": int,
}
_COUNTED = (
    "wall_ns", "budget_bytes", "local_bytes", "remote_bytes", "managed_bytes", "engine_bytes",
    "pool_stored_bytes", "faults", "pages_fetched", "pages_evicted", "bytes_in", "bytes_out",
    "stall_ns",
)  # fmt: skip
_STATUS_SHAPE: dict[str, type] = {
    "command": list,
    "pool": str,
    "members": list,
    **dict.fromkeys(_COUNTED, int),
}


class Silent(NamedTuple):
    """A job whose supervisor did not answer, or not so that it could be understood."""

    job: str
    uid: int
    supervisor_pid: int
    reason: str

    def error(self) -> FarmemError:
        """What to say about it, and what to do."""
        what = f"the supervisor of {self.job} (process {self.supervisor_pid}) {self.reason}"
        if _is_stopped(self.supervisor_pid):
            return FarmemError(f"{what}: it is stopped", f"type: kill -CONT {self.supervisor_pid}")
        return FarmemError(what, "try again, and with the version of farmem that started the job")


def _is_stopped(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(") ")[2][:1] in ("T", "t")
    except OSError:
        return False


class _Call:
    """One question to one supervisor."""

    def __init__(self, job: str) -> None:
        self.job = job
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.setblocking(False)
        self.pid = self.uid = 0
        self.answer: dict[str, Any] | None = None

    def begin(self, question: bytes, deadline: float) -> bool:
        """Connect and ask; False: there is nobody to ask, or nobody that we may ask.
        TimeoutError: no more connections are taken."""
        while True:
            code = self.sock.connect_ex(f"\0{self.job}")
            if code == 0:
                break
            if code != errno.EAGAIN:
                return False  # the job has ended
            if time.monotonic() > deadline:
                raise TimeoutError
            time.sleep(_CONNECT_AGAIN_SECONDS)  # many come at once
        self.pid, self.uid = credentials_of(self.sock)
        if self.pid == 0 or os.geteuid() not in (0, self.uid):
            return False
        try:
            self.sock.send(question, socket.MSG_NOSIGNAL)
        except OSError:
            return False
        return True

    def end(self) -> str:
        """Take the answer; what is wrong with it, if anything."""
        try:
            flags = socket.MSG_CMSG_CLOEXEC
            data, fds, _, _ = socket.recv_fds(self.sock, len(ANSWER) + 1, 1, flags)
        except OSError:
            data, fds = b"", []
        try:
            if data == ANSWER and len(fds) == 1:
                self.answer = _document(fds[0])
                return "" if self.answer is not None else _NOT_UNDERSTOOD
        finally:
            for fd in fds:
                os.close(fd)
        return "refuses to answer" if data else ""  # nothing: the job has ended

    def about(self) -> dict[str, Any]:
        """What is known of the job by the kernel's word."""
        return {"job": self.job, "uid": self.uid, "supervisor_pid": self.pid}

    def silent(self, reason: str) -> Silent:
        """What to say when there is no answer."""
        return Silent(self.job, self.uid, self.pid, reason)


def _document(fd: int) -> dict[str, Any] | None:
    """The answer in a memfd.  Other kinds of files could block, or change while they are read:
    only a memfd has seals."""
    try:
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & ANSWER_SEALS != ANSWER_SEALS:
            return None
        size_bytes = os.fstat(fd).st_size
        if size_bytes > _ANSWER_BYTES_MAX:
            return None
        document = json.loads(os.pread(fd, size_bytes, 0))
    except (OSError, ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def has_shape(document: dict[str, Any], shape: dict[str, type]) -> bool:
    """Whether each name is there and has its type."""
    return all(type(document.get(name)) is kind for name, kind in shape.items())


def is_status(answer: dict[str, Any]) -> bool:
    """Whether an answer holds what `farmem stat` relies on."""
    return (
        has_shape(answer, _STATUS_SHAPE)
        and all(isinstance(word, str) for word in answer["command"])
        and all(isinstance(m, dict) and has_shape(m, _MEMBER_SHAPE) for m in answer["members"])
    )


def _sockets() -> dict[str, str]:
    """The names of all jobs of this network namespace (abstract sockets are of one), and the
    inodes of their sockets."""
    with open("/proc/net/unix", encoding="ascii", errors="replace") as file:
        return {name: inode for inode, name in _LISTENING.findall(file.read())}


def _crowded(job: str) -> list[Silent]:
    """A job that takes no more connections: its supervisor, if it is ours to know."""
    link = f"socket:[{_sockets().get(job)}]"
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            with open(f"/proc/{pid}/comm", "rb") as file:
                if file.read() != b"farmem-job\n":
                    continue
            folder = f"/proc/{pid}/fd"
            if any(os.readlink(f"{folder}/{fd}") == link for fd in os.listdir(folder)):
                return [Silent(job, os.stat(folder).st_uid, int(pid), "takes no connections")]
    return []


class Round(NamedTuple):
    """What came of asking several supervisors at once."""

    answers: list[dict[str, Any]]
    silent: list[Silent]


def ask(jobs: list[str], question: dict[str, Any]) -> Round:
    """Ask the jobs that are ours to ask.  Jobs that have ended answer nothing, and are no error.

    Each answer is given the job's name, and uid and pid of the supervisor as the kernel tells
    them.
    """
    deadline = time.monotonic() + ANSWER_SECONDS
    text = json.dumps(question).encode()
    answers: list[dict[str, Any]] = []
    silent: list[Silent] = []
    with contextlib.ExitStack() as stack:
        waiting: dict[int, _Call] = {}
        poll = select.poll()
        for job in jobs:
            call = _Call(job)
            stack.callback(call.sock.close)
            try:
                if call.begin(text, deadline):
                    waiting[call.sock.fileno()] = call
                    poll.register(call.sock, select.POLLIN)
            except TimeoutError:
                silent += _crowded(job)
        while waiting:
            left = deadline - time.monotonic()
            ready = poll.poll(left * 1000) if left > 0 else []
            if not ready:
                silent += [call.silent("does not answer") for call in waiting.values()]
                break
            for fd, _ in ready:
                poll.unregister(fd)
                call = waiting.pop(fd)
                reason = call.end()
                if reason:
                    silent.append(call.silent(reason))
                elif call.answer is not None:
                    answers.append({**call.about(), **call.answer, **call.about()})
    return Round(answers, silent)


def ask_one(job: str, question: dict[str, Any]) -> dict[str, Any] | None:
    """The answer of one job; None: it has ended.  A refusal is an error."""
    answers, silent = ask([job], question)
    if silent:
        raise silent[0].error()
    if not answers:
        return None
    answer = answers[0]
    if isinstance(answer.get("error"), str):
        raise FarmemError(answer["error"], str(answer.get("hint", "")))
    return answer


def statuses(jobs: list[str] | None = None) -> Round:
    """How these jobs stand, or all that are ours to see."""
    found = ask(list(_sockets()) if jobs is None else jobs, {"ask": "status"})
    answers, silent = [], found.silent
    for each in found.answers:
        if is_status(each):
            answers.append(each)
        else:
            silent.append(Silent(each["job"], each["uid"], each["supervisor_pid"], _NOT_UNDERSTOOD))
    return Round(sorted(answers, key=lambda each: (-each["wall_ns"], each["job"])), silent)


def parse_pid(text: str, example: str) -> int:
    """A process id as it was typed."""
    if not (text.isascii() and text.isdigit()) or int(text) == 0:
        raise FarmemError(f"{text!r} is not a process id", f"type: {example}")
    return int(text)


def status_of(pid: int) -> dict[str, Any]:
    """How the job stands that a process belongs to (its supervisor counts as one, too)."""
    found = statuses()
    for status in found.answers:
        if pid in (status["supervisor_pid"], *(member["pid"] for member in status["members"])):
            return status
    for silent in found.silent:
        error = silent.error()
        if pid == silent.supervisor_pid:
            raise error
        raise FarmemError(f"process {pid} is in no job that answers, and {error.what}", error.hint)
    raise _no_job_of(pid)


def _no_job_of(pid: int) -> FarmemError:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            name = printable(file.read().rstrip("\n"))
        uid = os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return FarmemError(f"there is no process {pid}", "type: farmem stat, to see what runs")
    if os.geteuid() not in (0, uid):
        return FarmemError(
            f"process {pid} ({name}) is another user's",
            "only that user and root may look at its job, or change it",
        )
    return FarmemError(
        f"process {pid} ({name}) is in no farmem job of yours",
        "type: farmem stat, to see your jobs; a program joins one at its start: farmem run",
    )


def set_budget(job: str, size_bytes: int) -> tuple[int, int]:
    """Change the budget of a job: what it was, and what it is."""
    answer = ask_one(job, {"ask": "set", "budget_bytes": size_bytes})
    if answer is None:
        raise FarmemError(f"{job} has ended", "there is nothing to change any more")
    if not has_shape(answer, {"budget_bytes": int, "budget_before_bytes": int}):
        raise FarmemError(f"{job} did not say what it did", "type: farmem stat, to see its budget")
    return answer["budget_before_bytes"], answer["budget_bytes"]


def printable(text: str) -> str:
    """Text of somebody else's, with nothing in it that a terminal would obey."""
    return "".join(ch if ch.isprintable() else "?" for ch in text)
