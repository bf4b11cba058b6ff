"""Where an option's value comes from: command line, FARMEM_VERB_OPTION, files, default.

One name in three spellings: `farmem run --no-pinned-io`, FARMEM_RUN_NO_PINNED_IO, and
`no-pinned-io` under [run].  click does the looking-up and knows where a value came from;
here the files are put where it looks (a context's default_map), and an error is told
together with the place that its value comes from.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import click
from click.core import ParameterSource

from farmem import config
from farmem.errors import FarmemError

if TYPE_CHECKING:
    from farmem.registry import Registry

PREFIX = "FARMEM_"
CONFIG_VARIABLE = "FARMEM_CONFIG"
INTERNAL_VARIABLES = ("FARMEM_JOB", "FARMEM_TEST_")
# Verbs about the configuration are not configured: they must work where it is wrong.
NOT_CONFIGURED = frozenset({"config", "completion"})
COMMAND_LINE = "command"
_EXAMPLES = {"size": "4G", "pool": "mem:8G", "filter": "delay:rtt=10us", "time": "30s"}
_URLS = ("pool", "registry")  # types of options that hold URLs
_KINDS = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "a section",
}


class Origin(NamedTuple):
    """Where a value came from: `command line`, `environment`, `file` or `default`, and which."""

    source: str
    where: str


class Parsed(click.ParamType):  # type: ignore[type-arg]  # not generic in older click
    """A type of option whose text one of our parsers reads; an error says where it is from.

    Its name (`size`, `pool`, `filter`, `time`, `path`) decides how it is completed: see words.py.
    """

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The text, parsed."""
        try:
            return self._parse(value)
        except FarmemError as error:
            origin = origin_of(ctx, param) if ctx and param else Origin("", "")
            where = f"{key_of(param)} in " if param and origin.source == "file" else ""
            what = f"{error.what} ({where}{origin.where})" if origin.where else error.what
            raise FarmemError(what, error.hint, error.status) from error

    def split_envvar_value(self, rv: str) -> list[str]:
        """Several values in one variable: pools begin with a scheme, and a path can hold spaces."""
        if self.name not in _URLS:
            return list(super().split_envvar_value(rv))
        from farmem.pools import SCHEMES, SERVER_SCHEMES

        schemes = "|".join(map(re.escape, [*SCHEMES, *SERVER_SCHEMES]))
        return re.split(rf"\s+(?=(?:{schemes}):)", rv.strip())

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[Any]:
        """What could stand here, as far as it is known."""
        from farmem.cli.words import complete

        return complete(self.name, incomplete)


def parse_registry(url: str) -> "Registry":
    """An option that names a registry."""
    from farmem import registry

    return registry.parse_registry(url)


class CommandLine(click.Command):
    """A verb that ends in another command's line: once that has begun, no option is ours."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The parameters; of those only the command's words while these are being completed."""
        params = super().get_params(ctx)
        if ctx.resilient_parsing and ctx.params.get("words"):
            return [param for param in params if param.name == "words"]
        return params

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[Any]:
        """Our options, or the command's."""
        if ctx.params.get("words"):
            return complete_words(ctx, self.params[-1], incomplete)
        return super().shell_complete(ctx, incomplete)


