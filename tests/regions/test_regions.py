"""What a Region does, checked against the kernel's own figures."""

import subprocess

import pytest

from tests.regions.scripts import LIMIT_SECONDS, environment, program, run

COPY = {"FARMEM_TEST_EVICT": "copy"}


@pytest.mark.parametrize("env", [{}, COPY], ids=["move", "copy"])
def test_numpy_larger_than_its_budget(env: dict[str, str]) -> None:
    """Four times the budget, every word checked, and the kernel's figure within the budget."""
    run(
        """
        before = anonymous_bytes()
        region = farmem.Region("64M", local="16M")
        with peak(anonymous_bytes) as most:
            array = fill(region)
            verify(array)
            array += np.uint64(5)
            verify(array, seed=5)
        assert present_bytes(region) <= 16 * MIB
        # The engine's records, the script's own arrays and Python's are in this figure as well.
        assert most.most - before <= (16 + 16) * MIB, (most.most, before)
        stats = region.budget.stats()
        assert stats.counters["pages_evicted"] > 10000, stats
        assert stats.counters["pages_fetched"] > 10000, stats
        """,
        env=env,
    )


def test_two_regions_on_one_budget() -> None:
    run(
        """
        budget = farmem.Budget("24M")
        one = farmem.Region("48M", budget=budget)
        two = farmem.Region(48 * MIB)
        assert two.budget is budget is farmem.Budget.current()
        before = anonymous_bytes()
        with peak(anonymous_bytes) as most:
            a = fill(one, seed=1)
            b = fill(two, seed=2)
            for _ in range(2):
                verify(a, seed=1)
                assert 20 * MIB < present_bytes(one, two) <= 24 * MIB
                verify(b, seed=2)
                assert 20 * MIB < present_bytes(one, two) <= 24 * MIB
        assert most.most - before <= (24 + 16) * MIB, (most.most, before)
        # What one does not need the other has.
        del a
        one.close()
        verify(b, seed=2)
        verify(b, seed=2)
        assert present_bytes(two) > 20 * MIB
        """
    )


def test_stats_are_the_kernels_figures() -> None:
    run(
        """
        region = farmem.Region("32M", local="16M")
        other = farmem.Region("1M")

        def agree():
            # The evictor may be at work for a moment yet: then the figures are of two moments.
            def same():
                first = region.stats()
                there = present_bytes(region)
                return first == region.stats() and first.local_bytes == there
            wait_for("the figures to agree", same)
            stats = region.stats()
            assert stats.local_bytes + stats.moving_bytes + stats.remote_bytes + (
                stats.empty_bytes + stats.lost_bytes) == stats.size_bytes == 32 * MIB, stats
            return stats

        assert agree().empty_bytes == 32 * MIB
        array = fill(region)
        stats = agree()
        assert stats.empty_bytes == 0 and stats.remote_bytes >= 16 * MIB, stats
        region.evict()
        assert agree().remote_bytes == 32 * MIB
        low = anonymous_bytes()
        region.willneed(0, 8 * MIB)
        assert agree().local_bytes == 8 * MIB
        grown = anonymous_bytes() - low
        assert 5 * MIB < grown < 9 * MIB, grown
        whole = region.budget.stats()
        assert whole.remote_bytes == 24 * MIB and whole.pinned_bytes == 0, whole
        assert whole.budget_bytes == 16 * MIB and 8 * MIB <= whole.local_bytes <= 16 * MIB, whole
        array[:] = 0
        region.evict()
        assert agree().empty_bytes == 32 * MIB, "zeros need no place"
        """
    )


@pytest.mark.parametrize("env", [{}, COPY], ids=["move", "copy"])
def test_willneed_evict_and_pin(env: dict[str, str]) -> None:
    run(
        """
        region = farmem.Region("64M", local="16M", filters=["delay:rtt=1ms"])
        array = fill(region)
        region.evict()
        assert not present(region).any()

        region.willneed(4 * MIB, 2 * MIB)
        there = present(region)
        assert there[1024:1536].all() and there.sum() == 512, there.sum()
        region.willneed(100, 1)                     # widened to its page
        assert present(region)[0] and present(region).sum() == 513
        region.evict(4 * MIB, MIB)
        there = present(region)
        assert not there[1024:1280].any() and there[1280:1536].all()

        region.pin(8 * MIB, 4 * MIB)
        region.pin(8 * MIB, 4 * MIB)                # pins don't nest
        assert region.stats().pinned_bytes == 4 * MIB
        with peak(lambda: -int(present(region, 8 * MIB, 4 * MIB).sum())) as missing:
            verify(array)
            region.evict()
        assert missing.most == -1024, "a pinned page was away"
        assert present_bytes(region) == 4 * MIB
        region.unpin(8 * MIB, 4 * MIB)
        assert region.stats().pinned_bytes == 0
        verify(array)
        verify(array)
        assert not present(region, 8 * MIB, 4 * MIB).all()
        region.evict()
        assert not present(region).any()
        """,
        env=env,
    )


