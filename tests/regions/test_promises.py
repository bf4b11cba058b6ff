"""What a region promises when things go wrong: right bytes, else a clear end, never zeros.

A pool that fails, forks, an ordinary user, a supervisor that is killed, `farmem run`. Where a
fix can be taken out by name, a twin shows that its absence is noticed.
"""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import FARMEM, exclusive, run_farmem
from tests.regions.scripts import PYTHON, ROOT, environment, nobody, program, run

pytestmark = pytest.mark.safety
SYSCTL = Path("/proc/sys/vm/unprivileged_userfaultfd")

# ---- a pool that fails


def test_lost_pages_are_told(tmp_path: Path) -> None:
    """From some moment on nothing can be fetched: PageLost from the API, and what is here stays
    right. The message on stderr names the page."""
    done = run(
        """
        armed = os.environ["ARMED"]
        region = farmem.Region("16M", local="16M", filters=[f"error:fetch=1,file={armed}"])
        other = farmem.Region("16M")
        array = fill(region)
        region.evict()
        region.willneed(0, 4 * MIB)
        open(armed, "w").close()
        verify(array[: 4 * MIB // 8])
        region.check()                              # nobody has found out yet
        with refused(farmem.PageLost, "offset 8388608", "can't be had"):
            region.willneed(8 * MIB, 4096)
        for ask in (region.check, region.evict, region.willneed, region.pin):
            try:
                ask(7 * MIB, 2 * MIB)
                raise AssertionError("the lost page went unnoticed")
            except farmem.PageLost as error:
                assert error.offset == 8 * MIB, error.offset
        assert region.stats().lost_bytes == 4096 and region.stats().pinned_bytes == 0
        with refused(farmem.PageLost):
            region.pin(12 * MIB, 4096)              # found out by the pin: nothing stays pinned
        assert region.stats().pinned_bytes == 0 and region.stats().lost_bytes >= 8192
        region.check(0, 4 * MIB)
        verify(array[: 4 * MIB // 8])
        fresh = fill(other, seed=3)                 # the engine goes on
        verify(fresh, seed=3)
        print(f"{region._start + 8 * MIB:#x}")
        """,
        env={"ARMED": str(tmp_path / "armed")},
    )
    assert f"address {done.stdout.strip()}" in done.stderr, done.stderr


def test_touching_a_lost_page_is_a_bus_error(tmp_path: Path) -> None:
    done = run(
        """
        armed = os.environ["ARMED"]
        region = farmem.Region("8M", local="16M", filters=[f"error:corrupt=1,file={armed}"])
        array = fill(region)
        region.evict()
        assert array[0] == expected(0, 1)[0]
        open(armed, "w").close()
        print("touching", flush=True)
        print("read", array[512 * 1000])
        """,
        env={"ARMED": str(tmp_path / "armed")},
        check=False,
    )
    assert done.returncode == -signal.SIGBUS, (done.returncode, done.stdout, done.stderr)
    assert done.stdout == "touching\n"
    assert "lost" in done.stderr


def test_a_pool_that_refuses_keeps_pages_here() -> None:
    run(
        """
        region = farmem.Region("8M", local="32M", filters=["error:store=1"])
        array = fill(region)
        with refused(farmem.FarmemError, "did not take"):
            region.evict()
        verify(array)
        wait_for("all to be back", lambda: region.stats().local_bytes == 8 * MIB)
        assert region.stats().remote_bytes == 0
        """
    )


def test_a_full_pool_keeps_pages_here() -> None:
    done = run(
        """
        region = farmem.Region("32M", local="64M", pool="mem:8M")
        array = fill(region)
        with refused(farmem.FarmemError, "pool is full"):
            region.evict()
        verify(array)
        region.local_bytes = "16M"                  # no room there, and no room here
        verify(array)
        array += np.uint64(1)
        verify(array, seed=1)
        """
    )
    assert "the pool is full" in done.stderr


# ---- fork

CHILD = """
def child_of(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
        os._exit(1)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)
"""


def fork_script() -> str:
    return (
        CHILD
        + """
region = farmem.Region("48M", local="16M")
array = fill(region)
region.pin(0, MIB)

def child():
    verify(array)                               # what the parent had, wherever it was
    array[:] += np.uint64(7)                    # the child's own
    verify(array, seed=7)
    region.evict(8 * MIB, 8 * MIB)
    region.willneed(40 * MIB, 2 * MIB)
    assert present(region, 40 * MIB, 2 * MIB).all()
    assert present(region, 0, MIB).all() and region.stats().pinned_bytes == MIB
    verify(array, seed=7)
    more = farmem.Region("32M")                 # on the same budget
    verify(fill(more, seed=2), seed=2)
    assert child_of(lambda: verify(array, seed=7)) == 0

assert child_of(child) == 0
verify(array)

context = multiprocessing.get_context("fork")
with context.Pool(2) as pool:
    sums = pool.map(partial, range(4))
assert sum(sums) == sum(int(array[k::4].sum() % 1000003) for k in range(4)), sums
verify(array)
"""
    )


