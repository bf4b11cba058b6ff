"""How an agent is started, heard, started again and ended; what the agent does is a shell's script
here."""

import os
import threading
import time
from pathlib import Path

import pytest

from farmem.agent import Agent, program_path
from farmem.errors import FarmemError

LIMIT_S = 20
# Ends when its leash does.
LISTENS = "echo ready; while read line; do echo heard $line; done"


def soon() -> float:
    return time.monotonic() + LIMIT_S


class Said:
    """Lines that come from a thread."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._more = threading.Condition()

    def __call__(self, line: str) -> None:
        with self._more:
            self._lines.append(line)
            self._more.notify_all()

    def wait_for(self, text: str, times: int = 1) -> None:
        def there() -> bool:
            return sum(text in line for line in self._lines) >= times

        with self._more:
            assert self._more.wait_for(there, LIMIT_S), (text, self._lines)


@pytest.fixture
def make(tmp_path: Path):  # noqa: ANN201
    """An agent that runs a script; all are ended behind the test."""
    made: list[Agent] = []

    def make_one(script: str, *arguments: str, fds: tuple[int, ...] = ()) -> Agent:
        path = tmp_path / "farmem-script"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        made.append(Agent(str(path), arguments, fds))
        return made[-1]

    yield make_one
    for agent in made:
        agent.stop()


def test_it_is_told_and_heard(make) -> None:  # noqa: ANN001
    agent = make(LISTENS)
    agent.start(soon())
    agent.tell("one")
    agent.tell("two")
    assert agent.hear(soon()) == "heard one"
    assert agent.hear(soon()) == "heard two"
    with pytest.raises(TimeoutError):
        agent.hear(time.monotonic())


def test_it_has_what_it_is_given_and_nothing_else(make, tmp_path: Path) -> None:  # noqa: ANN001
    script = f"""
(ls /proc/$$/fd) >{tmp_path}/fds
cat <&3 >{tmp_path}/third
(pwd; echo "$1"; grep ^SigIgn /proc/self/status; ps -o ppid=,sid= $$; env) >{tmp_path}/rest
echo $$ >{tmp_path}/pid
{LISTENS}"""
    with (tmp_path / "given").open("w+") as given, (tmp_path / "not given").open("w") as other:
        os.set_inheritable(other.fileno(), True)
        given.write("from the third")
        given.seek(0)
        agent = make(script, "an argument", fds=(given.fileno(),))
        agent.start(soon())
    fds = set((tmp_path / "fds").read_text().split())
    assert fds - {"10", "255"} == {"0", "1", "2", "3"}, "a shell keeps its script at 10 or 255"
    assert (tmp_path / "third").read_text() == "from the third"
    place, argument, ignored, ids, *environment = (tmp_path / "rest").read_text().splitlines()
    assert (place, argument) == ("/", "an argument")
    assert int(ignored.split()[1], 16) & 0x5003 == 0x5003, "SIGHUP, SIGINT, SIGPIPE, SIGTERM"
    parent, session = map(int, ids.split())
    assert os.getpid() not in (parent, session) and session != os.getsid(0)
    names = {line.partition("=")[0] for line in environment}
    assert names <= {"PATH", "LC_ALL", "PWD", "_", "SHLVL", "OLDPWD"}, environment


def test_what_it_refuses_is_an_error(make) -> None:  # noqa: ANN001
    agent = make("printf 'a word first\\nrefused\\tno key\\tmake one\\n'")
    with pytest.raises(FarmemError, match="no key") as refusal:
        agent.start(soon())
    assert refusal.value.hint == "make one"


def test_what_ends_or_says_nothing_is_an_error(make, tmp_path: Path) -> None:  # noqa: ANN001
    with pytest.raises(FarmemError, match="has ended: it broke"):
        make("echo it broke; exit 3").start(soon())
    with pytest.raises(FarmemError, match="has ended: without a word"):
        make("exit 3").start(soon())
    silent = make("sleep 1000 & echo $! >pid; wait".replace("pid", f"{tmp_path}/pid"))
    with pytest.raises(FarmemError, match="does not start"):
        silent.start(time.monotonic() + 0.3)
    os.kill(int((tmp_path / "pid").read_text()), 9)
    with pytest.raises(FarmemError, match="can't be executed"):
        Agent(str(tmp_path / "nothing"), []).start(soon())


def test_what_has_failed_can_be_asked_for(make) -> None:  # noqa: ANN001
    lines = "ready\\none\\nfailed\\tfirst\\t-\\ntwo\\nfailed\\tsecond\\thint\\n"
    agent = make(f"printf '{lines}'; read x; echo $x")
    agent.start(soon())
    agent.tell("end")
    deadline = soon()
    while (failure := agent.failure()) is None or failure.what != "second":
        assert time.monotonic() < deadline
    assert failure.hint == "hint" and agent.failure() is None
    assert [agent.hear(soon()) for _ in range(3)] == ["one", "two", "end"]


def test_it_is_started_again(make, tmp_path: Path) -> None:  # noqa: ANN001
    """And what it says is said, its failures as warnings."""
    agent = make(f"echo $$ >>{tmp_path}/pids; printf 'failed\\tit went wrong\\t-\\n'; {LISTENS}")
    agent.start(soon())
    said, heard = Said(), Said()
    agent.keep(said, heard)
    said.wait_for("warning: it went wrong")
    for number in range(1, 4):
        os.kill(int((tmp_path / "pids").read_text().split()[-1]), 9)
        said.wait_for("farmem-script has ended; it is started again", number)
        deadline = soon()
        while agent.starts <= number:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    agent.tell("once more")
    heard.wait_for("heard once more")


def test_what_it_says_is_said_and_never_too_much(make) -> None:  # noqa: ANN001
    agent = make(f"echo ready; for k in 1 2 3 4 5 6 7 8 9; do printf 'a\\033b\\n'; done; {LISTENS}")
    agent.start(soon())
    said = Said()
    agent.keep(said)
    said.wait_for("farmem-script: a?b")


def test_stop_ends_it(make, tmp_path: Path) -> None:  # noqa: ANN001
    """By the end of its leash, and if it does not listen by force."""
    for script in (LISTENS, "echo ready; exec sleep 1000"):
        agent = make(f"echo $$ >{tmp_path}/pid; {script}")
        agent.start(soon())
        said = Said()
        agent.keep(said)
        pidfd = os.pidfd_open(int((tmp_path / "pid").read_text()))
        agent.stop()
        deadline = soon()
        while Path(f"/proc/self/fdinfo/{pidfd}").read_text().split("Pid:\t")[1].split()[0] != "-1":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.close(pidfd)
        assert not said._lines


def test_a_program_that_was_not_built() -> None:
    with pytest.raises(FarmemError, match="built without farmem-nothing") as refusal:
        program_path("farmem-nothing", "libnothing-dev")
    assert "libnothing-dev" in refusal.value.hint
