"""Configuration files: where they are looked for, which are trusted, what they say.

A file is TOML with a section for each verb: `[run]` and in it `local = "4G"`.  What a
key means is not known here: farmem/cli/options.py holds the sections against the
options.  On the way to exec: where there is no file, nothing is imported and nothing
but three lstat calls happens.
"""

import os
import stat
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from farmem.errors import FarmemError

FILE_NAME = "farmem.toml"
SYSTEM_PATH = "/etc/farmem/farmem.toml"
FILE_BYTES_MAX = 64 << 10
# To find the line of a key a file is parsed a line at a time: in a longer one it is not looked for.
LINES_MAX = 200
_EXAMPLE = 'write it as TOML: a section, as [run], and below it lines as local = "4G"'


class Place(NamedTuple):
    """Where a file is looked for: in the current folder, the user's, the system's, or named."""

    kind: str
    path: str


class Distrust(NamedTuple):
    """Why a file is not believed.

    One that is not the user's is skipped, with a warning: else anybody could keep others
    from working in a shared folder.  The user's own is an error: it is for the user to mend.
    """

    why: str
    hint: str
    is_skipped: bool


class Document(NamedTuple):
    """A file that was read."""

    place: Place
    text: str
    tables: dict[str, Any]

    def where(self, section: str, key: str) -> str:
        """The file, and the line of a key in a section where that is easily had."""
        line = _line_of(self.text, section, key)
        return f"{self.place.path}, line {line}" if line else self.place.path


def places(environment: Mapping[str, str], named: str = "") -> list[Place]:
    """Where files are looked for, the one that counts most first; a named one stands alone."""
    if named:
        return [Place("named", named)]
    found = [Place("folder", os.path.join(os.curdir, FILE_NAME))]
    base = environment.get("XDG_CONFIG_HOME", "")
    if not os.path.isabs(base):
        base = os.path.expanduser("~/.config")
    if os.path.isabs(base):
        found.append(Place("user", os.path.join(base, "farmem", FILE_NAME)))
    return [*found, Place("system", SYSTEM_PATH)]


def is_there(place: Place) -> bool:
    """Whether there is such a file.  In a folder that may not be searched there is none."""
    try:
        os.lstat(place.path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return False
    except OSError as error:
        raise _unreadable(place, error) from error
    return True


def _unreadable(place: Place, error: OSError) -> FarmemError:
    hint = f"make it readable (chmod u+r {place.path}) or remove it"
    if place.kind == "named":
        hint = "name a file that can be read: farmem --config FILE ..."
    return FarmemError(f"{place.path} can't be read: {error.strerror}", hint)


def _is_own_group(fd: int, group: int) -> bool:
    """Whether a group is the user's alone: it has the user's name, and no other member.

    Where the umask is 002, files are writable by such a group.  A file with an access
    list is not looked into: its group bits stand for others as well.
    """
    import grp
    import pwd

    try:
        user = pwd.getpwuid(os.geteuid()).pw_name
        entry = grp.getgrgid(group)
        has_list = "system.posix_acl_access" in os.listxattr(fd)
    except (KeyError, OSError):
        return False
    return entry.gr_name == user and not set(entry.gr_mem) - {user} and not has_list


def _name_of(user: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return str(user)


def _distrust(place: Place, fd: int) -> Distrust | None:
    """A file decides where memory goes: it must be in the hands of the user or of root alone.

    What a link points to and the link itself both count: either could be somebody's bait.
    """
    if place.kind == "named":
        return None
    me, found = os.geteuid(), os.fstat(fd)
    if place.kind != "system":
        for owner in (os.lstat(place.path).st_uid, found.st_uid):
            if owner not in (0, me):
                hint = f"if you trust it, name it: farmem --config {place.path} ..."
                return Distrust(f"it belongs to user {_name_of(owner)}", hint, True)
    is_open = found.st_mode & stat.S_IWOTH or (
        found.st_mode & stat.S_IWGRP and not _is_own_group(fd, found.st_gid)
    )
    if is_open:
        why = f"others may write to it (mode {stat.S_IMODE(found.st_mode):04o})"
        hint = f"take that right away: chmod go-w {place.path}"
        return Distrust(why, hint, place.kind != "system" and found.st_uid != me)
    return None


def _open(place: Place) -> int:
    flags = os.O_RDONLY | os.O_CLOEXEC | (0 if place.kind == "named" else os.O_NONBLOCK)
    try:
        return os.open(place.path, flags)
    except OSError as error:
        raise _unreadable(place, error) from error


def _read(place: Place, fd: int) -> str:
    """The text of a file; of a pipe or a device only where it was named."""
    mode = os.fstat(fd).st_mode
    if stat.S_ISDIR(mode) or (place.kind != "named" and not stat.S_ISREG(mode)):
        raise FarmemError(f"{place.path} is not a regular file", "put a TOML file there, or none")
    try:
        with os.fdopen(fd, "rb", closefd=False) as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise _unreadable(place, error) from error
    if len(data) > FILE_BYTES_MAX:
        raise FarmemError(f"{place.path} is longer than {FILE_BYTES_MAX} bytes", _EXAMPLE)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise FarmemError(f"{place.path}, line {line}: not UTF-8", "save it as UTF-8") from error


def _parse(text: str) -> dict[str, Any]:
    import tomllib

    return tomllib.loads(text)


def _document(place: Place, text: str) -> Document:
    try:
        return Document(place, text, _parse(text))
    except (ValueError, RecursionError) as error:
        why = "too deep" if isinstance(error, RecursionError) else str(error)
        raise FarmemError(f"{place.path} is not TOML: {why}", _EXAMPLE) from error


def distrust_of(place: Place) -> Distrust | None:
    """Why a file that is there is not believed, or None."""
    fd = _open(place)
    try:
        return _distrust(place, fd)
    finally:
        os.close(fd)


def load(place: Place) -> Document | None:
    """What a file says; None where there is none, or one of somebody else's is skipped."""
    if place.kind != "named" and not is_there(place):
        return None
    fd = _open(place)
    try:
        distrust = _distrust(place, fd)
        if distrust is None:
            return _document(place, _read(place, fd))
    finally:
        os.close(fd)
    if not distrust.is_skipped:
        raise FarmemError(f"{place.path} is not trusted: {distrust.why}", distrust.hint)
    warning = f"farmem: warning: {place.path} is not used: {distrust.why}\n  {distrust.hint}"
    print(warning, file=sys.stderr)
    return None


def _prefixes(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """For each line: what the text says up to there, where that is whole."""
    lines = text.split("\n")
    for number in range(1, len(lines) + 1):
        try:
            yield number, _parse("\n".join(lines[:number]))
        except ValueError:
            continue


def _line_of(text: str, section: str, key: str) -> int:
    """The line on which a key's definition begins, or a section's (without a key); else 0."""
    if text.count("\n") > LINES_MAX:
        return 0
    before = 0
    for number, tables in _prefixes(text):
        table = tables.get(section)
        if table is not None and (not key or (isinstance(table, dict) and key in table)):
            return before + 1
        before = number
    return 0