PARTIAL = "\ndef partial(k):\n    return int(array[k::4].sum() % 1000003)\n"


def test_children_have_their_parents_bytes() -> None:
    run(PARTIAL + fork_script())


@pytest.mark.root
def test_children_of_an_ordinary_user(unprivileged: None) -> None:
    run(PARTIAL + fork_script(), wrapper=nobody())


def test_children_without_the_handlers_would_be_noticed() -> None:
    done = run(PARTIAL + fork_script(), env={"FARMEM_TEST_DEFECTS": "ignore_fork"}, check=False)
    assert done.returncode == 1 and "wrong words" in done.stderr, (done.returncode, done.stderr)


def test_forks_while_threads_use_the_region() -> None:
    run(
        CHILD
        + """
region = farmem.Region("32M", local="16M", filters=["delay:rtt=100us"])
still = fill(region)[: 16 * MIB // 8]
moving = region.ndarray(16 * MIB // 8, "u8", offset=16 * MIB)
moving[:] = 0
stop = threading.Event()

def work():
    turn = 0
    while not stop.is_set():
        turn += 1
        for at in range(0, len(moving), 512):
            moving[at:at + 512] = turn          # a page at a time: it is all of one turn

def steer():
    while not stop.is_set():
        region.evict(16 * MIB, 4 * MIB)
        region.willneed(0, MIB)

def child():
    verify(still)
    pages = moving.reshape(-1, 512)
    assert int(pages.max()) - int(pages.min()) <= 1, "turns follow each other"

threads = [threading.Thread(target=work), threading.Thread(target=steer)]
for thread in threads:
    thread.start()
for _ in range(5):
    assert child_of(child) == 0
stop.set()
for thread in threads:
    thread.join()
verify(still)
"""
    )


def test_a_budget_without_regions_goes_through_a_fork() -> None:
    run(
        CHILD
        + """
budget = farmem.Budget("16M")

def child():
    region = farmem.Region("32M")
    verify(fill(region))
    assert budget.stats().counters["pages_evicted"] > 0

assert child_of(child) == 0
assert budget.stats().counters["pages_evicted"] == 0
region = farmem.Region("32M")
verify(fill(region))
assert subprocess.run(["true"], preexec_fn=lambda: None).returncode == 0
assert subprocess.run(["sh", "-c", "exit 3"]).returncode == 3
"""
    )


def test_a_child_made_behind_libc_dies_rather_than_read_zeros() -> None:
    """clone() as a system call runs no handler; regions are not copied to such a child."""
    done = run(
        """
        import ctypes
        region = farmem.Region("48M", local="16M")
        array = fill(region)
        assert array[0] != 0
        libc = ctypes.CDLL(None)
        SYS_FORK = 57
        pid = libc.syscall(SYS_FORK)
        if pid == 0:
            libc._exit(0 if array[512 * 5000] == 0 else 1)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status))
        verify(array)
        """
    )
    assert done.stdout.strip() == str(-signal.SIGSEGV)


# ---- an ordinary user


@pytest.fixture
def unprivileged() -> Iterator[None]:
    """Ordinary users get user-mode faults alone, and can run Python from this checkout."""
    if shutil.which("setpriv") is None:
        pytest.skip("setpriv is not installed (util-linux)")
    reach = subprocess.run(
        [*nobody(), PYTHON, "-c", "import farmem.region, tests.regions.inside"],
        env=environment(),
        capture_output=True,
        check=False,
    )
    if reach.returncode != 0:
        pytest.skip("other users can't run Python from this checkout")
    with exclusive("unprivileged-userfaultfd"):
        before = SYSCTL.read_text()
        if before.strip() != "0":
            SYSCTL.write_text("0")
        yield
        if before.strip() != "0":
            SYSCTL.write_text(before)


@pytest.mark.root
def test_user_mode_faults_are_enough(unprivileged: None) -> None:
    """No privilege, no device: every word is right; a system call on a missing page fails with
    EFAULT, never with wrong bytes, and a pin is the way out."""
    run(
        """
        assert os.geteuid() != 0
        region = farmem.Region("64M", local="16M")
        assert region.budget.user_mode_only
        array = fill(region)
        verify(array)

        view = region.view()
        pipe = os.pipe()
        os.write(pipe[1], b"0123456789")
        region.evict(0, MIB)
        with refused(OSError, "Bad address"):
            os.readv(pipe[0], [view[:10]])
        with refused(OSError, "Bad address"):
            os.write(pipe[1], view[4096:8192])
        region.pin(0, MIB)
        assert os.readv(pipe[0], [view[:10]]) == 10 and bytes(view[:10]) == b"0123456789"
        os.write(pipe[1], view[4096:8192])
        assert os.read(pipe[0], 4096) == expected(512, 512).tobytes()
        region.unpin(0, MIB)
        array[:2] = expected(0, 2)
        region.willneed(0, 8 * MIB)
        os.write(pipe[1], view[8192:12288])
        assert os.read(pipe[0], 4096) == expected(1024, 512).tobytes()
        verify(array)
        """,
        wrapper=nobody(),
    )


