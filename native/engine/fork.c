/* fork.c - fork() is never silently wrong, for ordinary users too.
 *
 * Managed memory is MADV_DONTFORK, so a child that is made behind our back faults hard instead of reading zeros.  For
 * fork() the handlers of pthread_atfork lift that: the evictor stands still, everything staged is stored, the
 * child's counts on slots are taken; the child gets a userfaultfd and an engine of its own before fork() returns in it.
 * prepare, parent and child run on the program's thread, the rest on the evictor's and the child's engine threads.
 */
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "engine/engine.h"
#include "fm_assert.h"

#define SETTLE_TRIES 100000
#define VERDICT_NS 10000000000ull

static bool forking(void) { return fm.state == FM_ENGINE_ADOPTED && (fm.control->defects & FM_DEFECT_IGNORE_FORK) == 0; }

/* ---- the evictor's part ------------------------------------------------------------------------------- */

static bool anything_in_hand(struct fm_core *c)
{
    for (uint32_t f = 0; f < c->frames_n; f++)
        if (c->frame[f].kind == FM_FRAME_BUSY && c->frame[f].dirty)
            return true;
    return __atomic_load_n(&fm.io_busy, __ATOMIC_ACQUIRE) != 0 || c->limbo != NULL || c->debts.n != 0;
}

static uint32_t reserve_slot(void)
{
    for (uint32_t k = 0; k < FM_PROCS_MAX; k++) {
        struct fm_proc *p = &fm.control->procs[k];
        uint32_t is_free = FM_PROC_FREE;
        if (!__atomic_compare_exchange_n(&p->state, &is_free, FM_PROC_FORKING, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED))
            continue;
        p->pid = 0;
        p->parent_slot = fm.slot;
        p->fork_verdict = FM_VERDICT_NONE;
        p->adoptions = 1;                  /* it holds slots: the supervisor must reap it */
        return k;
    }
    return FM_SLOT_ANY;
}

/* An event that changes mappings, between the freeze and the child's copy, leaves the child with books that may not
 * be those of its memory.  It is told, and ends rather than to guess. */
static void judge_child(uint64_t events)
{
    struct fm_proc *p = &fm.control->procs[fm.fork_slot];
    while (fm_uffd_changing())
        fm_sleep_ns(20000);
    uint32_t verdict = __atomic_load_n(&fm.mm_events, __ATOMIC_ACQUIRE) == events ? FM_VERDICT_GO : FM_VERDICT_STOP;
    __atomic_store_n(&p->fork_verdict, verdict, __ATOMIC_RELEASE);
}

static void child_never_was(void)
{
    struct fm_proc *p = &fm.control->procs[fm.fork_slot];
    fm_pool_ledger_reap(fm.ledger_base, NULL, fm.fork_slot);
    __builtin_memset(&p->counters, 0, sizeof p->counters);
    __atomic_store_n(&p->state, FM_PROC_FREE, __ATOMIC_RELEASE);
}

void fm_fork_stand_still(void)
{
    struct fm_core *c = &fm.core;
    __atomic_add_fetch(&c->overdraft, 1, __ATOMIC_ACQ_REL);
    for (int k = 0; k < SETTLE_TRIES && anything_in_hand(c); k++) {
        fm_core_evict(c, 0);
        fm_sleep_ns(50000);
    }
    fm.fork_slot = reserve_slot();
    if (fm.fork_slot != FM_SLOT_ANY)
        fm_pool_ledger_fork(&c->ledger, fm.fork_slot);
    fm_managed_advise(MADV_DOFORK);
    uint64_t events = __atomic_load_n(&fm.mm_events, __ATOMIC_ACQUIRE);
    __atomic_store_n(&fm.frozen, 1, __ATOMIC_RELEASE);
    fm_futex_wake(&fm.frozen, 1);
    while (__atomic_load_n(&fm.thaw, __ATOMIC_ACQUIRE) == 0)
        fm_futex_wait(&fm.thaw, 0, -1);
    if (fm.fork_slot != FM_SLOT_ANY && fm.fork_failed)
        child_never_was();
    else if (fm.fork_slot != FM_SLOT_ANY)
        judge_child(events);
    fm_managed_advise(MADV_DONTFORK);
    fm_add(fm.proc->counters.forks, 1);
    __atomic_sub_fetch(&c->overdraft, 1, __ATOMIC_ACQ_REL);
    __atomic_store_n(&fm.frozen, 0, __ATOMIC_RELEASE);
    __atomic_store_n(&fm.thaw, 0, __ATOMIC_RELEASE);
    __atomic_store_n(&fm.freeze, 0, __ATOMIC_RELEASE);
    fm_futex_wake(&fm.freeze, 1);
}

/* ---- the program's thread ---------------------------------------------------------------------------------- */

