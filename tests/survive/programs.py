"""The programs that must survive: how to make their input and how to call them.

A workload is a command whose result (standard output and, for some, a file) is the same
in each run.  Sizes are chosen so that a plain run takes a few seconds and holds 100 to 300 MiB of
anonymous memory: a quarter of that is still above farmem's minimum.  Nothing here runs anything
under farmem, and inputs are made with a fixed seed, never downloaded.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SEED = 20240607

SQL = """
.bail on
PRAGMA cache_size = -400000;
PRAGMA temp_store = MEMORY;
CREATE TABLE item(id INTEGER PRIMARY KEY, key INTEGER, name TEXT, weight REAL);
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 450000)
INSERT INTO item SELECT i, (i * 2654435761) % 1000003,
    printf('item-%08x-%08x-%s', (i * 40503) % 65521, i,
           substr('abcdefghijklmnopqrstuvwxyz', i % 20, 12)),
    i * 0.5 FROM n;
CREATE INDEX by_key ON item(key);
CREATE INDEX by_name ON item(name, weight);
SELECT count(*), sum(key), sum(length(name)) FROM item;
SELECT key, name FROM item ORDER BY name DESC LIMIT 5;
UPDATE item SET weight = weight * 2 WHERE key % 7 = 0;
DELETE FROM item WHERE key % 11 = 3;
SELECT key % 10, count(*), sum(weight) FROM item GROUP BY 1 ORDER BY 1;
SELECT count(*) FROM item a JOIN item b ON b.key = a.key + 1 WHERE a.id < 50000;
PRAGMA integrity_check;
"""

NUMPY_PROGRAM = """
import hashlib, pickle
import numpy as np
rng = np.random.default_rng(7)
def show(what, array):
    print(what, array.shape, hashlib.sha256(np.ascontiguousarray(array)).hexdigest(), flush=True)
a = rng.integers(0, 1 << 60, size=8_000_000, dtype=np.int64)
a *= 3
show("times", a)
b = np.sort(a)
show("sort", b)
print("sorted", bool((b[1:] >= b[:-1]).all()))
b[::513] += a[::513]
show("stride", b)
m = rng.integers(0, 100, size=(700, 700)).astype(np.float64)
show("matmul", m @ m)
data = pickle.dumps({"b": b, "words": [str(x) for x in b[:200_000].tolist()]}, protocol=5)
del b
back = pickle.loads(data)
del data
show("pickle", back["b"])
print(len(back["words"]), back["words"][-1], int((back["b"] ^ a).sum()))
"""

PIPELINE = (
    "seq 1 1400000 | awk '{ print ($1 * 7919) % 600011, \"word\" ($1 % 1013) }'"
    " | sort -S 200M | uniq -c | sort -S 200M -k1,1rn -k2 | md5sum"
)


@dataclass
class Call:
    """A command, ready to be run in `folder`; what counts is its stdout and these files."""

    command: list[str]
    stdin: bytes | None = None
    files: list[Path] = field(default_factory=list)

    def digest(self, stdout: bytes) -> str:
        """One digest of everything that the command gave; takes its files away."""
        total = hashlib.sha256(stdout)
        for path in self.files:
            total.update(hashlib.sha256(path.read_bytes()).digest())
            path.unlink()
        return total.hexdigest()


@dataclass(frozen=True)
class Workload:
    name: str
    needs: tuple[str, ...]
    prepare: Callable[[Path], Call]

    def missing(self) -> str | None:
        absent = [program for program in self.needs if shutil.which(program) is None]
        return f"{', '.join(absent)} not installed: run tools/setup.sh test" if absent else None


def compile_here(name: str, folder: Path) -> Path:
    target = folder / name
    flags = ["-std=gnu11", "-O2", "-g", "-pthread", "-Wall", "-Wextra", "-Werror"]
    command = ["cc", *flags, "-o", str(target), str(HERE / f"{name}.c")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{name}.c does not compile:\n{done.stderr}"
    return target


def prepare_sort(folder: Path) -> Call:
    source, target = folder / "lines", folder / "sorted"
    dice = random.Random(SEED)
    with source.open("w") as file:
        for _ in range(50):
            file.writelines(f"{dice.getrandbits(150):x} {dice.random()}\n" for _ in range(30_000))
    flags = ["-S", "400M", "--parallel=2", "-o", str(target)]
    return Call(["env", "LC_ALL=C", "sort", *flags, str(source)], files=[target])


def prepare_sqlite(_folder: Path) -> Call:
    return Call(["sqlite3", ":memory:"], stdin=SQL.encode())


def prepare_numpy(_folder: Path) -> Call:
    pytest.importorskip("numpy", reason="numpy is not installed: run `make test`")
    # One BLAS thread: several add up the same numbers in another order.
    return Call(["env", "OPENBLAS_NUM_THREADS=1", sys.executable, "-c", NUMPY_PROGRAM])


def c_function(number: int, dice: random.Random) -> str:
    a, b, c = (dice.randrange(3, 9999) for _ in range(3))
    return f"""