def test_memory_that_was_never_written_can_be_pinned() -> None:
    run(
        """
        region = farmem.Region("64M", local="16M")
        region.pin(MIB, MIB)
        assert present(region, MIB, MIB).all() and present_bytes(region) == MIB
        assert not region.ndarray(MIB, "u1", offset=MIB).any()
        region.willneed(4 * MIB, MIB)
        assert present(region, 4 * MIB, MIB).all()
        odd = farmem.Region(5000)                   # not a whole number of pages
        odd.view()[4999] = 7
        odd.pin()
        odd.evict()
        assert present(odd).all() and odd.view()[4999] == 7 and len(odd) == 5000
        assert odd.stats().pinned_bytes == 8192
        """
    )


def test_more_than_the_budget_is_refused() -> None:
    run(
        """
        region = farmem.Region("64M", local="16M")
        array = fill(region)
        for ask in (region.pin, region.willneed):
            with refused(farmem.FarmemError, "64.0 MiB", "16.0 MiB", "can't be here at once"):
                ask()
        region.pin(0, 8 * MIB)
        with refused(farmem.FarmemError, "8.0 MiB are pinned"):
            region.pin(32 * MIB, 8 * MIB)
        assert region.stats().pinned_bytes == 8 * MIB
        region.pin(0, 12 * MIB)                     # what is pinned already needs no more room
        verify(array)
        region.unpin()
        region.local_bytes = "32M"
        region.pin(0, 20 * MIB)
        with refused(farmem.FarmemError, "can't hold the 20.0 MiB that are pinned", "16.0 MiB"):
            region.local_bytes = "16M"
        assert region.local_bytes == 32 * MIB
        verify(array)
        """
    )


def test_the_budget_changes_while_it_is_used() -> None:
    run(
        """
        region = farmem.Region("64M", local="48M")
        array = fill(region)
        stop = threading.Event()
        wrong = []

        def reader():
            while not stop.is_set():
                try:
                    verify(array)
                except AssertionError as error:
                    wrong.append(error)

        thread = threading.Thread(target=reader)
        thread.start()
        for _ in range(4):
            wait_for("more to be here", lambda: present_bytes(region) > 32 * MIB)
            region.local_bytes = "16M"
            wait_for("less to be here", lambda: present_bytes(region) <= 16 * MIB)
            region.willneed(0, 4 * MIB)
            region.local_bytes = 48 * MIB
        stop.set()
        thread.join()
        assert not wrong, wrong
        """
    )


def test_views_keep_a_region_open() -> None:
    """torch is too large to be installed for this; where it is, its tensors are views as well."""
    run(
        """
        import importlib.util
        HAS_TORCH = importlib.util.find_spec("torch") is not None

        def views(region):
            yield region.view()
            yield region.view()[10:20]
            yield region.ndarray(100, "f4")
            yield region.ndarray((10, 10), "f4")[2:, ::2]
            yield np.from_dlpack(region)
            yield np.from_dlpack(region.ndarray((10, 10), "f4"))
            yield region.__buffer__(0)
            yield np.asarray(region.view())
            if HAS_TORCH:
                import torch
                yield torch.from_numpy(region.ndarray(100, "f4"))
                yield torch.from_dlpack(region)[5:]

        budget = farmem.Budget("16M")
        count = 0
        for number in range(10 if HAS_TORCH else 8):
            region = farmem.Region("1M")
            view = list(views(region))[number]
            gc.collect()
            with refused(farmem.RegionInUse, "in use", "del array"):
                region.close()
            with refused(BufferError):
                with region:
                    pass
            assert not region.closed
            np.asarray(view)[...] = 9               # it is still there, and can be written
            del view
            gc.collect()
            region.close()
            region.close()
            assert region.closed and "closed" in repr(region)
            count += 1
        assert count >= 8

        # An error on its way out is not hidden by the refusal; the memory goes with the views.
        with refused(ZeroDivisionError):
            with farmem.Region("1M") as region:
                array = region.ndarray(100)
                1 / 0
        array[:] = 3
        assert array.sum() == 300

        # A region that is let go of lives on in its views.
        region = farmem.Region("32M")
        array = fill(region)
        del region
        gc.collect()
        verify(array)
        """
    )