/* libc walks its open streams in the child before our handler runs there: have them here by then.  Exported by glibc
 * for the old C++ library; absent elsewhere. */
extern void _IO_list_lock(void) __attribute__((weak));
extern void _IO_list_unlock(void) __attribute__((weak));
extern void *_IO_iter_begin(void) __attribute__((weak));
extern void *_IO_iter_end(void) __attribute__((weak));
extern void *_IO_iter_next(void *) __attribute__((weak));
extern FILE *_IO_iter_file(void *) __attribute__((weak));

static void touch_streams(void)
{
    if (_IO_list_lock == NULL || _IO_iter_begin == NULL || _IO_iter_file == NULL)
        return;
    _IO_list_lock();
    for (void *i = _IO_iter_begin(); i != _IO_iter_end(); i = _IO_iter_next(i)) {
        FILE *f = _IO_iter_file(i);
        if (f->_lock != NULL)
            (void)*(volatile char *)f->_lock;
    }
    _IO_list_unlock();
}

void fm_fork_prepare(void)
{
    if (fm.state == FM_ENGINE_NONE)
        return;
    fm_lock_take(&fm.fork_lock);
    if (!forking())
        return;
    __atomic_store_n(&fm.freeze, 1, __ATOMIC_RELEASE);
    fm_evictor_ring();
    while (__atomic_load_n(&fm.frozen, __ATOMIC_ACQUIRE) == 0)
        fm_futex_wait(&fm.frozen, 0, -1);
    touch_streams();
    /* libc does not tell the parent's handler that there is no child, but leaves the reason in errno. */
    fm.fork_errno = errno;
    errno = 0;
}

void fm_fork_parent(void)
{
    if (fm.state == FM_ENGINE_NONE)
        return;
    if (forking()) {
        fm.fork_failed = errno != 0;
        if (!fm.fork_failed)
            errno = fm.fork_errno;
        __atomic_store_n(&fm.thaw, 1, __ATOMIC_RELEASE);
        fm_futex_wake(&fm.thaw, 1);
        while (__atomic_load_n(&fm.freeze, __ATOMIC_ACQUIRE) != 0)
            fm_futex_wait(&fm.freeze, 1, -1);
    }
    fm_lock_drop(&fm.fork_lock);
}

/* ---- the child ------------------------------------------------------------------------------------------------ */

static bool parent_says_go(void)
{
    uint64_t begin = fm_now_ns();
    uint32_t verdict;
    while ((verdict = __atomic_load_n(&fm.proc->fork_verdict, __ATOMIC_ACQUIRE)) == FM_VERDICT_NONE &&
           fm_now_ns() - begin < VERDICT_NS)
        fm_sleep_ns(20000);
    return verdict == FM_VERDICT_GO;
}

static void child_main(void *arg)
{
    (void)arg;
    bool ok = fm.fork_slot != FM_SLOT_ANY && fm_descriptors_open() && fm_adopt_forked(fm.fork_slot) && parent_says_go();
    __atomic_store_n(&fm.child_ready, ok ? 1 : 2, __ATOMIC_RELEASE);
    fm_futex_wake(&fm.child_ready, 1);
    if (ok)
        fm_watch_loop();
}

static void reset_locks(void)
{
    fm_lock is_free = { 0 };
    fm.fork_lock = fm.heap_lock = fm.parked_lock = fm.discards_lock = is_free;
    fm.world = (fm_world){ 0 };
    fm.parked_n = fm.discards_n = 0;
    fm.bell = fm.evictor_sleeps = fm.freeze = fm.frozen = fm.thaw = 0;
    fm.io_busy = 0;
    fm.child_ready = 0;
    fm.keeper = false;
    fm_threads_reset();
}

/* Ends the child with a word: going on could show it wrong bytes. */
static void give_up(void)
{
    static const char text[] = "farmem: a forked child could not be given its memory and is ended\n";
    ssize_t ignored = write(2, text, sizeof text - 1);
    (void)ignored;
    fm_say(FM_LEVEL_ERROR, "a forked child could not be given its memory and is ended.", 0);
    _exit(125);
}

void fm_fork_child(void)
{
    if (fm.state == FM_ENGINE_NONE)
        return;
    bool managed = forking();
    reset_locks();
    fm.pid = (uint32_t)getpid();
    if (!managed) {
        if (fm.state == FM_ENGINE_WATCHING)
            fm_thread_start(fm_watch_main, NULL);
        return;
    }
    int saved = fm.fork_errno;
    if (!fm_thread_start(child_main, NULL))
        give_up();
    while (__atomic_load_n(&fm.child_ready, __ATOMIC_ACQUIRE) == 0)
        fm_futex_wait(&fm.child_ready, 0, -1);
    if (fm.child_ready != 1)
        give_up();
    errno = saved;
}
