/* test_file.c - the backend file.c on a real file: each way to transfer in a process of its own.
 *
 * What was stored is what is fetched, with many transfers under way; what fails is told as a failure; an extent's space
 * is there before it is used and gone when it is empty.
 */
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "backend_host.h"
#include "backends/file.h"
#include "check.h"

#define FRAMES 512u
#define EXTENTS 8u
#define EXTENT_BYTES (FM_EXTENT_SLOTS * (uint64_t)FM_PAGE_BYTES)
#define POOL_BYTES (EXTENTS * EXTENT_BYTES)
#define EXIT_UNSUPPORTED 77
#define WAIT_NS 20000000000ull

static struct fm_chain chain;
static struct fm_backend backend;
static struct fm_pool_ledger ledger;
static struct fm_counters counters;
static atomic_uint ended;

/* ---- what the engine gives to a backend, beside backend_host.c */

static void on_end(struct fm_backend *b, struct fm_io *io)
{
    (void)b, (void)io;
    CHECK(atomic_load(&gates) > 0);
    atomic_fetch_add(&ended, 1);
}

static bool trim(void *ctx, uint32_t extent)
{
    (void)ctx;
    return backend.trim(&backend, extent);
}

/* ---- transfers */

static void await_ends(uint32_t n)
{
    uint64_t begin = fm_now_ns();
    while (atomic_load(&ended) < n) {
        CHECK(fm_now_ns() - begin < WAIT_NS);
        sched_yield();
    }
    atomic_store(&ended, 0);
}

static int transfer(uint32_t kind, uint32_t frame, uint32_t slot, uint32_t n, uint32_t tries)
{
    struct fm_io io = { .kind = kind, .n = n, .frame = frame, .slot = slot, .tries = tries };
    backend.submit(&backend, &io);
    await_ends(1);
    return io.status;
}

static uint64_t *words_of(uint32_t frame) { return (uint64_t *)(chain.frames + (uint64_t)frame * FM_PAGE_BYTES); }

static void fill(uint32_t frame, uint32_t n, uint64_t seed)
{
    for (uint32_t k = 0; k < n * FM_PAGE_BYTES / 8; k++)
        words_of(frame)[k] = seed * 1000003 + k;
}

static void is_filled(uint32_t frame, uint32_t n, uint64_t seed)
{
    for (uint32_t k = 0; k < n * FM_PAGE_BYTES / 8; k++)
        CHECK(words_of(frame)[k] == seed * 1000003 + k);
}

/* As many as there can be: a page in every frame, and runs of 32. */
static void many_at_once(uint32_t n)
{
    static struct fm_io io[FRAMES];
    uint32_t count = FRAMES / n;
    for (uint32_t round = 0; round < 4; round++) {
        for (uint32_t k = 0; k < count; k++) {
            fill(k * n, n, round * 10000 + k);
            io[k] = (struct fm_io){ .kind = FM_IO_STORE, .n = n, .frame = k * n, .slot = (k * 7 % count) * n };
            backend.submit(&backend, &io[k]);
        }
        await_ends(count);
        memset(chain.frames, 0xee, FRAMES * FM_PAGE_BYTES);
        for (uint32_t k = 0; k < count; k++) {
            CHECK(io[k].status == 0);
            io[k] = (struct fm_io){ .kind = FM_IO_FETCH, .n = n, .frame = k * n, .slot = (k * 7 % count) * n };
            backend.submit(&backend, &io[k]);
        }
        await_ends(count);
        for (uint32_t k = 0; k < count; k++) {
            CHECK(io[k].status == 0);
            is_filled(k * n, n, round * 10000 + k);
        }
    }
}

