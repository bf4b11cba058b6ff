"""The units run by a real systemd, which has nothing else to do: in namespaces of its own.

It starts the sockets and the service as a host's systemd would, with all that confines the
service; then systemd_inside.sh uses, stops and kills it.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest

from tests.harness import ROOT
from tests.pools.serving import can_serve, need, until

pytestmark = [pytest.mark.pools, pytest.mark.root]
HERE = Path(__file__).resolve().parent
NAMESPACES = ("--mount", "--pid", "--cgroup", "--uts", "--ipc", "--fork", "--kill-child")
LIMIT_S = 90


def test_the_service_under_systemd() -> None:
    can_serve()
    need("unshare", "curl", "nbdcopy", "systemd-sysusers")
    if not Path("/lib/systemd/systemd").exists():
        pytest.skip("systemd is not installed")
    with tempfile.TemporaryDirectory(prefix="farmem-systemd-") as name:
        out = Path(name)
        site = sysconfig.get_path("platlib")
        words = [str(HERE / "systemd_container.sh"), str(ROOT), sys.base_prefix, site, name]
        with (out / "said").open("wb") as said:
            container = subprocess.Popen(
                ["unshare", *NAMESPACES, *words, str(HERE / "systemd_inside.sh")],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
            )
        try:
            done = out / "done"
            until(
                lambda: container.poll() is not None or (done.exists() and done.read_text()),
                f"what comes of it ({out})",
                LIMIT_S,
            )
        finally:
            container.kill()
            container.wait()
        logs = [path for path in (out / "said", out / "service", out / "log") if path.exists()]
        said_all = "\n".join(f"{path.name}:\n{path.read_text()}" for path in logs)
        assert done.exists() and done.read_text() == "0\n", said_all
