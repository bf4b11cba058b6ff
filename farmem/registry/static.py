"""A registry that is a file: TOML that names servers.  It is read anew each time it is asked."""

import tomllib
from urllib.parse import unquote

from farmem.errors import FarmemError
from farmem.registry import ENTRIES_MAX, Entry, Registry, entry_of

FILE_BYTES_MAX = 1 << 20
_EXAMPLE = 'write it as: servers = ["tcp://rack7:7717", "tcp://rack8:7717"]'


class FileRegistry(Registry):
    """`registry+file:///PATH`."""

    def __init__(self, url: str, path: str) -> None:
        super().__init__(url)
        if not path.startswith("/"):
            raise FarmemError(
                f"{self.name} needs three slashes: no host belongs there",
                "write it as registry+file:///etc/farmem/servers.toml",
            )
        self._path = unquote(path)

    def entries(self, deadline: float) -> list[Entry]:
        """What the file names."""
        try:
            with open(self._path, "rb") as file:
                data = file.read(FILE_BYTES_MAX + 1)
            if len(data) > FILE_BYTES_MAX:
                raise FarmemError(f"{self._path} is longer than {FILE_BYTES_MAX} bytes", _EXAMPLE)
            servers = tomllib.loads(data.decode()).get("servers")
        except OSError as error:
            raise FarmemError(
                f"{self.name} can't be read: {error.strerror}", "name another file"
            ) from error
        except ValueError as error:
            raise FarmemError(f"{self._path} is not TOML: {error}", _EXAMPLE) from error
        return self._entries(servers)

    def _entries(self, servers: object) -> list[Entry]:
        if not isinstance(servers, list) or len(servers) > ENTRIES_MAX:
            raise FarmemError(f"{self._path} has no list of servers", _EXAMPLE)
        found = []
        for url in dict.fromkeys(map(str, servers)):
            entry = entry_of(url, {"url": url})
            if entry is None:
                what = f"{self._path}: {url!r} is no URL of a farmem serve"
                raise FarmemError(what, _EXAMPLE)
            found.append(entry)
        return found