static struct node{number} {{
    long key, size; struct node{number} *next; char name[{a % 60 + 4}];
}} first{number};
long work{number}(long x, const char *text)
{{
    long sum = {a}, i;
    for (i = 0; i < (x % {b}); i++) {{
        sum += (sum << 3) ^ (x + i * {c});
        if (sum % {a} == 7) sum -= text[i % 16] * {b};
        else if (sum & {c}) sum = sum / ({a} + i) + first{number}.key;
        switch ((sum ^ i) & 7) {{
        case 0: sum ^= {b}; break;
        case 3: first{number}.size += sum; break;
        case 5: sum = sum > {c} ? sum - {c} : sum + {a}; break;
        default: first{number}.name[i % {a % 60 + 4}] = (char)sum;
        }}
    }}
    return sum{f" + work{number - 1}(sum, text)" if number % 3 else ""};
}}
"""


def prepare_gcc(folder: Path) -> Call:
    source, target = folder / "large.c", folder / "large.o"
    dice = random.Random(SEED)
    source.write_text("".join(c_function(number, dice) for number in range(520)))
    return Call(["gcc", "-O1", "-c", "-o", str(target), str(source)], files=[target])


def prepare_xz(folder: Path) -> Call:
    """A small input, because the encoder's memory is not: -9 has a table of 64 MiB for each of
    the two threads, and every byte of input touches a random page of it."""
    source = folder / "text"
    dice = random.Random(SEED)
    source.write_text("".join(f"{dice.getrandbits(400):x}\n" for _ in range(30_000)))
    # With blocks of this size both threads have work; the output depends on the size alone.
    return Call(["xz", "-9", "-T2", "--block-size=512KiB", "--keep", "--stdout", str(source)])


def prepare_pipeline(_folder: Path) -> Call:
    return Call(["env", "LC_ALL=C", "sh", "-c", PIPELINE])


def prepare_words(folder: Path) -> Call:
    return Call([str(compile_here("words", folder)), "160", "4", "6"])


def prepare_make(folder: Path) -> Call:
    """Our own library, from nothing: a C project of some thirty files, two compilers at a time.

    With GCC's analyzer, which needs four times the memory; what it has to say is not heard.
    """
    options = ["-DFARMEM_PYTHON=OFF", "-DCMAKE_BUILD_TYPE=Release", "-G", "Unix Makefiles"]
    options += ["-DCMAKE_C_COMPILER=gcc", "-DCMAKE_C_FLAGS=-fanalyzer -Wno-error"]
    command = ["cmake", "-S", str(HERE.parent.parent), "-B", str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    make = f"make -C {folder} clean >/dev/null && make -j2 -C {folder} >/dev/null 2>&1"
    return Call(["sh", "-c", make], files=[folder / "libfarmem.so"])


WORKLOADS = [
    Workload("sort", ("sort",), prepare_sort),
    Workload("sqlite", ("sqlite3",), prepare_sqlite),
    Workload("numpy", (), prepare_numpy),
    Workload("gcc", ("gcc",), prepare_gcc),
    Workload("xz", ("xz",), prepare_xz),
    Workload("pipeline", ("awk", "seq", "sort", "uniq", "md5sum"), prepare_pipeline),
    Workload("words", ("cc",), prepare_words),
    Workload("make", ("gcc", "cmake", "make"), prepare_make),
]
