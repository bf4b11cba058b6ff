"""The job of a program that has regions and was not started by `farmem run`.

A Python program may have threads, so its supervisor is not forked from it: another
interpreter is started, makes the job, forks the supervisor, answers with the way to it and
ends.  The supervisor is nobody's child; it ends when the program does.
"""

import json
import os
import subprocess
import sys
from typing import Any

from farmem.errors import FarmemError

_HINT = "see that Python can be started from here, and try again"


def start_job(wanted: dict[str, Any]) -> str:
    """Start a job and its supervisor for this process; NAME:TOKEN, the way to it."""
    if not sys.executable:
        raise FarmemError(
            "the supervisor can't be started: Python does not know its program", _HINT
        )
    request = {**wanted, "pid": os.getpid(), "command": sys.orig_argv}
    try:
        try:
            answer = _ask(sys.executable, request)
        except PermissionError:
            # The program has given up privileges since it was started, and lies where it can't
            # reach any more; the kernel still knows it.
            answer = _ask("/proc/self/exe", request)
    except (OSError, ValueError) as error:
        raise FarmemError(f"the supervisor could not be started: {error}", _HINT) from error
    if "what" in answer:
        raise FarmemError(answer["what"], answer["hint"])
    return str(answer["job"])


def _ask(executable: str, request: dict[str, Any]) -> dict[str, str]:
    """Start the other interpreter; it finds its modules where we found ours."""
    folders = [path or os.getcwd() for path in sys.path]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "farmem.regionjob"],
        executable=executable,
        input=json.dumps(request).encode(),
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)},
        start_new_session=True,
        check=False,
    )
    answer: dict[str, str] = json.loads(done.stdout)
    return answer


def _request(wanted: dict[str, Any]) -> Any:
    """What `farmem run` would have made of the same words; an error names what is wrong."""
    from farmem import _native, checks
    from farmem.filters import parse_filters
    from farmem.job import DEFECTS_VARIABLE, EVICT_VARIABLE, Request
    from farmem.pools import join_pools, parse_pool
    from farmem.tls import parse_tls

    checks.check_budget(wanted["budget_bytes"], 'farmem.Region(size, local="16M")')
    defects, evict_mode = 0, _native.lib.FM_EVICT_AUTO
    if DEFECTS_VARIABLE in os.environb or EVICT_VARIABLE in os.environb:
        from farmem.cli import run

        defects = run._defects_from(dict(os.environb))
        evict_mode = run._evict_mode_from(dict(os.environb))
    return Request(
        command=tuple(wanted["command"]),
        budget_bytes=wanted["budget_bytes"],
        pool=join_pools([parse_pool(url) for url in wanted["pools"]]),
        filters=parse_filters(tuple(wanted["filters"])),
        stats_path="",
        quiet=wanted["quiet"],
        no_pinned_io=wanted["no_pinned_io"],
        userfaultfd_way=checks.check_userfaultfd(wanted["no_pinned_io"], for_regions=True).way,
        defects=defects,
        evict_mode=evict_mode,
        tls=parse_tls(wanted["tls"], wanted["tls_certificates"]),
        rdma_device=wanted["rdma_device"],
        rdma_gid_index=_gid_index_of(wanted["rdma_gid_index"]),
    )


def _gid_index_of(given: object) -> int | None:
    if given is None or (type(given) is int and 0 <= given <= 255):
        return given
    raise FarmemError(
        f"rdma_gid_index is {given!r}, not a number from 0 to 255", "leave it out: one is chosen"
    )


def _start(wanted: dict[str, Any]) -> str:
    from farmem.job import Job
    from farmem.supervisor import Launch, supervise

    pid = wanted["pid"]
    pidfd = os.pidfd_open(pid)
    job = Job(_request(wanted))
    if os.getppid() != pid:
        job.pool.discard()
        raise FarmemError("the program that asked for a budget has ended meanwhile")
    # Nobody calls a job off that has no command: its end of the pipe is closed by our own.
    called_off, call_off = os.pipe()
    ready, tell_ready = os.pipe()
    if os.fork() == 0:
        os.close(call_off)
        os.close(ready)
        supervise(job, Launch(pid, pidfd, called_off, tell_ready))
    os.close(tell_ready)
    if not os.read(ready, 1):
        raise FarmemError("the supervisor could not be started", "try again")
    return f"{job.name}:{job.token.hex()}"


def main() -> None:
    """Read what is wanted from stdin, write the answer to stdout, leave the supervisor behind."""
    try:
        answer = {"job": _start(json.load(sys.stdin))}
    except FarmemError as error:
        answer = {"what": error.what, "hint": error.hint}
    except OSError as error:
        answer = {"what": f"the supervisor can't be started: {error}", "hint": _HINT}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