def test_what_is_closed_is_given_back() -> None:
    run(
        """
        budget = farmem.Budget("16M", pool="mem:64M")
        for turn in range(6):                       # six times what the pool holds in all
            region = farmem.Region("48M")
            array = fill(region, seed=turn)
            verify(array, seed=turn)
            region.pin(0, MIB)
            del array
            if turn % 2:
                region.close()
            del region
            wait_for("the pool to be empty", lambda: budget.stats().remote_bytes == 0)
            assert budget.stats().pinned_bytes == 0
        fresh = farmem.Region("48M")
        assert not fresh.ndarray(6 * MIB, "u8").any()
        """
    )


def test_advice_changes_what_is_fetched() -> None:
    run(
        """
        region = farmem.Region("64M", local="32M")
        array = fill(region)
        region.evict()

        def fetched(advice, pages):
            region.advise(advice)
            region.evict()
            before = region.budget.stats().counters["pages_fetched"]
            for page in pages:
                assert array[page * 512] == expected(page * 512, 1)[0]
            return region.budget.stats().counters["pages_fetched"] - before

        straight = range(1000, 1200)
        scattered = range(0, 16000, 1600)
        assert fetched("random", straight) == 200
        assert fetched("sequential", [5000]) == 32
        assert fetched("normal", [5000]) == 1
        assert fetched("normal", straight) > 200, "found out: a stream, fetched ahead"
        assert fetched("normal", scattered) == 10
        assert fetched("sequential", scattered) == 320
        region.advise("random", 0, 8 * MIB)
        region.evict()
        before = region.budget.stats().counters["pages_fetched"]
        array[:8 * MIB // 8:512].sum()
        assert region.budget.stats().counters["pages_fetched"] - before == 2048
        """
    )


def test_threads_use_and_steer_regions_at_once() -> None:
    """Writers know what each word of theirs must be, while others send it away, bring it back, pin
    it and change the advice; the pool is slow enough for much to be under way."""
    run(
        """
        region = farmem.Region("48M", local="24M", filters=["delay:rtt=200us"])
        array = region.ndarray(len(region) // 8, "u8")
        stop = threading.Event()
        failures = []

        def guarded(work):
            def run():
                try:
                    work()
                except BaseException as error:
                    failures.append(repr(error))
                    stop.set()
            return threading.Thread(target=run)

        def writer(number):
            def work():
                mine = array[number::4]
                turn = 0
                for turn in range(3):
                    for at in range(0, len(mine), 1 << 16):
                        mine[at:at + (1 << 16)] = at + turn + number
                    for at in range(0, len(mine), 1 << 16):
                        part = mine[at:at + (1 << 16)]
                        assert (part == at + turn + number).all(), (number, turn, at)
            return work

        def steerer(seed):
            def work():
                dice = random.Random(seed)
                while not stop.is_set():
                    offset = dice.randrange(0, len(region) - MIB)
                    length = dice.randrange(1, MIB)
                    match dice.randrange(6):
                        case 0: region.evict(offset, length)
                        case 1: region.willneed(offset, length)
                        case 2:
                            region.pin(offset, length)
                            assert present(region, offset, length).all()
                            region.unpin(offset, length)
                        case 3:
                            advice = dice.choice(["normal", "random", "sequential"])
                            region.advise(advice, offset, length)
                        case 4: region.stats()
                        case 5: region.check(offset, length)
            return work

        # One pins at a time: unpin() would end another's pin of the same page.
        writers = [guarded(writer(number)) for number in range(4)]
        steerers = [guarded(steerer(9))]
        for thread in writers + steerers:
            thread.start()
        for thread in writers:
            thread.join()
        stop.set()
        for thread in steerers:
            thread.join()
        assert not failures, failures
        counters = region.budget.stats().counters
        assert counters["pages_evicted"] > 5000 and counters["pages_fetched"] > 5000, counters
        """
    )


def test_regions_come_and_go() -> None:
    """Addresses are used again at once, by other threads: what belonged to the old region must not
    show in the new one, and its end must not take the new one's pages."""
    run(
        """
        budget = farmem.Budget("16M", filters=["delay:rtt=50us"])
        failures = []

        def work(number):
            dice = random.Random(number)
            try:
                for turn in range(25):
                    region = farmem.Region(dice.randrange(1, 6 * MIB))
                    array = region.ndarray(len(region) // 8, "u8")
                    assert not array.any(), "zeros until it is written"
                    array[:] = expected(0, len(array), number * 100 + turn)
                    if turn % 3 == 0:
                        region.evict()
                    verify(array, seed=number * 100 + turn)
                    del array
                    region.close()
            except BaseException as error:
                failures.append(repr(error))

        threads = [threading.Thread(target=work, args=[number]) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures
        stats = budget.stats()
        assert stats.remote_bytes == 0 and stats.counters["pages_evicted"] > 10000, stats
        """
    )