# ---- the supervisor


SUPERVISOR = """
def supervisors():
    found = []
    for entry in os.listdir("/proc"):
        try:
            words = open(f"/proc/{entry}/cmdline").read().split("\\0")
            environ = open(f"/proc/{entry}/environ").read()
        except (OSError, UnicodeDecodeError):
            continue
        if "farmem.regionjob" in words and f"MARK={os.environ['MARK']}\\0" in environ:
            found.append(int(entry))
    return found
"""


def test_the_supervisor_is_nobodys_child() -> None:
    run(
        SUPERVISOR
        + """
region = farmem.Region("32M", local="16M")
with refused(ChildProcessError):
    os.wait()
(pid,) = supervisors()
assert os.getsid(pid) != os.getsid(0)
array = fill(region)
os.kill(pid, signal.SIGTERM)                    # whoever ends a job's processes does not end it
verify(array)
assert supervisors() == [pid]
os.kill(pid, signal.SIGKILL)                    # and if it goes, the bytes are right all the same
wait_for("it to have gone", lambda: not supervisors())
verify(array)
region.local_bytes = "20M"
array += np.uint64(1)
verify(array, seed=1)
""",
        env={"MARK": f"one-{os.getpid()}"},
    )


@pytest.mark.parametrize("way", ["end", "kill"])
def test_the_supervisor_ends_with_the_program(way: str) -> None:
    ending = "os.kill(os.getpid(), signal.SIGKILL)" if way == "kill" else ""
    script = f"""
        region = farmem.Region("32M", local="16M")
        fill(region)
        print("ready", flush=True)
        {ending}
    """
    # The supervisor has a copy of stderr: its end is what the pipe's end says.
    done = run(script, env={"MARK": f"two-{os.getpid()}"}, check=False)
    assert done.stdout == "ready\n"
    assert done.returncode == (-signal.SIGKILL if way == "kill" else 0)


# ---- under `farmem run`


@pytest.mark.uffd
def test_a_region_joins_the_job() -> None:
    result = run_farmem(
        program(
            """
            with refused(farmem.FarmemError, "runs under `farmem run`", "leave local="):
                farmem.Region("1M", local="16M")
            with refused(farmem.FarmemError, "runs under `farmem run`"):
                farmem.Budget("16M")
            region = farmem.Region("128M")
            assert region.budget.is_jobs and region.local_bytes == 96 * MIB
            assert farmem.Budget.current() is region.budget
            assert not region.budget.user_mode_only
            with refused(farmem.FarmemError, "its job's"):
                region.local_bytes = "64M"
            array = fill(region)
            verify(array)
            region.evict(0, 8 * MIB)
            assert not present(region, 0, 8 * MIB).any()
            region.pin(0, 4 * MIB)
            plain = np.arange(12 << 20, dtype="u8")     # the rest of the program is managed, too
            verify(array)
            assert present(region, 0, 4 * MIB).all()
            assert (plain == np.arange(12 << 20, dtype="u8")).all()
            pid = os.fork()
            if pid == 0:
                verify(array)
                os._exit(0)
            assert os.waitpid(pid, 0)[1] == 0
            del array
            region.close()
            print("ok")
            """
        ),
        local="96M",
        env=environment(),
        timeout=240,
    )
    assert result.stdout == b"ok\n"
    assert result.stats is not None and result.stats["pages_evicted"] > 10000


@pytest.mark.uffd
def test_a_program_without_the_preload_joins_for_its_regions() -> None:
    """FARMEM_JOB is inherited and LD_PRELOAD is not: the process is of the job, and nothing but
    its regions is managed."""
    script = program(
        """
        region = farmem.Region("96M")
        assert region.budget.is_jobs and region.local_bytes == 64 * MIB
        verify(fill(region))
        print("ok")
        """
    )
    result = run_farmem(
        ["env", "-u", "LD_PRELOAD", *script], local="64M", env=environment(), timeout=240
    )
    assert result.stdout == b"ok\n"
    assert result.stats is not None and result.stats["pages_evicted"] > 1000


def test_a_job_that_is_no_more_is_told() -> None:
    run(
        """
        with refused(farmem.FarmemError, "can't be joined"):
            farmem.Region("1M", local="16M")
        """,
        env={"FARMEM_JOB": "farmem-0123456789abcdef:" + "0" * 32},
    )


def test_the_command_is_there() -> None:
    """These tests run the farmem of this checkout."""
    assert FARMEM.exists() and ROOT.joinpath("farmem", "region.py").exists()
