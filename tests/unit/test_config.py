"""Options from the environment and from files: which one counts, which files are believed,
and what a mistake in one is answered with.

Each test has a current folder, a user's and a system's place of its own.
"""

import contextlib
import json
import os
import pwd
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from farmem import config
from farmem.cli import main

FARMEM = str(Path(sys.executable).with_name("farmem"))
LIMIT_SECONDS = 60
NOBODY = 65534


class Home:
    """The places that are looked at: the current folder is `here`."""

    def __init__(self, folder: Path) -> None:
        self.here = folder / "here"
        self.user = folder / "config" / "farmem"
        self.system = folder / "etc"
        for made in (self.here, self.user, self.system):
            made.mkdir(parents=True)

    def write(self, text: str, folder: Path | None = None) -> Path:
        path = (folder or self.here) / "farmem.toml"
        path.write_text(text)
        path.chmod(0o644)
        return path


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    made = Home(tmp_path)
    monkeypatch.delenv("FARMEM_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(config, "SYSTEM_PATH", str(made.system / "farmem.toml"))
    monkeypatch.chdir(made.here)
    return made


def farmem(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """farmem in a process of its own; the system's place is then the real one."""
    return subprocess.run(
        [FARMEM, *arguments],
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
        env={**os.environ, **environment},
    )


def shown(capsys: pytest.CaptureFixture[str], *before: str) -> dict[str, Any]:
    """What `config show` says of the options of run."""
    status = main([*before, "config", "show", "--json"])
    out, err = capsys.readouterr()
    assert status == 0, err
    options: dict[str, Any] = json.loads(out)["options"]["run"]
    return options


def assert_mistake(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """One sentence, one hint, both naming what they should; status 125."""
    assert done.returncode == 125, done
    assert done.stdout == ""
    assert done.stderr.startswith("farmem: ")
    assert len(done.stderr.splitlines()) == 2
    for word in words:
        assert word in done.stderr


def test_the_nearer_place_counts(
    home: Home, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each place gives `local`; taken away one after the other, the next one speaks."""
    monkeypatch.setenv("FARMEM_RUN_LOCAL", "1G")
    here = home.write('[run]\nlocal = "2G"')
    user = home.write('[run]\nlocal = "3G"', home.user)
    system = home.write('[run]\nlocal = "4G"', home.system)

    def told() -> tuple[Any, ...]:
        found = shown(capsys)["local"]
        return found["value"], found["source"], found["where"]

    assert told() == ("1G", "environment", "FARMEM_RUN_LOCAL")
    monkeypatch.delenv("FARMEM_RUN_LOCAL")
    assert told() == ("2G", "file", "./farmem.toml, line 2")
    here.unlink()
    assert told() == ("3G", "file", f"{user}, line 2")
    user.unlink()
    assert told() == ("4G", "file", f"{system}, line 2")
    system.unlink()
    assert told() == (None, "not set", None)


def test_files_complement_each_other_and_a_list_is_taken_whole(
    home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    home.write('[run]\nfilter = ["stats"]\nquiet = true')
    home.write('[run]\nlocal = 67108864\nfilter = ["checksum", "stats"]\n', home.user)
    options = shown(capsys)
    assert options["local"]["value"] == "67108864"
    assert options["filter"]["value"] == ["stats"]
    assert options["quiet"] == {"value": True, "source": "file", "where": "./farmem.toml, line 3"}
    assert options["pool"] == {"value": ["mem:"], "source": "default", "where": None}


def test_a_named_file_stands_alone(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    home.write('[run]\nlocal = "2G"')
    other = home.write("[run]\nquiet = true", home.system)
    options = shown(capsys, "--config", str(other))
    assert options["local"]["value"] is None
    assert options["quiet"]["where"] == f"{other}, line 2"
    assert shown(capsys, "--config", os.devnull)["quiet"]["value"] is False


def test_a_pipe_can_be_named(home: Home) -> None:
    done = subprocess.run(
        ["bash", "-c", '"$0" --config <(echo "[run]"; echo "local = 5") run true', FARMEM],
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )
    assert_mistake(done, "5 bytes", "local in /dev/fd/")


def test_what_show_prints_can_be_a_file(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    home.write(
        '[run]\nlocal = "2G"\nfilter = ["stats", "delay:rtt=1us"]\nquiet = true\nstats="ü\\"x"'
    )
    before = {key: found["value"] for key, found in shown(capsys).items()}
    assert main(["config", "show"]) == 0
    text = capsys.readouterr().out
    copy = home.write(text, home.system)
    after = {key: found["value"] for key, found in shown(capsys, "--config", str(copy)).items()}
    assert after == before
    assert "# ./farmem.toml, line 2\n" in text
    assert "# default\n" in text


def test_variables(
    home: Home, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several values by blanks, switches as 0 and 1; empty is not set; internal ones are none."""
    home.write('[run]\nlocal = "2G"')
    for name, value in {
        "FARMEM_RUN_FILTER": "stats delay:rtt=10us",
        "FARMEM_RUN_QUIET": "0",
        "FARMEM_RUN_NO_PINNED_IO": "1",
        "FARMEM_RUN_LOCAL": "",
        "FARMEM_VERSION": "9",
        "FARMEM_TEST_FOLDER": "x",
    }.items():
        monkeypatch.setenv(name, value)
    options = shown(capsys)
    assert options["filter"]["value"] == ["stats", "delay:rtt=10us"]
    assert (options["quiet"]["value"], options["quiet"]["source"]) == (False, "environment")
    assert options["no-pinned-io"]["value"] is True
    assert options["local"]["value"] == "2G"
    main(["config", "show", "--json"])
    assert json.loads(capsys.readouterr().out)["other_variables"] == ["FARMEM_VERSION"]


def test_pools_and_registries_from_a_file_and_from_a_variable(
    home: Home, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they can be is in test_servers.py; here it is that they get there."""
    pools = ["registry+etcd://a:1,b:2/farm", "registry+http://a:1", "tcp://a:1"]
    home.write(f"[run]\npool = {json.dumps(pools)}\n[serve]\nregister = {json.dumps(pools[:2])}\n")
    assert shown(capsys)["pool"]["value"] == pools
    monkeypatch.setenv("FARMEM_RUN_POOL", " ".join(reversed(pools)))
    monkeypatch.setenv("FARMEM_SERVE_REGISTER", " ".join(reversed(pools[:2])))
    assert shown(capsys)["pool"]["value"] == pools[::-1]
    told = farmem("run", "-m", "64M", "true", FARMEM_RUN_POOL=" ".join(pools))
    assert_mistake(told, pools[0], "only servers can be used together")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("FARMEM_RUN_LOCLA", "1G", ["FARMEM_RUN_LOCLA", "did you mean FARMEM_RUN_LOCAL?"]),
        ("FARMEM_LOCAL", "1G", ["FARMEM_LOCAL", "call it FARMEM_RUN_LOCAL"]),
        ("FARMEM_RUN_LOCAL", "12Q", ["'12Q'", "(FARMEM_RUN_LOCAL)", "512M"]),
        ("FARMEM_RUN_LOCAL", "1M", ["1.0 MiB", "(FARMEM_RUN_LOCAL)", "-m 16M"]),
        ("FARMEM_RUN_QUIET", "maybe", ["maybe", "it comes from FARMEM_RUN_QUIET"]),
        ("FARMEM_CONFIG", "/nosuch", ["/nosuch", "--config FILE"]),
    ],
)
def test_a_wrong_variable_is_told(home: Home, name: str, value: str, words: list[str]) -> None:
    home.write('[run]\nlocal = "64M"')
    assert_mistake(farmem("run", "true", **{name: value}), *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[run]\nlocla = "1G"', ["line 2", "[run]", "'locla'", "did you mean local?"]),
        ("[run]\nno_pinned_io = true", ["'no_pinned_io'", "did you mean no-pinned-io?"]),
        ('[runn]\nlocal = "1G"', ["line 1", "[runn]", "did you mean run?"]),
        ('[config]\nshow = "1G"', ["line 1", "[config]", "[run]"]),
        ('local = "1G"', ["line 1", "'local'", "[run]"]),
        ("run = 1", ["line 1", "'run'", "[run]"]),
        ("[run]\nlocal = true", ["line 2", "local is true or false", 'local = "4G"']),
        ("[run]\nlocal = 2024-01-01", ["line 2", "local is a date", 'local = "4G"']),
        ("[run]\nlocal = { a = 1 }", ["line 2", "local is a section", 'local = "4G"']),
        ('[run]\n# why\nquiet = "yes"', ["line 3", "quiet is a string", "quiet = true"]),
        ("[run]\nquiet = 1", ["line 2", "quiet is a number", "quiet = true"]),
        ("[run]\nfilter = [1, 'x']", ["line 2", "filter is a mixed list", "filter = ["]),
        ('[run]\nstats = ["x"]', ["line 2", "stats is a list", 'stats = "FILE"']),
        ('[run]\n\nlocal = "12Q"', ["'12Q'", "(local in ./farmem.toml, line 3)", "512M"]),
        ('[run]\nlocal = "1G"\nfilter = "zip"', ["'zip'", "(filter in ./farmem.toml, line 3)"]),
        (
            '[run]\nlocal = "1G"\nstats = "/nosuch/x"',
            ["'/nosuch'", "(stats in ./farmem.toml, line 3)"],
        ),
        ("[run\nlocal", ["not TOML", "line 1", "[run]"]),
        ('[run]\nlocal = "1G"\nlocal = "2G"\n#', ["not TOML", "line 3"]),
        ("x = " + "[" * 20000, ["not TOML"]),
        ("#" * config.FILE_BYTES_MAX + "\n", ["longer than 65536"]),
    ],
)
def test_a_wrong_file_is_told(home: Home, text: str, words: list[str]) -> None:
    home.write(text)
    assert_mistake(farmem("run", "true"), "./farmem.toml", *words)


def test_what_is_no_text_file_is_told(home: Home) -> None:
    path = home.here / "farmem.toml"
    path.write_bytes(b"[run]\n# \xff\n")
    assert_mistake(farmem("run", "true"), "./farmem.toml, line 2", "UTF-8")
    path.unlink()
    path.mkdir()
    assert_mistake(farmem("run", "true"), "./farmem.toml is not a regular file")
    path.rmdir()
    os.mkfifo(path)
    assert_mistake(farmem("run", "true"), "./farmem.toml is not a regular file")
    path.unlink()
    path.symlink_to("nowhere")
    assert_mistake(farmem("run", "true"), "./farmem.toml can't be read")


def test_help_works_where_the_configuration_does_not(home: Home) -> None:
    home.write("rubbish")
    done = farmem("run", "--help")
    assert done.returncode == 0
    assert "--local" in done.stdout
    assert_mistake(farmem("config", "show"), "not TOML")
    assert farmem("config", "path").returncode == 0


def test_no_local_size_anywhere_says_where_it_could_stand(home: Home) -> None:
    done = farmem("run", "--", "true")
    assert_mistake(
        done, "'-m'", "FARMEM_RUN_LOCAL", 'local = "4G" under [run]', "farmem run --help"
    )


def test_path_says_what_is_used(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    home.write("[run]", home.user).chmod(0o666)
    home.write("[run]")
    assert main(["config", "path", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [place["kind"] for place in found] == ["folder", "user", "system"]
    assert [place["state"] for place in found] == [
        "used",
        "not used: others may write to it (mode 0666)",
        "not there",
    ]
    assert main(["config", "path"]) == 0
    assert "./farmem.toml " in capsys.readouterr().out


def test_without_a_file_nothing_is_imported_to_read_one(home: Home) -> None:
    code = (
        "import sys; from farmem.cli import main\n"
        "assert main(['run', '-m', '64M']) == 125\n"
        "print(sorted({'tomllib', 'pwd', 'grp', 'json'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "no command" in done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[run]\nkey = 1", 2),
        ("# [run]\n\n[run]\n# key = 0\nkey = 1\n", 5),
        ('[run]\na = """\n[run]\nkey = 0\n"""\nkey = 1', 6),
        ("[run]\nkey = [\n 1,\n 2]\nb = 1", 2),
        ("run.a = 1\nrun.key = 1", 2),
        ("run = { a = 1, key = 2 }", 1),
        ("[run]\na = 1\n[other]\nkey = 1\n", 0),
        ("[run]\nkey = 1\n" + "\n" * config.LINES_MAX, 0),
    ],
)
def test_the_line_of_a_key(text: str, line: int) -> None:
    import tomllib

    document = config.Document(config.Place("named", "x"), text, tomllib.loads(text))
    assert document.where("run", "key") == (f"x, line {line}" if line else "x")


class TestTrust:
    """Who could have written a file decides whether it is believed."""

    def test_a_file_that_others_may_write_to_is_an_error(self, home: Home) -> None:
        path = home.write('[run]\nlocal = "64M"')
        path.chmod(0o646)
        assert_mistake(farmem("run", "true"), "./farmem.toml", "mode 0646", "chmod go-w")
        path.unlink()
        path = home.write('[run]\nlocal = "64M"', home.user)
        path.chmod(0o646)
        assert_mistake(farmem("run", "true"), str(path), "chmod go-w")

    def test_a_named_file_is_believed(self, home: Home, capsys: pytest.CaptureFixture[str]) -> None:
        home.write('[run]\nlocal = "64M"').chmod(0o666)
        assert shown(capsys, "--config", "./farmem.toml")["local"]["value"] == "64M"

    @pytest.mark.root
    def test_somebody_elses_file_is_skipped(
        self, home: Home, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = home.write('[run]\nlocal = "64M"')
        home.write('[run]\nlocal = "32M"', home.system)
        os.chown(path, NOBODY, 0)
        assert main(["config", "show"]) == 0
        out, err = capsys.readouterr()
        assert 'local = "32M"' in out
        assert err.count("warning: ./farmem.toml is not used: it belongs to user") == 1
        assert "farmem --config ./farmem.toml" in err
        path.chmod(0o666)
        assert shown(capsys)["local"]["value"] == "32M"
        os.chown(path, 0, 0)
        path.chmod(0o644)
        assert shown(capsys)["local"]["value"] == "64M"

    @pytest.mark.root
    def test_somebody_elses_link_to_ones_own_file_is_skipped(
        self, home: Home, capsys: pytest.CaptureFixture[str]
    ) -> None:
        target = home.write('[run]\nlocal = "64M"', home.system.parent)
        link = home.here / "farmem.toml"
        link.symlink_to(target)
        assert shown(capsys)["local"]["value"] == "64M"
        os.lchown(link, NOBODY, 0)
        assert shown(capsys)["local"]["value"] is None

    @pytest.mark.root
    def test_ones_own_group_is_nobody_else(
        self, home: Home, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = home.write('[run]\nlocal = "64M"')
        path.chmod(0o664)
        os.chown(path, 0, 0)
        assert shown(capsys)["local"]["value"] == "64M"
        os.chown(path, 0, NOBODY)
        assert_mistake(farmem("run", "true"), "mode 0664")

    @pytest.mark.root
    def test_a_file_that_cannot_be_read_is_told_and_one_that_cannot_be_seen_is_none(self) -> None:
        """A user who may not search a folder can't know what is in it: nothing, then."""
        with tempfile.TemporaryDirectory() as name, as_nobody(Path(name)) as folder:
            path = folder / "farmem.toml"
            path.write_text("[run]")
            path.chmod(0)
            place = config.Place("user", str(path))
            with pytest.raises(config.FarmemError, match="can't be read: Permission denied"):
                config.load(place)
            folder.chmod(0)
            assert config.load(place) is None
            with pytest.raises(config.FarmemError, match="can't be read"):
                config.load(config.Place("named", str(path)))
            folder.chmod(0o755)


@contextlib.contextmanager
def as_nobody(folder: Path) -> Iterator[Path]:
    """This very process without rights, in a folder of its own."""
    os.chown(folder, NOBODY, NOBODY)
    os.seteuid(pwd.getpwuid(NOBODY).pw_uid)
    try:
        yield folder
    finally:
        os.seteuid(0)


@pytest.mark.uffd
@pytest.mark.move
class TestRun:
    """The job itself has the value that counts."""

    def budget(self, home: Home, *arguments: str, **environment: str) -> int:
        stats = home.here / "stats.json"
        done = farmem("run", "--stats", str(stats), *arguments, "--", "true", **environment)
        assert done.returncode == 0, done.stderr
        budget: int = json.loads(wait_for(stats))["budget_bytes"]
        stats.unlink()
        return budget

    def test_the_command_line_counts_most(self, home: Home) -> None:
        home.write('[run]\nlocal = "64M"')
        assert self.budget(home) == 64 << 20
        assert self.budget(home, FARMEM_RUN_LOCAL="32M") == 32 << 20
        assert self.budget(home, "-m", "48M", FARMEM_RUN_LOCAL="32M") == 48 << 20


def wait_for(path: Path) -> str:
    """The text of a file that the supervisor puts there when the job has ended."""
    import time

    end = time.monotonic() + LIMIT_SECONDS
    while not path.exists():
        assert time.monotonic() < end, f"{path} is not written"
        time.sleep(0.01)
    return path.read_text()
