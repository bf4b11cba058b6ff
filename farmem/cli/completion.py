"""farmem completion: how bash, zsh and fish learn to complete farmem's words.

click answers what can stand where.  The scripts are ours, because CMD and what follows
is another command's line: the shell completes it as if it stood alone.  They also
leave a word open where more can follow (`mem:`, `delay:rtt=`), and in bash a word may
hold colons.
"""

import io
import os
import shlex
import sys

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    FishComplete,
    ShellComplete,
    ZshComplete,
    add_completion_class,
    get_completion_class,
)

from farmem.cli.options import COMMAND_LINE

SHELLS = ("bash", "zsh", "fish")

_BASH = r"""# bash completion for farmem: eval "$(farmem completion bash)"
%(complete_func)s() {
    local response line value
    mapfile -t response < <(env COMP_WORDS="${COMP_LINE:0:COMP_POINT}" \
        COMP_WORDBREAKS="$COMP_WORDBREAKS" %(complete_var)s=bash_complete "$1" 2>/dev/null)
    COMPREPLY=()
    for line in "${response[@]}"; do
        value=${line#*,}
        case ${line%%%%,*} in
            command) %(complete_func)s_command "$value" ;;
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
            plain)
                COMPREPLY+=("$value")
                [[ $value == *[:=,/] ]] && compopt -o nospace
                ;;
        esac
    done
    return 0
}

# Completes the command that begins so many characters before the cursor.
%(complete_func)s_command() {
    local rest=${COMP_LINE:0:COMP_POINT} index=0
    while ((index < COMP_CWORD && ${#rest} > $1)); do
        rest=${rest#*"${COMP_WORDS[index]}"}
        rest=${rest#"${rest%%%%[![:space:]]*}"}
        ((++index))
    done
    if declare -F _command_offset >/dev/null; then
        _command_offset "$index"
    elif ((index == COMP_CWORD)); then
        mapfile -t COMPREPLY < <(compgen -c -- "${COMP_WORDS[COMP_CWORD]}")
    else
        compopt -o default
    fi
}

complete -o nosort -F %(complete_func)s %(prog_name)s
"""

_ZSH = r"""#compdef %(prog_name)s
# zsh completion for farmem: eval "$(farmem completion zsh)", after compinit

%(complete_func)s() {
    local -a response plain open described
    local type key help
    (( ! $+commands[%(prog_name)s] )) && return 1

    response=("${(@f)$(env COMP_WORDS="${words[*]}" COMP_CWORD=$((CURRENT-1)) \
%(complete_var)s=zsh_complete %(prog_name)s 2>/dev/null)}")

    # In --option=value the value alone is completed.
    [[ $PREFIX == -*=* && ${response[1]} != command ]] && compset -P 1 '*='

    for type key help in ${response}; do
        case $type in
            command)
                shift $((CURRENT - 1 - key)) words
                ((CURRENT = key + 1))
                _normal
                return
                ;;
            dir) _path_files -/ ;;
            file) _path_files -f ;;
            plain)
                if [[ $key == *[:=,/] ]]; then
                    open+=("${key//\\:/:}")
                elif [[ $help == _ ]]; then
                    plain+=("$key")
                else
                    described+=("$key:$help")
                fi
                ;;
        esac
    done

    (( $#described )) && _describe -V unsorted described
    (( $#open )) && compadd -S '' -V unsorted -a open
    (( $#plain )) && compadd -V unsorted -a plain
    return 0
}

if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    %(complete_func)s "$@"
else
    compdef %(complete_func)s %(prog_name)s
fi
"""

