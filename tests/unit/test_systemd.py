"""The units as systemd reads them, and what is said beside them.

A systemd that runs them is in tests/pools/test_serve_systemd.py.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from farmem.cli import main, serve
from farmem.cli.options import key_of, variable_of
from farmem.pool import tls
from farmem.pool.sockets import DATA_SUFFIX

ROOT = Path(__file__).resolve().parents[2]
UNITS = ROOT / "systemd"
SERVICE, SOCKET = "farmem-server.service", "farmem-server.socket"
DROP_IN = "farmem-server-tls.conf"
EXPOSURE_MAX = 20  # tenths: 1.6 with systemd 252


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units, with a program that is there: farmem may be anywhere."""
    for name in (SERVICE, SOCKET):
        text = (UNITS / name).read_text()
        (tmp_path / name).write_text(text.replace("/usr/local/bin/farmem", shutil.which("true")))
    return tmp_path


def analyze(*words: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed (systemd)")
    command = ["systemd-analyze", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_systemd_understands_every_line(units: Path) -> None:
    done = analyze("verify", "--man=no", str(units / SERVICE), str(units / SOCKET))
    assert (done.returncode, done.stderr) == (0, "")


def test_a_line_that_it_does_not_understand_would_be_seen(units: Path) -> None:
    text = (units / SERVICE).read_text()
    (units / SERVICE).write_text(text.replace("WatchdogSec=60s", "WatchdogSec=often"))
    assert "often" in analyze("verify", "--man=no", str(units / SERVICE)).stderr


def test_with_tls(units: Path) -> None:
    """The drop-in hands over what the server looks for, under the names that it looks for."""
    text = (UNITS / DROP_IN).read_text()
    (units / f"{SERVICE}.d").mkdir()
    (units / f"{SERVICE}.d" / DROP_IN).write_text(text)
    done = analyze("verify", "--man=no", str(units / SERVICE))
    assert (done.returncode, done.stderr) == (0, "")
    handed = re.findall(r"^LoadCredential=([^:]+):", text, re.MULTILINE)
    assert sorted(handed) == sorted((tls.AUTHORITY, tls.CERTIFICATE, tls.KEY))
    variables = re.findall(r"(FARMEM_\w+)=", text)
    known = serve.command.params
    assert set(variables) <= {variable_of("serve", key_of(option)) for option in known}


def test_the_service_is_confined(units: Path) -> None:
    words = ("security", "--offline=true", f"--threshold={EXPOSURE_MAX}", "--no-pager")
    done = analyze(*words, str(units / SERVICE))
    assert done.returncode == 0, done.stdout
    assert "Overall exposure level" in done.stdout


def test_a_stop_is_for_farmem_alone() -> None:
    """Were nbdkit told to stop as well, a drain would be over before it began."""
    assert "KillMode=mixed" in (UNITS / SERVICE).read_text()


def test_each_socket_has_one_for_its_data() -> None:
    listens = re.findall(r"^ListenStream=(.+)$", (UNITS / SOCKET).read_text(), re.MULTILINE)
    control = [path for path in listens if not path.endswith(DATA_SUFFIX)]
    assert control and sorted(listens) == sorted(control + [path + DATA_SUFFIX for path in control])


def test_the_example_is_what_serve_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Also with every line that is commented out."""
    text = (UNITS / "farmem.example.toml").read_text()
    full = re.sub(r"^# ([a-z-]+ = )", r"\1", text, flags=re.MULTILINE)
    full = full.replace('quota = ["16G"]', "", 1)
    for name in (tls.AUTHORITY, tls.CERTIFICATE, tls.KEY):
        (tmp_path / name).touch()
    begun = []

    def begin(coroutine: object) -> None:
        begun.append(coroutine)
        coroutine.close()  # type: ignore[attr-defined]

    monkeypatch.setattr("asyncio.run", begin)
    for number, example in enumerate((text, full), 1):
        path = tmp_path / "farmem.toml"
        path.write_text(example.replace("/etc/farmem/tls", str(tmp_path)))
        assert main(["--config", str(path), "serve"]) == 0, capsys.readouterr().err
        assert len(begun) == number
    assert full.count("\nlisten = ") == full.count("\nhuge-pages = ") == 1