static void what_stops_short_goes_on(void)
{
    struct fm_io io = { .kind = FM_IO_STORE, .n = 3, .frame = 5, .slot = 9 };
    fm_file.done_bytes[5] = 0;
    CHECK(!fm_file_went(&io, FM_PAGE_BYTES));
    struct fm_file_rest r = fm_file_rest(&io);
    CHECK(r.memory == words_of(6) && r.bytes == 2 * FM_PAGE_BYTES && r.at == 10 * FM_PAGE_BYTES);
    CHECK(!fm_file_went(&io, -EINTR));
    CHECK(fm_file_went(&io, 2 * FM_PAGE_BYTES) && io.status == 0);
    CHECK(fm_file_went(&io, -ENOSPC) && io.status == ENOSPC);
}

/* ---- failures */

/* The file's descriptor is another's for a while: every operation on it fails. */
static int break_file(void)
{
    int good = dup(chain.pool_fd), bad = open("/dev/null", O_RDONLY | O_CLOEXEC);
    CHECK(good >= 0 && bad >= 0 && dup2(bad, chain.pool_fd) == chain.pool_fd && close(bad) == 0);
    return good;
}

static void mend_file(int good) { CHECK(dup2(good, chain.pool_fd) == chain.pool_fd && close(good) == 0); }

static void what_fails_is_told(void)
{
    int good = break_file();
    CHECK(transfer(FM_IO_STORE, 0, 0, 1, 0) == EBADF);
    CHECK(transfer(FM_IO_FETCH, 0, 0, 1, 0) != 0);
    mend_file(good);
    fill(0, 1, 1);
    CHECK(transfer(FM_IO_STORE, 0, 3, 1, 0) == 0);
    CHECK(atomic_exchange(&said, 0) == 1 && fm_file.told_short);    /* of /dev/null: nothing is in it */
    fm_file.told_short = false;
}

static void a_file_that_was_cut_short(void)
{
    fill(0, 4, 2);
    CHECK(transfer(FM_IO_STORE, 0, 20, 4, 0) == 0);
    CHECK(ftruncate(chain.pool_fd, 22 * FM_PAGE_BYTES) == 0);
    CHECK(transfer(FM_IO_FETCH, 0, 20, 2, 0) == 0 && atomic_load(&said) == 0);
    is_filled(0, 2, 2);
    CHECK(transfer(FM_IO_FETCH, 0, 20, 4, 0) == ENODATA);
    CHECK(atomic_load(&said) == 1 && strstr(last_said, "cut short") != NULL);
    /* Something is written beyond: what is before it reads as zeros, which only a second try looks into. */
    fm_file.told_short = false;
    CHECK(transfer(FM_IO_STORE, 0, 40, 1, 0) == 0);
    CHECK(transfer(FM_IO_FETCH, 8, 22, 1, 0) == 0 && atomic_load(&said) == 1);
    CHECK(transfer(FM_IO_FETCH, 8, 22, 1, 1) == 0 && atomic_load(&said) == 2);
    CHECK(transfer(FM_IO_FETCH, 8, 22, 1, 1) == 0 && atomic_load(&said) == 2);    /* once */
    CHECK(ftruncate(chain.pool_fd, POOL_BYTES) == 0);
}

/* ---- space */

static uint64_t used_bytes(void)
{
    struct stat s;
    CHECK(fstat(chain.pool_fd, &s) == 0 && (uint64_t)s.st_size == POOL_BYTES);
    return (uint64_t)s.st_blocks * 512;
}

static void await_used(uint64_t least, uint64_t most)
{
    uint64_t begin = fm_now_ns();
    while (used_bytes() < least || used_bytes() > most) {
        CHECK(fm_now_ns() - begin < WAIT_NS);
        usleep(10000);
    }
}

