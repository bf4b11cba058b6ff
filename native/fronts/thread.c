/* thread.c - the thread front: the one thread that reads the userfaultfd, and resolves what it reads.
 *
 * Correct for everything, faults inside system calls included.  Reading an event and applying it is one critical
 * section (the world is held exclusively).  This thread waits for nothing else: a fault that can't be resolved at once
 * is parked, or left to whoever ends the operation under way.
 */
#include <errno.h>
#include <poll.h>
#include <stddef.h>

#include "engine/engine.h"
#include "engine/uffd_api.h"
#include "fm_assert.h"

#define RETRIES_MAX 256u
#define SPIN_READS 30u
#define HOLD_LOOK_NS 200000
#define HOLD_READS 64u

struct reader {
    struct fm_parked retry[RETRIES_MAX];   /* faults that met a changing world */
    uint32_t retries;
    long tid;
};

static struct reader reader;

/* The zap comes later; the watcher counts again what has gone by then. */
static void note_discard(uint64_t from, uint64_t n)
{
    fm_lock_take(&fm.discards_lock);
    if (fm.discards_n < sizeof fm.discards / sizeof fm.discards[0])
        fm.discards[fm.discards_n++] = (struct fm_range){ from, from + n };
    fm_lock_drop(&fm.discards_lock);
}

static bool ours(uint64_t from) { return fm_own_memory(from / FM_PAGE_BYTES); }

static void apply(const struct uffd_msg *m)
{
    struct fm_core *c = &fm.core;
    uint64_t from = m->arg.remove.start / FM_PAGE_BYTES, n = (m->arg.remove.end - m->arg.remove.start) / FM_PAGE_BYTES;
    switch (m->event) {
    case UFFD_EVENT_REMOVE:
        if (!ours(m->arg.remove.start)) {
            fm_core_removed(c, from, n);
            note_discard(from, n);
        }
        break;
    case UFFD_EVENT_UNMAP:
        fm.mm_events++;
        if (fm.fork_unmaps_n < FM_FORK_UNMAPS)
            fm.fork_unmaps[fm.fork_unmaps_n] = (struct fm_range){ from, from + n };
        if (fm.fork_unmaps_n <= FM_FORK_UNMAPS)
            fm.fork_unmaps_n++;
        if (!ours(m->arg.remove.start))
            fm_core_unmapped(c, from, n);
        break;
    case UFFD_EVENT_REMAP:
        fm.mm_events++;
        fm.remaps++;
        fm_core_remapped(c, m->arg.remap.from / FM_PAGE_BYTES, m->arg.remap.to / FM_PAGE_BYTES, m->arg.remap.len / FM_PAGE_BYTES);
        break;
    default:
        fm_panic("an event that was not asked for", __FILE__, __LINE__);
    }
}

/* 1: m holds a fault.  0: an event was applied.  -1: nothing to read. */
static int read_one(struct uffd_msg *m)
{
    fm_world_take(&fm.world);
    long r = fm_sys(SYS_read, fm.uffd, m, sizeof *m);
    if (r == (long)sizeof *m && m->event != UFFD_EVENT_PAGEFAULT)
        apply(m);
    fm_world_release(&fm.world);
    if (r != (long)sizeof *m)
        return -1;
    return m->event == UFFD_EVENT_PAGEFAULT;
}

static void later(uint64_t page, uint32_t bits, uint64_t since_ns)
{
    if (reader.retries < RETRIES_MAX)
        reader.retry[reader.retries++] = (struct fm_parked){ page, bits, since_ns };
    else
        fm_engine_ops.wake(NULL, page, 1);
}

bool fm_front_thread_later(uint64_t page)
{
    if (fm_sys(SYS_gettid) != reader.tid || reader.retries == RETRIES_MAX)
        return false;
    later(page, 0, fm_now_ns());
    return true;
}

static void resolve(uint64_t page, uint32_t bits, uint64_t since_ns)
{
    switch (fm_core_fault(&fm.core, page, bits)) {
    case FM_FAULT_RETRY:
        later(page, bits, since_ns);
        return;
    case FM_FAULT_NO_FRAME:
        fm_park(page, bits, since_ns);
        return;
    case FM_FAULT_DONE:
    case FM_FAULT_WAIT:
    case FM_FAULT_HERE:                 /* these two are not about faults */
    case FM_FAULT_LOST:
        break;
    }
    fm_add(fm.proc->counters.stall_ns, fm_now_ns() - since_ns);
    struct fm_core *c = &fm.core;
    if (fm_frames_of(c, FM_FRAME_EMPTY) >= FM_FRAMES / 8 || c->local_pages > c->limit_pages)
        fm_evictor_ring();
}

