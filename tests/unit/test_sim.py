"""The simulator of the core: fresh seeds find no violation, and every named defect is found.

A clean run says little by itself: a simulator that draws too little, or checks nothing,
is clean as well. So each defect that is compiled in (a fix taken out, a pool that lies, a
kernel event that comes late) must be caught within a bounded number of seeds. The seeds of
the clean run are new each time and are printed; one that fails goes, with its steps, into
native/tests/sim_seeds.txt, which is replayed first.
"""

import re
import secrets
import subprocess
from pathlib import Path

import pytest

from tests.native_build import build_native

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "native" / "tests"
LIMIT_SECONDS = 1800
STEPS_LEAST = 10_000_000
DEFECT_SEEDS = 1000
# Short runs meet the beginnings (adoption, the first forks) often, long ones the rare.
BATCHES = ((400, 20_000), (20, 200_000), (1000, 2_000))
DEFECTS = re.findall(r'^ {4}\{ "(\w+)", ', (NATIVE / "sim.c").read_text(), re.MULTILINE)
KNOWN = [
    tuple(line.split()[:2])
    for line in (NATIVE / "sim_seeds.txt").read_text().splitlines()
    if line and not line.startswith("#")
]

pytestmark = pytest.mark.sim


@pytest.fixture(scope="module")
def simulator() -> Path:
    """The built farmem-sim."""
    return build_native("sim") / "farmem-sim"


def run(simulator: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [simulator, *args], capture_output=True, text=True, check=False, timeout=LIMIT_SECONDS
    )


@pytest.mark.parametrize(("seed", "steps"), KNOWN)
def test_seeds_that_once_failed(simulator: Path, seed: str, steps: str) -> None:
    done = run(simulator, "--seed", seed, "--steps", steps)
    assert done.returncode == 0, done.stderr


def test_fresh_seeds(simulator: Path) -> None:
    total = 0
    for seeds, steps in BATCHES:
        first = secrets.randbelow(1 << 40)
        print(f"farmem-sim --seed {first} --seeds {seeds} --steps {steps}")
        done = run(simulator, "--seed", str(first), "--seeds", str(seeds), "--steps", str(steps))
        assert done.returncode == 0, done.stderr
        assert f"{seeds} seeds from {first} on" in done.stdout
        total += seeds * steps
    assert total >= STEPS_LEAST


def test_a_seed_is_a_seed(simulator: Path) -> None:
    """The same seed takes the same steps, forks included."""
    first, second = (run(simulator, "--seed", "77", "--seeds", "8", "--verbose") for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout


@pytest.mark.parametrize("defect", DEFECTS)
def test_defect_is_caught(simulator: Path, defect: str) -> None:
    done = run(simulator, "--seed", "1", "--seeds", str(DEFECT_SEEDS), "--defect", defect)
    assert done.returncode == 1, f"{defect} was not caught: {done.stdout}"
    assert "VIOLATION" in done.stderr
    replay = re.search(r"replay: farmem-sim (.*)", done.stderr)
    assert replay, done.stderr
    print(f"{defect}: {done.stderr}")
    again = run(simulator, *replay.group(1).split())
    assert (again.returncode, again.stderr) == (done.returncode, done.stderr)
    seed = replay.group(1).split()[1]
    clean = run(simulator, "--seed", seed)
    assert clean.returncode == 0, "the seed fails without the defect too"


def test_every_defect_is_listed(simulator: Path) -> None:
    assert run(simulator, "--list-defects").stdout.split() == DEFECTS
    assert DEFECTS


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--seed", "x"), "a number must follow --seed"),
        (("--steps",), "a number must follow --steps"),
        (("--defect", "nothing"), "no such defect"),
        (("--nothing",), "unknown option"),
    ],
)
def test_bad_options(simulator: Path, args: tuple[str, ...], says: str) -> None:
    done = run(simulator, *args)
    assert done.returncode == 2
    assert says in done.stderr
    assert "usage:" in done.stderr