def test_willneed_can_be_interrupted() -> None:
    """Ctrl-C during a call that would take very long; the pins of a pin() are taken back."""
    run(
        """
        region = farmem.Region("32M", local="24M", filters=["delay:rtt=2s"])
        region.view()[:4 * MIB] = b"x" * (4 * MIB)
        region.evict(0, 4 * MIB)
        for ask in (region.willneed, region.pin):
            timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
            timer.start()
            with refused(KeyboardInterrupt):
                ask(0, 4 * MIB)
            timer.join()
            assert not present(region, 0, 4 * MIB).all()
            assert region.stats().pinned_bytes == 0
        """
    )


def test_mistakes_are_told() -> None:
    run(
        """
        with refused(farmem.FarmemError, "nothing says how much"):
            farmem.Region("1M")
        with refused(farmem.FarmemError, "there is no pool"):
            farmem.Region("1M", local="16M", pool="tape:")
        with refused(farmem.FarmemError, "there is no filter"):
            farmem.Budget("16M", filters=["nothing"])
        with refused(farmem.FarmemError, "too small"):
            farmem.Budget("15M")
        for size in ("1X", 0, -5, "0"):
            with refused(farmem.FarmemError, "is not a size"):
                farmem.Budget(size)
        region = farmem.Region("1M", local="16M", filters="checksum")
        with refused(farmem.FarmemError, "has a budget already"):
            farmem.Budget("16M")
        with refused(farmem.FarmemError, "has a budget already"):
            farmem.Region("1M", local="16M")
        with refused(farmem.FarmemError, "has a budget already"):
            farmem.Region("1M", pool="mem:1G")
        with refused(farmem.FarmemError, "budget= says already"):
            farmem.Region("1M", budget=region.budget, local="16M")
        with refused(farmem.FarmemError, "can't be had"):
            farmem.Region(1 << 60)
        with refused(farmem.FarmemError, "too small"):
            region.local_bytes = "1M"
        with refused(farmem.FarmemError, "there is no advice 'often'"):
            region.advise("often")
        for offset, length in ((-1, 5), (0, MIB + 1), (MIB + 1, None), (5, -1)):
            for ask in (region.willneed, region.evict, region.pin, region.unpin, region.check):
                with refused(farmem.FarmemError, "lies outside"):
                    ask(offset, length)
        region.pin(MIB, 0)                          # nothing, at the very end
        assert region.stats().pinned_bytes == 0
        for shape, dtype, offset in (((1 << 20,), "f8", 0), (10, "f8", MIB), (10, "object", 0)):
            with refused(farmem.FarmemError, "no array of shape"):
                region.ndarray(shape, dtype, offset=offset)
        region.close()
        make = lambda: region.ndarray(1)
        for ask in (region.view, region.stats, region.evict, region.__enter__, make):
            with refused(farmem.FarmemError, "is closed"):
                ask()
        """
    )


def test_no_address_space_is_told() -> None:
    done = run(
        """
        import resource
        text = open("/proc/self/status").read()
        size = int(text.split("VmSize:")[1].split()[0]) << 10
        resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
        with refused(farmem.FarmemError, "pool", "can't be opened"):
            farmem.Region("1M", local="16M")
        # Enough for the supervisor, which is small, and not for this process.
        hold = mmap.mmap(-1, 1 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        limit = size + (1 << 30) + (400 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        with refused(farmem.FarmemError, "could not join", "ulimit -v"):
            farmem.Region("1M", local="16M", pool="mem:600M")
        with refused(farmem.FarmemError, "nothing says"):
            farmem.Region("1M")
        """
    )
    assert "address space" in done.stderr


def test_an_engine_that_gets_nothing_is_told() -> None:
    """No descriptor is left for the engine: no region, and the program goes on."""
    done = run(
        """
        import resource
        budget = farmem.Budget("16M")
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (6, before[1]))
        with refused(farmem.FarmemError, "can't work in this process"):
            farmem.Region("1M")
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        with refused(farmem.FarmemError, "can't work in this process"):
            farmem.Region("1M")
        assert budget.stats().local_bytes == 0
        """
    )
    assert "can't be managed" in done.stderr


def test_importing_farmem_costs_nothing() -> None:
    done = subprocess.run(
        [*program("")[:1], "-c", "import sys, farmem; print(sorted(sys.modules))"],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
        timeout=LIMIT_SECONDS,
    )
    for module in ("farmem._native", "farmem.region", "numpy", "click", "subprocess", "socket"):
        assert f"'{module}'" not in done.stdout
