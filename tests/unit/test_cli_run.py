"""`farmem run` as it is typed: its errors, and that the command sees nothing of farmem.

Each run is a process of its own, because a good one ends in exec.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from farmem import __version__, checks

FARMEM = str(Path(sys.executable).with_name("farmem"))
LIMIT_SECONDS = 60
START = ("-m", "64M")


def farmem(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [FARMEM, *arguments],
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
        **options,  # type: ignore[call-overload]
    )


@pytest.mark.parametrize(
    ("arguments", "status", "named", "hint"),
    [
        ([], 125, "'-m'", "farmem run --help"),
        (["-m", "12Q", "true"], 125, "'12Q'", "512M"),
        (["-m", "1M", "true"], 125, "1.0 MiB", "-m 16M"),
        (["-m", "64M"], 125, "no command", "farmem run -m 1G -- CMD"),
        (["--nosuch", "-m", "64M", "true"], 125, "--nosuch", "--help"),
        ([*START, "--pool", "rdma://rack7", "true"], 125, "rdma://rack7", "mem:"),
        ([*START, "--pool", "mem:100000T", "true"], 125, "can't be opened", "mem:8G"),
        ([*START, "--pool", "mem:20T", "true"], 125, "can address", "mem:8G"),
        ([*START, "--pool", "tcp://rack7", "true"], 125, "no port", "tcp://rack7:PORT"),
        ([*START, "--pool-timeout", "1ms", "true"], 125, "'1ms'", "30s"),
        ([*START, "--pool-timeout", "2", "true"], 125, "'2' is not a time", "1s"),
        ([*START, "--filter", "zip", "true"], 125, "'zip'", "checksum"),
        ([*START, "--stats", "/nosuch/stats.json", "true"], 125, "/nosuch", "--stats"),
        ([*START, "--stats", "/dev/null", "true"], 125, "/dev/null", "--stats"),
        ([*START, "--", "nosuch-command"], 127, "nosuch-command", "PATH"),
        ([*START, "--", "/etc/passwd"], 126, "/etc/passwd", "chmod"),
        ([*START, "--", "/"], 126, "folder", "program"),
    ],
)
def test_a_mistake_gets_a_sentence_a_hint_and_a_status(
    arguments: list[str], status: int, named: str, hint: str
) -> None:
    done = farmem("run", *arguments)
    assert done.returncode == status
    assert done.stdout == ""
    assert done.stderr.startswith("farmem: ")
    assert named in done.stderr
    assert hint in done.stderr
    assert len(done.stderr.splitlines()) == 2


def test_too_few_descriptors_are_told_before_anything_is_begun() -> None:
    words = f"ulimit -n 18; exec {FARMEM} run -m 64M -- true"
    done = subprocess.run(["sh", "-c", words], capture_output=True, text=True, check=False)
    assert done.returncode == 125
    assert "more files may be open here" in done.stderr and "ulimit -n 1024" in done.stderr
    assert len(done.stderr.splitlines()) == 2


def test_the_mistake_of_a_test_is_named_too() -> None:
    done = farmem("run", *START, "true", env={**os.environ, "FARMEM_TEST_DEFECTS": "copy_pinned,x"})
    assert done.returncode == 125
    assert "'x'" in done.stderr
    assert "no_duplicate" in done.stderr
    done = farmem("run", *START, "true", env={**os.environ, "FARMEM_TEST_EVICT": "x"})
    assert done.returncode == 125


def test_a_job_in_a_job_is_refused() -> None:
    done = farmem("run", *START, "true", env={**os.environ, "FARMEM_JOB": "a:b"})
    assert done.returncode == 125
    assert "already" in done.stderr


def test_an_unknown_verb_is_named() -> None:
    done = farmem("frob")
    assert done.returncode == 125
    assert "frob" in done.stderr


def test_help_and_version() -> None:
    assert farmem("--version").stdout == f"farmem {__version__}\n"
    assert "run" in farmem("--help").stdout
    assert farmem().stdout == farmem("--help").stdout
    verb = farmem("run", "--help").stdout
    for word in ("--local", "--pool", "--filter", "--stats", "--no-pinned-io", "125"):
        assert word in verb


def test_nothing_heavy_is_imported_on_the_way_to_the_command() -> None:
    """The module that `farmem run` imports, and what the supervisor adds to it."""
    code = (
        "import sys, farmem.cli.run, farmem.supervisor\n"
        "heavy = {'numpy', 'numba', 'psutil', 'asyncio', 'logging', 'ctypes', 'cffi'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.uffd
@pytest.mark.move
class TestExec:
    """What becomes of the command."""

    def test_the_exit_status_is_the_commands(self) -> None:
        assert farmem("run", *START, "--", "sh", "-c", "exit 7").returncode == 7

    def test_a_deadly_signal_is_the_commands(self) -> None:
        done = farmem("run", *START, "--", "sh", "-c", "kill -TERM $$")
        assert done.returncode == -signal.SIGTERM

    def test_input_output_and_words_are_the_commands(self) -> None:
        done = farmem("run", *START, "sh", "-c", 'cat; echo "$0 $1" >&2', "-m", "-q", input="hello")
        assert (done.stdout, done.stderr) == ("hello", "-m -q\n")

    def test_a_script_without_an_interpreter_line_runs_in_the_shell(self, tmp_path: Path) -> None:
        path = tmp_path / "script"
        path.write_text('echo "ran $1"\n')
        path.chmod(0o755)
        assert farmem("run", *START, str(path), "well").stdout == "ran well\n"

    def test_a_file_that_nothing_can_execute_is_126(self, tmp_path: Path) -> None:
        path = tmp_path / "rubbish"
        path.write_bytes(b"\0rubbish\0")
        path.chmod(0o755)
        done = farmem("run", *START, str(path))
        assert done.returncode == 126
        assert "Exec format error" in done.stderr

    def test_the_process_state_is_as_without_farmem(self, tmp_path: Path) -> None:
        """Signals, umask, folder, descriptors, limits, priority, groups: one program tells all."""
        code = (
            "import os, resource, signal\n"
            "status = open('/proc/self/status').read().splitlines()\n"
            "kept = ('SigBlk', 'SigIgn', 'Umask', 'Uid', 'Gid', 'Groups', 'NoNewPrivs', 'CapEff')\n"
            "print([line for line in status if line.startswith(kept)])\n"
            "print(os.getcwd(), os.nice(0), resource.getrlimit(resource.RLIMIT_NOFILE))\n"
            "print(os.getpgid(0) == os.getpid(), os.getsid(0))\n"
            "print(sorted(os.listdir('/proc/self/fd')))\n"
            "print(open(f'/proc/self/task/{os.getpid()}/children').read())\n"
        )
        program = [sys.executable, "-I", "-c", code]
        outputs = []
        for prefix in ([], [FARMEM, "run", *START, "--"]):
            shell = "umask 027; trap '' USR1; exec 9</dev/null; exec \"$@\""
            command = ["sh", "-c", shell, "sh", *prefix, *program]
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                check=False,
                timeout=LIMIT_SECONDS,
                cwd=tmp_path,
            )
            assert done.returncode == 0, done.stderr
            outputs.append(done.stdout)
        assert outputs[0] == outputs[1]
        assert "0027" in outputs[0]

    def test_the_signals_that_python_ignores_are_not_ignored_in_the_command(self) -> None:
        """Not asked of a Python program: it ignores SIGPIPE and SIGXFSZ by itself."""
        program = ("grep", "^Sig[BI]", "/proc/self/status")
        plain = subprocess.run(program, capture_output=True, text=True, check=True)
        assert farmem("run", *START, "--", *program).stdout == plain.stdout

    def test_the_environment_gains_two_words_and_no_more(self) -> None:
        """In a C locale Python adds LC_CTYPE to its own environment: not to the command's."""
        plain = {"PATH": os.environ["PATH"], "LC_ALL": "", "ODD": "a=b\nc"}
        done = farmem("run", *START, "--", "env", "-0", env=plain)
        pairs = dict(word.split("=", 1) for word in done.stdout.split("\0") if word)
        name, token = pairs.pop("FARMEM_JOB").split(":")
        assert name.startswith("farmem-")
        assert len(token) == 32
        assert pairs.pop("LD_PRELOAD") == checks.library_path()
        assert pairs == plain

    def test_a_preloaded_library_of_the_users_is_kept(self) -> None:
        other = "libSegFault-of-nobody.so"
        done = farmem("run", *START, "--", "env", env={**os.environ, "LD_PRELOAD": other})
        assert f"LD_PRELOAD={checks.library_path()}:{other}\n" in done.stdout
