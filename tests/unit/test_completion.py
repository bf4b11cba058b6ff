"""A Tab in bash, zsh and fish, as somebody would press it.

bash and zsh run on a terminal of their own: a line is typed, then Tab, then a key that
prints the line as it now stands.  fish can be asked without one.
"""

import contextlib
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from farmem import pools
from farmem.cli import VERBS, cli
from farmem.cli.words import complete
from farmem.errors import FarmemError
from tests.harness import kill_tree

FARMEM = Path(sys.executable).with_name("farmem")
BASH_COMPLETION = Path("/usr/share/bash-completion/bash_completion")
LIMIT_SECONDS = 60
PRINT_LINE = "\x18p"  # Ctrl-X p, bound below
TOOL = "farmem-test-tool"

# What is typed, and what it is after a Tab.
LINES = [
    ("farmem ru", "farmem run "),
    ("farmem --conf", "farmem --config "),
    ("farmem completion z", "farmem completion zsh "),
    ("farmem config sh", "farmem config show "),
    ("farmem run --lo", "farmem run --local "),
    ("farmem run -q -m 12", "farmem run -q -m 12"),
    ("farmem run -m 12G --no-p", "farmem run -m 12G --no-pinned-io "),
    ("farmem run --pool m", "farmem run --pool mem:"),
    ("farmem run --pool=m", "farmem run --pool=mem:"),
    ("farmem run --pool mem:51", "farmem run --pool mem:51"),
    ("farmem run --filter del", "farmem run --filter delay:"),
    ("farmem run --filter chec", "farmem run --filter checksum "),
    ("farmem run --filter delay:rtt=1us,b", "farmem run --filter delay:rtt=1us,bandwidth="),
    ("farmem run --filter=delay:b", "farmem run --filter=delay:bandwidth="),
    ("farmem run --stats only-fi", "farmem run --stats only-file "),
    ("farmem run --stats=only-fi", "farmem run --stats=only-file "),
]
# The same where another command has begun: its words are not ours any more.
COMMAND_LINES = [
    (f"farmem run -m 1G -- {TOOL[:-2]}", f"farmem run -m 1G -- {TOOL} "),
    (f"farmem run -m 1G {TOOL[:-2]}", f"farmem run -m 1G {TOOL} "),
    (f"farmem run {TOOL} only-fi", f"farmem run {TOOL} only-file "),
]
SUBCOMMAND_LINES = [
    (f"farmem run -m 1G --filter delay:rtt=1us {TOOL} --col", " --colour "),
    (f"farmem run --pool=mem:1G -- {TOOL} -m --col", " --colour "),
    (f"farmem run 'a b' -m x; farmem run -- {TOOL} --col", " --colour "),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one file, and another in PATH with one tool."""
    here, programs = tmp_path / "here", tmp_path / "bin"
    here.mkdir()
    programs.mkdir()
    (here / "only-file").touch()
    (programs / TOOL).write_text("#!/bin/sh\n")
    (programs / TOOL).chmod(0o755)
    return here


def environment(folder: Path) -> dict[str, str]:
    path = f"{FARMEM.parent}:{folder.parent / 'bin'}:{os.environ['PATH']}"
    kept = {key: os.environ[key] for key in ("LANG", "LC_ALL") if key in os.environ}
    return {**kept, "PATH": path, "HOME": str(folder.parent), "TERM": "dumb", "PS1": "$ "}


class Terminal:
    """A shell on a terminal."""

    def __init__(self, fd: int, process: subprocess.Popen[bytes]) -> None:
        self.fd, self.process = fd, process
        self.seen = ""

    def wait(self, pattern: str) -> re.Match[str]:
        """What the shell has written, as soon as it fits; what comes before is dropped."""
        end = time.monotonic() + LIMIT_SECONDS
        while not (match := re.search(pattern, self.seen)):
            assert time.monotonic() < end, f"{pattern} did not come: {self.seen!r}"
            if select.select([self.fd], [], [], 1)[0]:
                self.seen += os.read(self.fd, 65536).decode(errors="replace")
        self.seen = self.seen[match.end() :]
        return match

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def command(self, line: str) -> None:
        """A command, to its end."""
        self.type(f"{line}; echo do''ne\n")
        self.wait("done\r\n")

    def tab(self, line: str) -> str:
        """The line after a Tab."""
        self.type(f"\x15{line}\t{PRINT_LINE}")
        return self.wait(r"<(farmem.*?)>\r?\n")[1]


@contextlib.contextmanager
def terminal(words: list[str], folder: Path) -> Iterator[Terminal]:
    if shutil.which(words[0]) is None:
        pytest.skip(f"{words[0]} is not installed")
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        words,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=folder,
        env=environment(folder),
        start_new_session=True,
    )
    os.close(theirs)
    try:
        yield Terminal(ours, process)
    finally:
        kill_tree(process)
        os.close(ours)


@contextlib.contextmanager
def bash(folder: Path, *before: str) -> Iterator[Terminal]:
    with terminal(["bash", "--norc", "--noprofile", "-i"], folder) as shell:
        for line in (
            "bind 'set enable-bracketed-paste off'",
            "bind 'set bell-style none'",
            *before,
            'eval "$(farmem completion bash)"',
            r"""bind -x '"\C-xp": printf "<%s>\n" "$READLINE_LINE"'""",
        ):
            shell.command(line)
        yield shell


@contextlib.contextmanager
def zsh(folder: Path) -> Iterator[Terminal]:
    with terminal(["zsh", "-f", "-i"], folder) as shell:
        for line in (
            "unset zle_bracketed_paste; unsetopt beep prompt_sp prompt_cr",
            "autoload -Uz compinit && compinit -u -D",
            'eval "$(farmem completion zsh)"',
            f"_tool() {{ _arguments '--colour[paint]' '*:file:_files' }}; compdef _tool {TOOL}",
            'print_line() { print -r -- "<$BUFFER>" }; zle -N print_line',
            "bindkey '^Xp' print_line",
        ):
            shell.command(line)
        yield shell


def changed(shell: Terminal, lines: list[tuple[str, str]]) -> dict[str, str]:
    """Lines that did not become what they should, with what they did become."""
    found = {line: shell.tab(line) for line, _ in lines}
    return {line: found[line] for line, wanted in lines if found[line] != wanted}


def spelled_out(lines: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(line, line.removesuffix(" --col") + rest) for line, rest in lines]


def test_bash(folder: Path) -> None:
    """bash alone: names of commands and files."""
    with bash(folder) as shell:
        assert changed(shell, LINES + COMMAND_LINES) == {}


def test_bash_with_its_completions(folder: Path) -> None:
    """With bash-completion a command's words are completed as without farmem."""
    if not BASH_COMPLETION.exists():
        pytest.skip("bash-completion is not installed")
    with bash(folder, f"source {BASH_COMPLETION}", f"complete -W '--colour' {TOOL}") as shell:
        lines = COMMAND_LINES[:2] + spelled_out(SUBCOMMAND_LINES)
        assert changed(shell, LINES + lines) == {}


def test_zsh(folder: Path) -> None:
    with zsh(folder) as shell:
        lines = [line for line in LINES if line[0] != line[1]]
        assert changed(shell, lines + COMMAND_LINES + spelled_out(SUBCOMMAND_LINES)) == {}


def test_fish(folder: Path) -> None:
    """fish answers with the words that the last one could become."""
    if shutil.which("fish") is None:
        pytest.skip("fish is not installed")
    lines = [*LINES, *COMMAND_LINES, *spelled_out(SUBCOMMAND_LINES)]
    script = f"farmem completion fish | source; complete -c {TOOL} -l colour;"
    script += "for line in $argv; complete -C $line | string replace -r '\\t.*' ''; echo '<>'; end"
    typed = [line for line, wanted in lines if line != wanted]
    done = subprocess.run(
        ["fish", "-c", script, *typed],
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        cwd=folder,
        env=environment(folder),
        check=True,
    )
    answers = [answer.split() for answer in done.stdout.split("<>\n")]
    wanted = [[after.split()[-1]] for before, after in lines if before != after]
    assert dict(zip(typed, answers, strict=False)) == dict(zip(typed, wanted, strict=True))


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_every_option_is_completed(verb: str) -> None:
    """What the shells are told is what the verb has."""
    command = cli.get_command(click.Context(cli), verb) if verb else cli
    assert command is not None
    done = subprocess.run(
        [str(FARMEM)],
        env={
            **os.environ,
            "_FARMEM_COMPLETE": "bash_complete",
            "COMP_WORDS": f"farmem {verb} --".replace("  ", " "),
        },
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=True,
    )
    offered = {line.partition(",")[2] for line in done.stdout.splitlines()}
    options = (param for param in command.params if isinstance(param, click.Option))
    known = {name for option in options if not option.hidden for name in option.opts}
    assert offered == {name for name in known if name.startswith("--")} | {"--help"}


def test_verbs_are_completed_without_importing_one() -> None:
    code = (
        "import sys, click; from farmem.cli import VERBS, cli\n"
        "found = {item.value for item in cli.shell_complete(click.Context(cli), '')}\n"
        "assert found == set(VERBS), found\n"
        "print([verb for verb in VERBS if f'farmem.cli.{verb}' in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_wrong_configuration_is_no_matter(folder: Path) -> None:
    (folder / "farmem.toml").write_text("rubbish")
    done = subprocess.run(
        [str(FARMEM)],
        env={
            **environment(folder),
            "_FARMEM_COMPLETE": "bash_complete",
            "COMP_WORDS": "farmem run --no-p",
        },
        capture_output=True,
        text=True,
        cwd=folder,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("plain,--no-pinned-io\n", "")


def values(kind: str, incomplete: str) -> list[str]:
    return [item.value for item in complete(kind, incomplete)]


def test_values_make_sense(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "sub").mkdir()
    assert values("size", "3") == ["3M", "3G", "3T"]
    assert values("size", "1.5") == ["1.5M", "1.5G", "1.5T"]
    assert "64M" in values("size", "")
    assert values("size", "x") == []
    assert values("pool", "mem:3") == ["mem:3M", "mem:3G", "mem:3T"]
    assert values("pool", "nosuch:") == []
    monkeypatch.setitem(pools.SCHEMES, "file", "a file")
    servers = [f"{scheme}://" for scheme in pools.SERVER_SCHEMES]
    assert values("pool", "") == [*(f"{scheme}:" for scheme in pools.SCHEMES), *servers]
    assert values("pool", "nbd") == ["nbd://", "nbds://", "nbd+unix://"]
    assert values("pool", "tcp://") == []
    assert values("pool", f"unix://{folder}/o") == [f"unix://{folder}/only-file"]
    assert values("pool", "file:") == ["file:/", "file:./"]
    assert values("pool", "file:./") == ["file:./only-file", "file:./sub/"]
    assert values("pool", "file:4G:./s") == ["file:4G:./sub/"]
    assert values("filter", "delay:rtt=1us,") == ["delay:rtt=1us,bandwidth="]
    assert values("filter", "error:fetch=0.1") == []
    assert values("filter", "nosuch:") == []
    assert values("pool", "file:nosuch/") == []
    assert values("nosuch", "") == []


def test_every_pool_that_is_known_is_completed() -> None:
    with pytest.raises(FarmemError) as error:
        pools.parse_pool("nosuch:")
    schemes = set(re.findall(r"\b([a-z]+):(?=[A-Z,]|\s\()", error.value.hint))
    assert "mem" in schemes
    assert schemes <= set(pools.SCHEMES)
    assert set(re.findall(r"([a-z+]+)://", error.value.hint)) == set(pools.SERVER_SCHEMES)
