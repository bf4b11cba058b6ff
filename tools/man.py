"""make man: the man pages, from the options themselves and from docs/man/parts.

A page is made for farmem, for each verb, and for farmem.toml.  What the options can't say
(environment, files, examples) stands in docs/man/parts/PAGE: man(7) source, put into the
page's section of the same name, after what is generated.  A new verb needs nothing but
`make man`; tests/unit/test_man.py compares.
"""

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import click

from farmem import __version__
from farmem.cli import VERBS, cli
from farmem.cli.options import configurable, example_of, key_of, kind_of, variable_of

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "man"
PARTS = FOLDER / "parts"
ORDER = (
    "NAME",
    "SYNOPSIS",
    "DESCRIPTION",
    "COMMANDS",
    "OPTIONS",
    "EXIT STATUS",
    "ENVIRONMENT",
    "FILES",
    "NOTES",
    "EXAMPLES",
    "SEE ALSO",
)
EXIT_STATUS = "Exit status: "
HELP_OPTION = click.Option(["-h", "--help"], is_flag=True, help="Show this message and exit.")
NOTICE = '.\\" Made by tools/man.py from the options and docs/man/parts: `make man`.'

Lines = list[str]
Sections = dict[str, Lines]


def escape(text: str) -> str:
    """Text that roff takes for text."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{text}" if text.startswith((".", "'")) else text


def bold(text: str) -> str:
    return f"\\fB{escape(text)}\\fR"


def italic(text: str) -> str:
    return f"\\fI{escape(text)}\\fR"


def prose(text: str) -> Lines:
    """Paragraphs, in lines of moderate length, so that a change is easy to see."""
    lines: Lines = []
    for paragraph in text.replace("\b", "").split("\n\n"):
        wrapped = textwrap.wrap(" ".join(paragraph.split()), 100, break_on_hyphens=False)
        lines += [".PP", *(escape(line) for line in wrapped)]
    return lines[1:]


def metavar_of(param: click.Parameter) -> str:
    """What stands for a value; click's own way of writing it differs between its versions."""
    if param.metavar:
        return param.metavar
    if isinstance(param.type, click.Choice):
        return "|".join(map(str, param.type.choices))
    if isinstance(param, click.Option):
        return param.type.name.upper()
    word = (param.name or "").upper() + ("..." if param.nargs != 1 else "")
    return word if param.required else f"[{word}]"


def option_entry(option: click.Option) -> Lines:
    """An option with its help, as an item of a list."""
    takes_value = not option.is_flag and not option.count
    value = f" {italic(metavar_of(option))}" if takes_value else ""
    names = ", ".join(bold(name) for name in (*option.opts, *option.secondary_opts))
    notes = ["It must be given, here or in the configuration."] if option.required else []
    if option.show_default and option.default not in (None, ""):
        default = " ".join(option.default) if option.multiple else option.default
        notes.append(f"[default: {default}]")
    return [".TP", names + value, *prose(" ".join([option.help or "", *notes]))]


def options_of(command: click.Command) -> list[click.Option]:
    found = [param for param in command.params if isinstance(param, click.Option)]
    return [*(option for option in found if not option.hidden), HELP_OPTION]


def options_section(command: click.Command) -> Lines:
    return [line for option in options_of(command) for line in option_entry(option)]


def synopsis(path: str, command: click.Command) -> str:
    words = [bold(path)]
    if options_of(command) != [HELP_OPTION]:
        words.append(f"[{italic('OPTIONS')}]")
    words += [italic(metavar_of(p)) for p in command.params if isinstance(p, click.Argument)]
    if isinstance(command, click.Group):
        words.append(f"{italic('COMMAND')} ...")
    return " ".join(words)


def subcommands(path: str, group: click.Group) -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if command is not None and not command.hidden:
            yield f"{path} {name}", command


def commands_section(path: str, group: click.Group) -> Lines:
    """What a verb that has verbs of its own offers: each with its options."""
    lines: Lines = []
    for name, command in subcommands(path, group):
        lines += [f".SS {synopsis(name, command)}", *prose(command.help or "")]
        lines += options_section(command)
        if isinstance(command, click.Group):
            lines += commands_section(name, command)
    return lines


def page_name(verb: str) -> str:
    return f"farmem-{verb}.1" if verb else "farmem.1"


def parts_of(name: str) -> Sections:
    """What is written by hand for a page: man(7) source under .SH headings."""
    path = PARTS / name
    sections: Sections = {}
    lines: Lines = []
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith(".SH "):
            lines = sections.setdefault(line.removeprefix(".SH ").strip('"'), [])
        else:
            lines.append(line)
    return sections


