/* file.c - the bytes live in a file, on a disk of this host: the backend that really frees memory on one machine.
 *
 * submit() only queues.  Transfers are made by io_uring where that is allowed, else by a few threads that wait for one
 * each.  Space for an extent is allocated before anything is stored in it, so that a file system without space says so
 * while the pages are still in the program.  It is given back later, by a thread of its own, because the file
 * is locked meanwhile.  A transfer that stops short goes on where it stopped; one that meets the file's end fails.
 */
#include "file.h"

#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <sys/stat.h>

#include "engine/sys.h"
#include "fm_assert.h"

#define EXTENT_BYTES ((uint64_t)FM_EXTENT_SLOTS * FM_PAGE_BYTES)
#define FULL_NS 1000000000ull       /* how long a refusal is believed */
#define GATHER_NS 10000000ull       /* for the neighbours of an extent that has become empty */
#define INTERRUPTS_MAX 16

enum way { WAY_UNKNOWN = 0, WAY_URING, WAY_THREADS, WAY_NONE };

struct fm_file fm_file;

/* ---- the queues ---------------------------------------------------------------------------------------- */

static uint32_t queue_of(const struct fm_io *io) { return io->kind == FM_IO_FETCH ? 0 : 1; }

static void file_submit(struct fm_backend *b, struct fm_io *io)
{
    uint32_t q = queue_of(io);
    fm_assert(((uint64_t)io->slot + io->n) * FM_PAGE_BYTES <= b->chain->pool_bytes && io->frame < FM_FRAMES_MAX);
    io->next = NULL;
    fm_lock_take(&fm_file.lock);
    if (fm_file.head[q] == NULL)
        __atomic_store_n(&fm_file.head[q], io, __ATOMIC_SEQ_CST);
    else
        fm_file.tail[q]->next = io;
    fm_file.tail[q] = io;
    fm_lock_drop(&fm_file.lock);
    if (fm_file.way == WAY_URING)
        fm_uring_ring();
    else
        fm_file_threads_ring();
}

static bool waits_in(uint32_t q) { return __atomic_load_n(&fm_file.head[q], __ATOMIC_SEQ_CST) != NULL; }
bool fm_file_waits(void) { return waits_in(0) || waits_in(1); }

struct fm_io *fm_file_take(void)
{
    if (!fm_file_waits())
        return NULL;
    fm_lock_take(&fm_file.lock);
    uint32_t q = fm_file.head[0] != NULL ? 0 : 1;
    struct fm_io *io = fm_file.head[q];
    if (io != NULL)
        __atomic_store_n(&fm_file.head[q], io->next, __ATOMIC_SEQ_CST);
    fm_lock_drop(&fm_file.lock);
    if (io != NULL)
        fm_file.done_bytes[io->frame] = 0;
    return io;
}

/* ---- a transfer ---------------------------------------------------------------------------------------- */

struct fm_file_rest fm_file_rest(const struct fm_io *io)
{
    uint32_t done = fm_file.done_bytes[io->frame];
    return (struct fm_file_rest){ .memory = fm_io_bytes(fm_file.b, io) + done, .bytes = io->n * FM_PAGE_BYTES - done,
                                  .at = (uint64_t)io->slot * FM_PAGE_BYTES + done };
}

/* Nobody else has any business in the file: should somebody have cut it short, what was beyond is lost, and what was
 * written since beyond that has zeros before it.  The core's hash tells those; here is told what happened. */
static void look_at_size(void)
{
    struct stat s;
    if (fm_sys(SYS_fstat, fm_file.fd, &s) != 0 || (uint64_t)s.st_size >= fm_file.b->chain->pool_bytes)
        return;
    if (!__atomic_exchange_n(&fm_file.told_short, true, __ATOMIC_RELAXED))
        fm_file.b->chain->say(FM_LEVEL_ERROR, "the pool's file was cut short by somebody: pages that were in it are lost.", 0);
}

bool fm_file_went(struct fm_io *io, long got)
{
    uint32_t *done = &fm_file.done_bytes[io->frame];
    if (got == -EINTR)
        return false;
    if (got > 0) {
        fm_assert((uint64_t)got <= io->n * FM_PAGE_BYTES - *done);
        *done += (uint32_t)got;
        if (*done < io->n * FM_PAGE_BYTES)
            return false;
    }
    io->status = got > 0 ? 0 : got == 0 ? ENODATA : (int32_t)-got;
    if (io->kind == FM_IO_FETCH && (io->status == ENODATA || io->tries > 0))
        look_at_size();
    return true;
}