def complete_words(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
    """The shell completes another command's line itself: it is told how many words are there."""
    from click.shell_completion import CompletionItem

    return [CompletionItem(str(len(ctx.params.get("words") or ())), type=COMMAND_LINE)]


class Files:
    """The configuration files, read when they are first asked for."""

    def __init__(self, named: str = "") -> None:
        self.places = config.places(os.environ, named)

    @cached_property
    def documents(self) -> list[config.Document]:
        """What is there, the file that counts most first."""
        found = [document for place in self.places if (document := config.load(place))]
        for document in found:
            check_sections(document)
        return found


class Defaults(Mapping[str, Any]):
    """What the files say for a verb, by parameter, in the place where click looks (default_map).

    They are read when a value is first asked for: `--help` works where they are wrong.
    """

    def __init__(self, verb: str, command: click.Command, files: Files) -> None:
        self.verb = verb
        self.options = configurable(verb, command)
        self._keys = {option.name: key for key, option in self.options.items()}
        self._files = files

    @cached_property
    def _found(self) -> dict[str, tuple[Any, config.Document]]:
        check_variables(self.verb, list(self.options))
        found: dict[str, tuple[Any, config.Document]] = {}
        for document in reversed(self._files.documents):
            for key, value in document.tables.get(self.verb, {}).items():
                found[key] = (_checked(document, self.verb, self.options, key, value), document)
        return found

    def where(self, name: str) -> str:
        """The file and the line of a parameter's value."""
        key = self._keys[name]
        return self._found[key][1].where(self.verb, key)

    def __getitem__(self, name: str) -> Any:
        """A value.  In resilient mode click completes words, or writes the help: no files then."""
        context = click.get_current_context(silent=True)
        if name not in self._keys or (context is not None and context.resilient_parsing):
            raise KeyError(name)
        return self._found[self._keys[name]][0]

    def __iter__(self) -> Iterator[str]:
        return (self.options[key].name or "" for key in self._found)

    def __len__(self) -> int:
        return len(self._found)


def variable_of(verb: str, key: str) -> str:
    """The environment variable of an option."""
    return f"{PREFIX}{verb}_{key}".upper().replace("-", "_")


def key_of(option: click.Parameter) -> str:
    """What an option is called in a file: its long name, without the hyphens before it."""
    return max(option.opts, key=len).lstrip("-")


def configurable(verb: str, command: click.Command) -> dict[str, click.Option]:
    """The options of a verb that can be configured, by their key; click is told the variables."""
    found: dict[str, click.Option] = {}
    if verb in NOT_CONFIGURED or isinstance(command, click.Group):
        return found
    for option in command.params:
        if isinstance(option, click.Option) and option.expose_value and not option.hidden:
            key = key_of(option)
            found[key] = option
            option.envvar = variable_of(verb, key)
    return found


def example_of(option: click.Option) -> str:
    """A line of a file that sets an option."""
    key, value = key_of(option), f'"{(option.metavar or "...").strip("[]")}"'
    if option.is_flag:
        value = "true"
    elif isinstance(option.type, click.Choice):
        value = f'"{next(iter(option.type.choices))}"'
    elif _is_number(option):
        value = "1"
    elif option.type.name in _EXAMPLES:
        value = f'"{_EXAMPLES[option.type.name]}"'
    return f"{key} = [{value}]" if option.multiple else f"{key} = {value}"


def kind_of(option: click.Option) -> str:
    """What a file must give for an option, in words."""
    if option.is_flag:
        return _KINDS[bool]
    return "a list of strings" if option.multiple else _KINDS[int if _is_number(option) else str]


def _is_number(option: click.Option) -> bool:
    numbers = click.types.IntParamType | click.types.FloatParamType
    return option.count or isinstance(option.type, numbers)


def _takes(option: click.Option, value: Any) -> bool:
    """Whether a value of a file is of the type that an option wants: bytes can be a number."""
    if option.is_flag or isinstance(value, bool):
        return option.is_flag and isinstance(value, bool)
    if isinstance(option.type, click.types.FloatParamType):
        return isinstance(value, int | float)
    if _is_number(option):
        return isinstance(value, int)
    return isinstance(value, str) or (option.type.name == "size" and isinstance(value, int))


def _nearest(word: str, known: list[str]) -> str:
    import difflib

    near = difflib.get_close_matches(word, known, 1)
    return f"did you mean {near[0]}? " if near else ""


def _checked(
    document: config.Document, verb: str, options: dict[str, click.Option], key: str, value: Any
) -> Any:
    """A value of a file as click wants it, or an error that says what to write."""
    if key not in options:
        known = ", ".join(sorted(options))
        hint = f"{_nearest(key, list(options))}options of {verb}: {known or 'none'}"
        raise FarmemError(f"{document.where(verb, key)}: [{verb}] has no {key!r}", hint)
    option = options[key]
    items = value if option.multiple and isinstance(value, list) else [value]
    if not all(_takes(option, item) for item in items):
        kinds = [_KINDS.get(type(item), "a date or a time") for item in (value, *items)]
        is_ = kinds[0] if len(items) == 1 or not isinstance(value, list) else "a mixed list"
        what = f"{document.where(verb, key)}: {key} is {is_}, and must be {kind_of(option)}"
        raise FarmemError(what, f"write: {example_of(option)}")
    if isinstance(option.type, Parsed):
        items = [str(item) for item in items]
    return items if option.multiple else items[0]


def check_sections(document: config.Document) -> None:
    """A file holds sections only, each with the name of a verb."""
    from farmem.cli import VERBS

    verbs = [verb for verb in VERBS if verb not in NOT_CONFIGURED]
    for name, table in document.tables.items():
        if name in verbs and isinstance(table, dict):
            continue
        known = ", ".join(f"[{verb}]" for verb in verbs)
        what, hint = (
            f"there is no section [{name}]",
            f"{_nearest(name, verbs)}sections are: {known}",
        )
        if not isinstance(table, dict):
            what, hint = f"{name!r} stands in no section", f"write it below its section: {known}"
        raise FarmemError(f"{document.where(name, '')}: {what}", hint)


def check_variables(verb: str, keys: list[str]) -> None:
    """A variable that begins with the verb's name, or lacks just that, is meant for us.

    Others that begin with FARMEM_ are left alone: images and scripts use such names.
    """
    known = {variable_of(verb, key) for key in keys}
    bare = {name.replace(variable_of(verb, ""), PREFIX): name for name in known}
    for name in os.environ:
        if name.startswith(INTERNAL_VARIABLES) or name in known:
            continue
        if name.startswith(variable_of(verb, "")):
            hint = f"{_nearest(name, list(known))}variables are: {', '.join(sorted(known))}"
            raise FarmemError(f"the variable {name} is no option of {verb}", hint)
        if name in bare:
            raise FarmemError(f"the variable {name} names no verb", f"call it {bare[name]}")


def origin_of(context: click.Context, parameter: click.Parameter) -> Origin:
    """Where a parameter's value came from."""
    name = parameter.name or ""
    source = context.get_parameter_source(name)
    if source is ParameterSource.ENVIRONMENT:
        return Origin("environment", str(parameter.envvar))
    if source is ParameterSource.DEFAULT_MAP and isinstance(context.default_map, Defaults):
        return Origin("file", context.default_map.where(name))
    return Origin("command line" if source is ParameterSource.COMMANDLINE else "default", "")


def hint_for(error: click.ClickException) -> str:
    """What to type after an error that click found."""
    context: click.Context | None = getattr(error, "ctx", None)
    option = getattr(error, "param", None)
    if context is None or not isinstance(option, click.Option) or option.envvar is None:
        return f"try: {context.command_path if context else 'farmem'} --help"
    ways = ""
    if isinstance(error, click.MissingParameter):
        line = f"{example_of(option)} under [{context.info_name}] in farmem.toml"
        ways = f"give it, set {option.envvar}, or write {line}; "
    elif where := origin_of(context, option).where:
        ways = f"it comes from {where}; "
    return f"{ways}try: {context.command_path} --help"