def see_also(name: str, names: list[str]) -> Lines:
    others = [other for other in names if other != name]
    words = [f".BR {escape(other[:-2])} ({other[-1]})" for other in others]
    return [f"{word}," for word in words[:-1]] + words[-1:]


def page(name: str, generated: Sections, names: list[str]) -> str:
    """A page: its sections in their order, what is generated before what is written by hand."""
    parts = parts_of(name)
    generated["SEE ALSO"] = see_also(name, names)
    titles = list(ORDER) + [title for title in parts if title not in ORDER]
    titles.sort(key=lambda title: ORDER.index(title if title in ORDER else "NOTES"))
    title, section = name.rsplit(".", 1)
    lines = [
        NOTICE,
        f'.TH "{escape(title.upper())}" "{section}" "" "farmem {__version__}" "farmem manual"',
    ]
    for heading in titles:
        body, written = generated.get(heading, []), parts.get(heading, [])
        between = [".PP"] if body and written and not written[0].startswith(".") else []
        if body or written:
            lines += [f'.SH "{heading}"', *body, *between, *written]
    return "\n".join(lines) + "\n"


def environment_section(verb: str, command: click.Command) -> Lines:
    lines: Lines = []
    for key, option in configurable(verb, command).items():
        lines += [".TP", bold(variable_of(verb, key)), *prose(f"As --{key}.")]
        if option.multiple:
            lines += prose("Several values are separated by blanks.")
        elif option.is_flag:
            lines += prose("Write 1 or 0.")
    return lines


def verb_sections(verb: str, command: click.Command) -> Sections:
    """What the command itself says of a verb."""
    path = f"farmem {verb}"
    summary = VERBS[verb].rstrip(".")
    sections: Sections = {
        "NAME": [f"farmem\\-{verb} \\- {escape(summary[0].lower() + summary[1:])}"],
        "SYNOPSIS": [synopsis(path, command)],
        "DESCRIPTION": prose(command.help or summary),
        "OPTIONS": options_section(command),
        "ENVIRONMENT": environment_section(verb, command),
    }
    if isinstance(command, click.Group):
        sections["COMMANDS"] = commands_section(path, command)
    epilog = command.epilog or ""
    if epilog.startswith(EXIT_STATUS):
        text = epilog.removeprefix(EXIT_STATUS)
        sections["EXIT STATUS"] = prose(text[:1].upper() + text[1:])
    elif epilog:
        sections["DESCRIPTION"] += [".PP", *prose(epilog)]
    return sections


def main_sections() -> Sections:
    """farmem itself: its verbs and the options before them."""
    commands: Lines = []
    for verb, summary in VERBS.items():
        commands += [".TP", f".BR farmem\\-{verb} (1)", *prose(summary)]
    return {
        "NAME": [f"farmem \\- {escape('far memory for unmodified Linux programs')}"],
        "SYNOPSIS": [synopsis("farmem", cli)],
        "COMMANDS": commands,
        "OPTIONS": options_section(cli),
    }


def file_sections(commands: dict[str, click.Command]) -> Sections:
    """farmem.toml: every key of every section."""
    lines: Lines = []
    for verb, command in commands.items():
        options = configurable(verb, command)
        if options:
            lines += [
                f'.SS "[{verb}]"',
                *prose(f"The options of farmem {verb}; see farmem-{verb}(1)."),
            ]
        for option in options.values():
            lines += [".TP", bold(example_of(option))]
            lines += prose(f"As --{key_of(option)}: {kind_of(option)}.")
    return {
        "NAME": ["farmem.toml \\- configuration of farmem"],
        "OPTIONS": lines,
    }


def pages() -> dict[str, str]:
    """Every page by its file name."""
    context = click.Context(cli)
    commands: dict[str, click.Command] = {}
    for verb in VERBS:
        command = cli.get_command(context, verb)
        assert command is not None
        commands[verb] = command
    names = ["farmem.1", *map(page_name, VERBS), "farmem.toml.5"]
    made = {"farmem.1": page("farmem.1", main_sections(), names)}
    for verb, command in commands.items():
        made[page_name(verb)] = page(page_name(verb), verb_sections(verb, command), names)
    made["farmem.toml.5"] = page("farmem.toml.5", file_sections(commands), names)
    return made


def main() -> int:
    made = pages()
    for path in FOLDER.glob("*.[1-9]"):
        if path.name not in made:
            path.unlink()
    for name, text in made.items():
        (FOLDER / name).write_text(text)
    unknown = sorted(path.name for path in PARTS.iterdir() if path.name not in made)
    if unknown:
        print(f"man: parts of no page: {', '.join(unknown)}", file=sys.stderr)
    return 1 if unknown else 0


if __name__ == "__main__":
    sys.exit(main())
