"""The man pages say what the options are: they are made anew and compared, and every option is
looked for in the page of its verb, apart from how the pages are made."""

import importlib.metadata
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from farmem.cli import VERBS, cli
from farmem.cli.options import configurable, variable_of

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "man"
# The tools are scripts beside each other, not a package.
sys.path.insert(0, str(ROOT / "tools"))

import man  # noqa: E402

COMMITTED = sorted(PAGES.glob("*.[1-9]"))


def command_of(verb: str) -> click.Command:
    command = cli.get_command(click.Context(cli), verb)
    assert command is not None
    return command


def options(command: click.Command) -> Iterator[click.Option]:
    """Every option of a verb, and of the verbs that it has itself."""
    for param in command.params:
        if isinstance(param, click.Option) and not param.hidden:
            yield param
    if isinstance(command, click.Group):
        for below in command.commands.values():
            yield from options(below)


def text_of(name: str) -> str:
    """A page without its markup."""
    text = (PAGES / name).read_text()
    for markup in ("\\fB", "\\fI", "\\fR", "\\&"):
        text = text.replace(markup, "")
    return text.replace("\\-", "-")


def test_the_pages_are_made_from_the_options_of_today() -> None:
    """`make man` writes them."""
    made = man.pages()
    assert {path.name for path in COMMITTED} == set(made)
    assert [path.name for path in COMMITTED if path.read_text() != made[path.name]] == []


def test_every_part_belongs_to_a_page() -> None:
    assert {path.name for path in man.PARTS.iterdir()} <= set(man.pages())


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_is_in_the_page_of_its_verb(verb: str) -> None:
    command = command_of(verb)
    text = text_of(f"farmem-{verb}.1")
    assert f"farmem-{verb}" in text_of("farmem.1")
    missing = [
        name
        for option in options(command)
        for name in (*option.opts, *option.secondary_opts)
        if f"{name}\n" not in text and f"{name} " not in text and f"{name}," not in text
    ]
    assert missing == []


@pytest.mark.parametrize("verb", VERBS)
def test_every_key_and_variable_is_in_the_pages(verb: str) -> None:
    keys = configurable(verb, command_of(verb))
    page, file_page = text_of(f"farmem-{verb}.1"), text_of("farmem.toml.5")
    assert [key for key in keys if variable_of(verb, key) not in page] == []
    section = file_page.partition(f'.SS "[{verb}]"\n')[2].partition(".SS ")[0]
    assert [key for key in keys if f"\n{key} = " not in section] == []


def test_options_before_the_verb_are_in_the_first_page() -> None:
    text = text_of("farmem.1")
    assert [name for option in cli.params for name in option.opts if f"\n{name}" not in text] == []


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.name)
def test_a_page_is_good_roff(path: Path) -> None:
    if shutil.which("groff") is None:
        pytest.skip("groff is not installed (groff-base)")
    done = subprocess.run(
        ["groff", "-man", "-ww", "-Tascii", "-P-cbou", str(path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    assert "NAME" in done.stdout
    assert "SEE ALSO" in done.stdout


def test_the_pages_are_installed_with_the_package() -> None:
    """As far as pip can: in share/man of the environment, where man(1) looks beside its bin."""
    files = importlib.metadata.files("farmem") or []
    installed = {file.name: Path(str(file.locate())) for file in files if "man" in file.parts}
    assert set(installed) == {path.name for path in COMMITTED}
    for path in COMMITTED:
        target = installed[path.name].resolve()
        assert target.parts[-3:-1] == ("man", f"man{path.suffix[1:]}")
        assert target.read_text() == path.read_text()


def test_text_is_escaped() -> None:
    assert man.escape(".TP \\n --x") == "\\&.TP \\en \\-\\-x"
    assert man.escape("'quoted'") == "\\&'quoted'"


def test_a_section_holds_what_is_made_before_what_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(man, "PARTS", tmp_path)
    (tmp_path / "farmem-x.1").write_text(".SH EXAMPLES\nlook\n.SH DESCRIPTION\nwritten\n")
    made = {"DESCRIPTION": ["made"], "NAME": ["x"]}
    text = man.page("farmem-x.1", made, ["farmem.1", "farmem-x.1"])
    body = text[text.index('.SH "NAME"') :]
    assert body == (
        '.SH "NAME"\nx\n.SH "DESCRIPTION"\nmade\n.PP\nwritten\n.SH "EXAMPLES"\nlook\n'
        '.SH "SEE ALSO"\n.BR farmem (1)\n'
    )


def test_a_new_verb_needs_nothing_but_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command("look", help="Look.\n\nTwice.", epilog="Exit status: 0 or 1.")
    @click.option("-n", "--every-way", "number", type=int, default=3, show_default=True, help="N.")
    @click.option("--json", is_flag=True, help="J.")
    @click.option("--secret", hidden=True)
    @click.argument("pid", type=int, required=False)
    def look(number: int, json: bool, secret: str, pid: int) -> None:
        """Never called."""

    module = types.ModuleType("farmem.cli.look")
    module.command = look  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "farmem.cli.look", module)
    monkeypatch.setitem(VERBS, "look", "Look at a job.")
    pages = man.pages()
    text = pages["farmem-look.1"].replace("\\-", "-")
    assert "farmem-look - look at a job\n" in text
    assert "\\fB-n\\fR, \\fB--every-way\\fR \\fIINTEGER\\fR\nN. [default: 3]" in text
    assert 'SH "EXIT STATUS"\n0 or 1.\n' in text
    assert "\\fBfarmem look\\fR [\\fIOPTIONS\\fR] \\fI[PID]\\fR\n" in text
    assert "Look.\n.PP\nTwice." in text
    assert "FARMEM_LOOK_EVERY_WAY" in text
    assert "secret" not in text
    assert "every\\-way = 1" in pages["farmem.toml.5"]
    assert "farmem\\-look (1)" in pages["farmem.1"]