void fm_file_ended(struct fm_io *io)
{
    struct fm_backend *b = fm_file.b;
    if (fm_file.way == WAY_URING)
        fm_add(b->chain->count->transfers_uring, 1);
    else
        fm_add(b->chain->count->transfers_threads, 1);
    b->chain->gate_in();
    b->ended(b, io);
    b->chain->gate_out();
}

/* ---- space --------------------------------------------------------------------------------------------- */

static const char *refusal(long err)
{
    switch (err) {
    case ENOSPC: return "the file system of the pool has no space left: pages stay local, over the budget.";
    case EDQUOT: return "the disk quota is used up: pages stay local, over the budget.";
    default: return "the pool's file gets no space: pages stay local, over the budget; error";
    }
}

/* A refusal holds for a while: a file system that is full thinks long about it. */
static bool file_grant(struct fm_backend *b, uint32_t extent)
{
    long r = -EINTR;
    if (fm_now_ns() < __atomic_load_n(&fm_file.full_until_ns, __ATOMIC_RELAXED))
        return false;
    for (int k = 0; k < INTERRUPTS_MAX && r == -EINTR; k++)
        r = fm_sys(SYS_fallocate, fm_file.fd, FALLOC_FL_KEEP_SIZE, extent * EXTENT_BYTES, EXTENT_BYTES);
    bool granted = r == 0 || r == -EOPNOTSUPP;     /* where it can't be allocated ahead, a store may fail */
    if (!granted)
        __atomic_store_n(&fm_file.full_until_ns, fm_now_ns() + FULL_NS, __ATOMIC_RELAXED);
    b->chain->full = granted ? NULL : refusal(-r);
    b->chain->full_errno = granted ? 0 : (uint64_t)-r;
    return granted;
}

static bool file_trim(struct fm_backend *b, uint32_t extent)
{
    (void)b;
    (void)extent;
    __atomic_add_fetch(&fm_file.trim_bell, 1, __ATOMIC_SEQ_CST);
    fm_futex_wake(&fm_file.trim_bell, 1);
    return false;
}

static void punch(void *ctx, uint32_t extent, uint32_t n)
{
    (void)ctx;
    /* Best effort: an extent that stays allocated holds nothing that is read again. */
    (void)fm_sys(SYS_fallocate, fm_file.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, extent * EXTENT_BYTES, n * EXTENT_BYTES);
    __atomic_store_n(&fm_file.full_until_ns, 0, __ATOMIC_RELAXED);
}

static void trimmer(void *arg)
{
    uint32_t seen = 0;
    (void)arg;
    for (;;) {
        while (__atomic_load_n(&fm_file.trim_bell, __ATOMIC_SEQ_CST) == seen)
            fm_futex_wait(&fm_file.trim_bell, seen, -1);
        fm_sleep_ns(GATHER_NS);
        seen = __atomic_load_n(&fm_file.trim_bell, __ATOMIC_SEQ_CST);
        fm_pool_ledger_trim(fm_file.b->chain->ledger, 0, punch, NULL);
    }
}

/* ---- opening ------------------------------------------------------------------------------------------- */

static void settle(enum way way)
{
    __atomic_store_n(&fm_file.way, (uint32_t)way, __ATOMIC_RELEASE);
    fm_futex_wake(&fm_file.way, 1);
}

/* io_uring is set up by the thread that uses it: the kernel wants it to be one and the same. */
static void first_thread(void *arg)
{
    uint32_t want = fm_file.b->chain->file_io;
    (void)arg;
    if (want != FM_FILE_IO_THREADS && fm_uring_open()) {
        settle(WAY_URING);
        fm_uring_run();
    }
    if (want == FM_FILE_IO_URING) {
        settle(WAY_NONE);
        return;
    }
    settle(WAY_THREADS);
    fm_file_threads_start();
    fm_file_threads_run();
}

static bool file_open(struct fm_backend *b)
{
    uint32_t way;
    __builtin_memset(&fm_file, 0, sizeof fm_file);       /* in the child of a fork it is the parent's */
    fm_file.b = b;
    fm_file.fd = b->chain->pool_fd;
    if (!b->chain->thread(first_thread, NULL) || !b->chain->thread(trimmer, NULL))
        return false;
    while ((way = __atomic_load_n(&fm_file.way, __ATOMIC_ACQUIRE)) == WAY_UNKNOWN)
        fm_futex_wait(&fm_file.way, WAY_UNKNOWN, -1);
    return way != WAY_NONE;
}

const struct fm_backend fm_backend_file = {
    .size = sizeof(struct fm_backend),
    .version = FM_BACKEND_VERSION,
    .name = "file",
    .open = file_open,
    .submit = file_submit,
    .grant = file_grant,
    .trim = file_trim,
};