_FISH = r"""# fish completion for farmem: farmem completion fish | source
function %(complete_func)s
    set -l response (env COMP_WORDS=(commandline -cp | string collect) \
        %(complete_var)s=fish_complete %(prog_name)s 2>/dev/null)
    # In --option=value the value is completed, and the candidates hold both.
    set -l head (commandline -ct | string match -r -- '^-[^=]*='; or echo '')
    set -l value (commandline -ct | string replace -r -- '^-[^=]*=' '')
    for completion in $response
        set -l metadata (string split -m 1 "," -- $completion)
        switch $metadata[1]
            case command
                complete -C "$metadata[2]"
            case dir
                string join \n -- $head(__fish_complete_directories "$value")
            case file
                string join \n -- $head(__fish_complete_path "$value")
            case plain
                printf "%%s\n" $head$metadata[2]
        end
    end
end

complete --no-files --keep-order --command %(prog_name)s --arguments "(%(complete_func)s)"
"""


class _Line:
    """The line up to the cursor, as bash and fish give it: in one piece, quotes and all."""

    def __init__(self) -> None:
        self.text = os.environ.get("COMP_WORDS", "")
        # A mark at the cursor ends the word that is being typed, also an empty one.
        self._source = io.StringIO(f"{self.text}\0")
        self._lexer = shlex.shlex(self._source, posix=True)
        self._lexer.whitespace_split = True
        self._lexer.commenters = ""
        self.words: list[str] = []
        self.starts: list[int] = []
        self._split()
        self.incomplete = self.words.pop() if self.words else ""

    def _split(self) -> None:
        while True:
            rest = self.text[self._source.tell() :]
            start = len(self.text) - len(rest.lstrip())
            try:
                word = self._lexer.get_token()
            except ValueError:  # a quote that is still open
                word = self._lexer.token
            if word is None:
                return
            self.starts.append(start)
            self.words.append(word.rstrip("\0"))
            if "\0" in word:
                return

    def tail(self, words: int) -> str:
        """The end of the line, from the beginning of so many words before the one being typed."""
        return self.text[self.starts[len(self.words) - words] :]


class _Bash(BashComplete):
    source_template = _BASH

    @staticmethod
    def _check_version() -> None:
        """Not looked for: the script may be for another bash than the one in PATH."""

    def get_completion_args(self) -> tuple[list[str], str]:
        self.line = _Line()
        breaks = os.environ.get("COMP_WORDBREAKS", "")
        value = self.line.incomplete
        if value.startswith("-"):
            value = value.partition("=")[2]
        # bash completes only what follows the last of its own breaks in a word.
        self._kept = max((value.rfind(mark) + 1 for mark in ":=" if mark in breaks), default=0)
        return self.line.words[1:], self.line.incomplete

    def format_completion(self, item: CompletionItem) -> str:
        if item.type == COMMAND_LINE:
            return f"{COMMAND_LINE},{len(self.line.tail(int(item.value)))}"
        return f"{item.type},{item.value[self._kept :]}"


class _Zsh(ZshComplete):
    source_template = _ZSH


class _Fish(FishComplete):
    source_template = _FISH

    def get_completion_args(self) -> tuple[list[str], str]:
        self.line = _Line()
        return self.line.words[1:], self.line.incomplete

    def format_completion(self, item: CompletionItem) -> str:
        if item.type == COMMAND_LINE:
            return f"{COMMAND_LINE},{self.line.tail(int(item.value))}"
        return super().format_completion(item)


for _shell, _class in zip(SHELLS, (_Bash, _Zsh, _Fish), strict=True):
    add_completion_class(_class, _shell)


@click.command(
    "completion",
    help="Print a script that makes SHELL (bash, zsh or fish) complete farmem's words: its verbs, "
    "options and their values, and CMD as the shell completes it without farmem.",
    epilog='bash: eval "$(farmem completion bash)" in ~/.bashrc; '
    'zsh: eval "$(farmem completion zsh)" in ~/.zshrc, after compinit; '
    "fish: farmem completion fish > ~/.config/fish/completions/farmem.fish",
)
@click.argument("shell", metavar="SHELL", type=click.Choice(SHELLS))
def command(shell: str) -> None:
    """See the help above."""
    from farmem.cli import COMPLETE_VARIABLE, cli

    shell_class: type[ShellComplete] | None = get_completion_class(shell)
    assert shell_class is not None
    sys.stdout.write(shell_class(cli, {}, "farmem", COMPLETE_VARIABLE).source())