static uint32_t bits_of(const struct uffd_msg *m)
{
    uint64_t flags = m->arg.pagefault.flags;
    uint32_t bits = (flags & UFFD_PAGEFAULT_FLAG_WRITE) != 0 ? FM_FAULT_WRITE : 0;
    return (flags & UFFD_PAGEFAULT_FLAG_WP) != 0 ? bits | FM_FAULT_PROTECTED : bits;
}

static void fault(const struct uffd_msg *m)
{
    if (ours(m->arg.pagefault.address))
        fm_panic("the engine touched a frame without memory", __FILE__, __LINE__);
    resolve(m->arg.pagefault.address / FM_PAGE_BYTES, bits_of(m), fm_now_ns());
}

static void try_again(void)
{
    uint32_t n = reader.retries;
    struct fm_parked now[RETRIES_MAX];
    for (uint32_t k = 0; k < n; k++)
        now[k] = reader.retry[k];
    reader.retries = 0;
    for (uint32_t k = 0; k < n; k++)
        resolve(now[k].page, now[k].bits, now[k].since_ns);
}

/* ---- standing still for a fork --------------------------------------------------------------------------- */

/* False: there is nothing to read (and what had to wait for events has been tried again). */
static bool serve_one(void)
{
    struct uffd_msg m;
    int r = read_one(&m);
    if (r == 1)
        fault(&m);
    if (r < 0 && reader.retries > 0)
        try_again();
    return r >= 0;
}

/* The child's books are a copy of ours, taken page by page while the fork goes on: nothing may change in them
 * meanwhile.  But the forking thread may wait for a page, or for a lock of libc's whose holder waits for one: only
 * while it sleeps, which it does not in the system call, others are served. */
static void stand_still(void)
{
    __atomic_store_n(&fm.held, 1, __ATOMIC_SEQ_CST);
    fm_futex_wake(&fm.held, 1);
    while (__atomic_load_n(&fm.hold, __ATOMIC_SEQ_CST) != 0) {
        fm_futex_wait(&fm.hold, 1, HOLD_LOOK_NS);
        for (uint32_t k = 0; k < HOLD_READS && __atomic_load_n(&fm.hold, __ATOMIC_SEQ_CST) != 0 && fm_fork_sleeps(); k++)
            if (!serve_one())
                break;
    }
    __atomic_store_n(&fm.held, 0, __ATOMIC_SEQ_CST);
}

void fm_front_thread_hold(void)
{
    __atomic_store_n(&fm.hold, 1, __ATOMIC_SEQ_CST);
    /* Asleep in poll it is as good as still: it looks at hold before it reads. */
    while (__atomic_load_n(&fm.held, __ATOMIC_SEQ_CST) == 0 && __atomic_load_n(&fm.reader_waits, __ATOMIC_SEQ_CST) == 0)
        fm_futex_wait(&fm.held, 0, 100000);
}

void fm_front_thread_go_on(void)
{
    __atomic_store_n(&fm.hold, 0, __ATOMIC_SEQ_CST);
    fm_futex_wake(&fm.hold, 1);
}

void fm_front_thread_main(void *arg)
{
    struct pollfd p = { .fd = fm.uffd, .events = POLLIN };
    struct uffd_msg m;
    (void)arg;
    reader.retries = 0;
    reader.tid = fm_sys(SYS_gettid);
    for (uint32_t idle = 0;;) {
        if (__atomic_load_n(&fm.hold, __ATOMIC_SEQ_CST) != 0)
            stand_still();
        int r = read_one(&m);
        if (r == 1)
            fault(&m);
        if (r >= 0) {
            idle = 0;
            continue;
        }
        /* The queue is empty: what needed an event to be read first has had it. */
        if (reader.retries > 0) {
            try_again();
            if (reader.retries > 0)
                fm_sleep_ns(5000);
            continue;
        }
        /* The next fault often follows at once, and going to sleep costs more than looking a few times. */
        if (++idle < SPIN_READS) {
            __builtin_ia32_pause();
            continue;
        }
        idle = 0;
        __atomic_store_n(&fm.reader_waits, 1, __ATOMIC_SEQ_CST);
        fm_sys(SYS_poll, &p, 1, -1);
        __atomic_store_n(&fm.reader_waits, 0, __ATOMIC_SEQ_CST);
    }
}