static void space_comes_and_goes(void)
{
    uint32_t e[3];
    CHECK(ftruncate(chain.pool_fd, 0) == 0 && ftruncate(chain.pool_fd, POOL_BYTES) == 0);
    CHECK(used_bytes() == 0);
    for (uint32_t k = 0; k < 3; k++) {
        e[k] = fm_extent_take(&ledger, FM_EXTENT_NONE);
        CHECK(backend.grant(&backend, e[k]) && chain.full == NULL);
    }
    CHECK(used_bytes() >= 3 * EXTENT_BYTES);
    fill(0, 1, 3);
    CHECK(fm_slot_take(&ledger, e[1] * FM_EXTENT_SLOTS));
    CHECK(transfer(FM_IO_STORE, 0, e[1] * FM_EXTENT_SLOTS, 1, 0) == 0);
    for (uint32_t k = 0; k < 3; k++)
        fm_extent_release(&ledger, e[k]);
    await_used(EXTENT_BYTES, EXTENT_BYTES + EXTENT_BYTES / 2);
    CHECK(transfer(FM_IO_FETCH, 8, e[1] * FM_EXTENT_SLOTS, 1, 0) == 0);
    is_filled(8, 1, 3);
    fm_slot_release(&ledger, e[1] * FM_EXTENT_SLOTS);
    await_used(0, EXTENT_BYTES / 2);
}

static void no_space_is_told_before_a_page_leaves(void)
{
    int good = break_file();
    CHECK(!backend.grant(&backend, 3));
    CHECK(chain.full != NULL && strstr(chain.full, "no space") != NULL && chain.full_errno == EBADF);
    mend_file(good);
    CHECK(!backend.grant(&backend, 3));           /* believed for a moment */
    uint64_t begin = fm_now_ns();
    while (!backend.grant(&backend, 3)) {
        CHECK(fm_now_ns() - begin < WAIT_NS);
        usleep(10000);
    }
    CHECK(chain.full == NULL);
}

/* ---- */

static int new_file(void)
{
    int fd = open(".", O_TMPFILE | O_RDWR | O_DIRECT | O_CLOEXEC, 0600);
    if (fd < 0)
        fd = open(".", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    CHECK(fd >= 0 && ftruncate(fd, POOL_BYTES) == 0);
    return fd;
}

static bool set_up(uint32_t file_io)
{
    int prot = PROT_READ | PROT_WRITE;
    void *base = mmap(NULL, fm_pool_ledger_bytes(POOL_BYTES), prot, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    char *frames = mmap(NULL, FRAMES * FM_PAGE_BYTES, prot, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(base != MAP_FAILED && frames != MAP_FAILED && fm_pool_ledger_init(base, POOL_BYTES) == 0);
    fm_pool_ledger_view(&ledger, base, 0);
    ledger.trim = trim;
    chain = (struct fm_chain){ .frames = frames, .ledger = &ledger, .count = &counters, .pool_fd = new_file(),
                               .pool_bytes = POOL_BYTES, .file_io = file_io, .thread = test_thread, .say = say,
                               .gate_in = gate_in, .gate_out = gate_out };
    backend = fm_backend_file;
    backend.chain = &chain;
    backend.ended = on_end;
    return backend.open(&backend);
}

static int run_all(uint32_t file_io)
{
    if (!set_up(file_io))
        return EXIT_UNSUPPORTED;
    many_at_once(1);
    many_at_once(32);
    what_stops_short_goes_on();
    what_fails_is_told();
    a_file_that_was_cut_short();
    space_comes_and_goes();
    no_space_is_told_before_a_page_leaves();
    CHECK((counters.transfers_uring > 0) == (file_io == FM_FILE_IO_URING));
    CHECK((counters.transfers_threads > 0) == (file_io == FM_FILE_IO_THREADS));
    return 0;
}

static int in_a_process(uint32_t file_io)
{
    int status, pid = fork();
    if (pid == 0) {
        int result = run_all(file_io);
        fflush(stdout);
        _exit(result);
    }
    CHECK(pid > 0 && waitpid(pid, &status, 0) == pid && WIFEXITED(status));
    return WEXITSTATUS(status);
}

int main(void)
{
    CHECK(in_a_process(FM_FILE_IO_THREADS) == 0);
    int uring = in_a_process(FM_FILE_IO_URING);
    if (uring == EXIT_UNSUPPORTED)
        puts("io_uring can't be had here");
    return uring;
}
