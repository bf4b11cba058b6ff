/* fork.c - fork() is never silently wrong, for ordinary users too.
 *
 * Managed memory is MADV_DONTFORK, so a child that is made behind our back faults hard instead of reading zeros.  For
 * fork() the handlers of pthread_atfork lift that (preload/raw_fork.c calls them for other ways to make a child): the
 * evictor stands still, everything staged is stored, the child's counts on slots are taken; the child gets a userfaultfd
 * and an engine of its own before fork() returns in it.
 * prepare, parent and child run on the program's thread, the rest on the evictor's and the child's engine threads.
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "engine/engine.h"
#include "fm_assert.h"

#define SETTLE_NS 5000000000ull
#define SETTLE_STEP_NS 50000
#define VERDICT_NS 10000000000ull
#define SCAN_TRIES 1000
#define LOOK_NS 1000000
#define GATE_LOOK_NS 200000
#define GATE_STEP_NS 20000

static bool forking(void) { return fm.state == FM_ENGINE_ADOPTED && (fm.control->defects & FM_DEFECT_IGNORE_FORK) == 0; }

/* ---- the evictor's part ------------------------------------------------------------------------------- */

static bool anything_in_hand(struct fm_core *c)
{
    /* Fetches don't count: the child can fetch for itself, and a busy program has always some under way. */
    for (uint32_t f = 0; f < c->frames_n; f++)
        if (c->frame[f].kind == FM_FRAME_BUSY && c->frame[f].dirty)
            return true;
    return c->limbo != NULL || c->debts.n != 0;
}

static void raise_high(uint32_t n)
{
    uint32_t *high = &fm.control->procs_high, was = __atomic_load_n(high, __ATOMIC_ACQUIRE);
    while (was < n && !__atomic_compare_exchange_n(high, &was, n, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
        continue;
}

static uint32_t reserve_slot(void)
{
    for (uint32_t k = 0; k < FM_PROCS_MAX; k++) {
        struct fm_proc *p = &fm.control->procs[k];
        uint32_t is_free = FM_PROC_FREE;
        if (!__atomic_compare_exchange_n(&p->state, &is_free, FM_PROC_FORKING, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED))
            continue;
        raise_high(k + 1);
        p->pid = 0;
        p->parent_slot = fm.slot;
        p->fork_verdict = FM_VERDICT_NONE;
        p->adopted = 1;                    /* it holds slots: the supervisor must reap it */
        return k;
    }
    return FM_SLOT_ANY;
}

/* Mappings that went away between the freeze and the child's copy: the child settles them by looking whether it has
 * them.  Where something moved to is not to be known: then it is told to end rather than to guess. */
static bool child_can_settle(struct fm_proc *p)
{
    if (fm.fork_unmaps_n > FM_FORK_UNMAPS)
        return false;
    for (uint32_t k = 0; k < fm.fork_unmaps_n; k++) {
        p->fork_unmaps[2 * k] = fm.fork_unmaps[k].page;
        p->fork_unmaps[2 * k + 1] = fm.fork_unmaps[k].end;
    }
    p->fork_unmaps_n = fm.fork_unmaps_n;
    return true;
}

static void judge_child(uint64_t remaps)
{
    struct fm_proc *p = &fm.control->procs[fm.fork_slot];
    while (fm_uffd_changing())
        fm_sleep_ns(20000);
    bool go = __atomic_load_n(&fm.remaps, __ATOMIC_ACQUIRE) == remaps && child_can_settle(p);
    __atomic_store_n(&p->fork_verdict, go ? FM_VERDICT_GO : FM_VERDICT_STOP, __ATOMIC_RELEASE);
}

/* Whoever changes the slot's state first has it: should there be a child after all, it finds its slot gone, and ends. */
static void child_never_was(void)
{
    struct fm_proc *p = &fm.control->procs[fm.fork_slot];
    uint32_t reserved = FM_PROC_FORKING;
    if (!__atomic_compare_exchange_n(&p->state, &reserved, FM_PROC_DEAD, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED))
        return;
    fm_pool_ledger_reap(fm.ledger_base, fm.fork_slot, 0);
    __builtin_memset(&p->counters, 0, sizeof p->counters);
    __atomic_store_n(&p->state, FM_PROC_FREE, __ATOMIC_RELEASE);
}

/* A mapping that has grown in place is managed as a whole by the kernel, and by us only when we have looked: the child
 * would not get the rest. */
static void take_in_the_grown(void)
{
    for (int k = 0; k < SCAN_TRIES && !fm_adopt_scan(); k++)
        fm_sleep_ns(50000);
}

/* With the world shared no event is applied, so no slot is released and no range goes while we walk them. */
static void prepare_child(struct fm_core *c)
{
    fm.fork_slot = reserve_slot();
    fm_world_share(&fm.world);
    if (fm.fork_slot != FM_SLOT_ANY)
        fm_pool_ledger_fork(&c->ledger, fm.fork_slot);
    fm_core_copying(c, true);
    fm_managed_advise(MADV_DOFORK);
    fm_world_unshare(&fm.world);
}

/* The evictor's work on behalf of others while it stands still: faults that found no frame try again by themselves. */
static void wait_for_thaw(void)
{
    while (__atomic_load_n(&fm.thaw, __ATOMIC_ACQUIRE) == 0) {
        fm_lock_take(&fm.parked_lock);
        for (uint32_t k = 0; k < fm.parked_n; k++)
            fm_engine_ops.wake(NULL, fm.parked[k].page, 1);
        fm.parked_n = 0;
        fm_lock_drop(&fm.parked_lock);
        fm_tcbs_answer();
        fm_futex_wait(&fm.thaw, 0, LOOK_NS);
    }
}

/* Transfers that end on threads of the pool's own change the books: none may while a fork copies them.  The forking
 * thread itself may wait for one, though, or for a lock whose holder does.  Not for the reader, which is held otherwise. */
void fm_fork_gate_in(void)
{
    for (;;) {
        __atomic_add_fetch(&fm.completing, 1, __ATOMIC_SEQ_CST);
        bool held = __atomic_load_n(&fm.hold, __ATOMIC_SEQ_CST) != 0;
        if (!held || (__atomic_load_n(&fm.frozen, __ATOMIC_SEQ_CST) != 0 && fm_fork_sleeps()))
            return;
        fm_fork_gate_out();
        fm_futex_wait(&fm.hold, 1, GATE_LOOK_NS);
    }
}

void fm_fork_gate_out(void) { __atomic_sub_fetch(&fm.completing, 1, __ATOMIC_SEQ_CST); }

static void wait_for_gate(void)
{
    while (__atomic_load_n(&fm.completing, __ATOMIC_SEQ_CST) != 0)
        fm_sleep_ns(GATE_STEP_NS);
}

static void stand_still(void)
{
    struct fm_core *c = &fm.core;
    __atomic_add_fetch(&c->overdraft, 1, __ATOMIC_ACQ_REL);
    take_in_the_grown();
    /* What is only in a frame would be lost to the child: a server that is slow is waited for as long as for a fault. */
    uint64_t until = fm_now_ns() + SETTLE_NS + fm.control->pool_servers[0].timeout_ns;
    while (anything_in_hand(c) && fm_now_ns() < until) {
        fm_core_evict(c, 0);
        fm_sleep_ns(SETTLE_STEP_NS);
    }
    fm_front_thread_hold();
    wait_for_gate();
    prepare_child(c);
    uint64_t remaps = __atomic_load_n(&fm.remaps, __ATOMIC_ACQUIRE);
    fm.fork_unmaps_n = 0;
    __atomic_store_n(&fm.frozen, 1, __ATOMIC_RELEASE);
    fm_futex_wake(&fm.frozen, 1);
    wait_for_thaw();
    fm_front_thread_go_on();
    if (fm.fork_slot != FM_SLOT_ANY && fm.fork_failed)
        child_never_was();
    else if (fm.fork_slot != FM_SLOT_ANY)
        judge_child(remaps);
    fm_world_share(&fm.world);
    fm_core_copying(c, false);
    fm_managed_advise(MADV_DONTFORK);
    fm_world_unshare(&fm.world);
    fm_add(fm.proc->counters.forks, 1);
    __atomic_sub_fetch(&c->overdraft, 1, __ATOMIC_ACQ_REL);
    __atomic_store_n(&fm.frozen, 0, __ATOMIC_RELEASE);
    __atomic_store_n(&fm.thaw, 0, __ATOMIC_RELEASE);
    __atomic_fetch_and(&fm.freeze, ~(uint32_t)FM_FREEZE_FORK, __ATOMIC_SEQ_CST);
    fm_futex_wake(&fm.freeze, 1);
}

void fm_fork_stand_still(void)
{
    uint32_t asked = __atomic_fetch_and(&fm.freeze, ~(uint32_t)FM_FREEZE_KEEP, __ATOMIC_SEQ_CST);
    if ((asked & FM_FREEZE_KEEP) != 0)
        fm_tcbs_answer();
    if ((asked & FM_FREEZE_FORK) != 0)
        stand_still();
}

/* libc takes locks on the way to its system call, malloc's among them, and whoever holds one of them may itself wait for a
 * page.  In the call, while memory is copied, a thread runs or sleeps uninterruptibly; in a lock it sleeps. */
bool fm_fork_sleeps(void)
{
    char name[32], text[64];
    uint32_t n = fm_put_number(name, 0, fm.fork_tid, 10);
    __builtin_memcpy(name + n, "/stat", 6);
    long fd = fm_sys(SYS_openat, fm.tasks, name, O_RDONLY | O_CLOEXEC);
    long got = fd >= 0 ? fm_sys(SYS_read, fd, text, sizeof text - 1) : 0;
    if (fd >= 0)
        fm_sys(SYS_close, fd);
    text[got > 0 ? got : 0] = 0;
    const char *end = strrchr(text, ')');     /* "TID (NAME) STATE ...": a name is 15 characters at most */
    return end != NULL && end[1] == ' ' && end[2] == 'S';
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

/* From the freeze until the child has its memory no handler of the program's may run: it could fork in turn, and wait
 * for itself; or run in the child, where nothing is managed yet.  Faults can't be held back. */
static uint64_t block_signals(void)
{
    uint64_t all = ~0ull, old = 0;
    for (const char *s = (const char[]){ SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP, SIGSYS, 0 }; *s != 0; s++)
        all &= ~(1ull << (*s - 1));
    fm_sys(SYS_rt_sigprocmask, SIG_BLOCK, &all, &old, 8);
    return old;
}

static void restore_signals(uint64_t mask) { fm_sys(SYS_rt_sigprocmask, SIG_SETMASK, &mask, NULL, 8); }

void fm_fork_prepare(void)
{
    if (fm.state == FM_ENGINE_NONE)
        return;
    uint64_t mask = block_signals();
    fm_lock_take(&fm.fork_lock);
    fm.fork_signals = mask;
    if (!forking())
        return;
    fm.fork_tid = (uint32_t)fm_sys(SYS_gettid);
    __atomic_fetch_or(&fm.freeze, FM_FREEZE_FORK, __ATOMIC_SEQ_CST);
    fm_evictor_ring();
    while (__atomic_load_n(&fm.frozen, __ATOMIC_ACQUIRE) == 0)
        fm_futex_wait(&fm.frozen, 0, -1);
    /* libc does not tell the parent's handler that there is no child, but leaves the reason in errno. */
    fm.fork_errno = errno;
    errno = 0;
}

void fm_fork_prepare_libc(void)
{
    fm_fork_prepare();
    if (fm.state != FM_ENGINE_NONE && forking())
        touch_streams();
}

void fm_fork_parent(void)
{
    uint64_t mask = fm.fork_signals;
    if (fm.state == FM_ENGINE_NONE)
        return;
    __atomic_store_n(&fm.shares_memory, 1, __ATOMIC_RELAXED);
    if (forking()) {
        /* Anything else was left behind by somebody's handler. */
        fm.fork_failed = errno == EAGAIN || errno == ENOMEM || errno == EPERM || errno == ENOSYS;
        if (!fm.fork_failed)
            errno = fm.fork_errno;
        __atomic_store_n(&fm.thaw, 1, __ATOMIC_RELEASE);
        fm_futex_wake(&fm.thaw, 1);
        uint32_t seen;
        while (((seen = __atomic_load_n(&fm.freeze, __ATOMIC_ACQUIRE)) & FM_FREEZE_FORK) != 0)
            fm_futex_wait(&fm.freeze, seen, -1);
    }
    fm_lock_drop(&fm.fork_lock);
    restore_signals(mask);
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

static bool any_remote(uint64_t page, uint64_t end)
{
    for (; page < end; page++) {
        struct fm_block *b = fm_block_find(&fm.core, page);
        if (b != NULL && b->state[page % FM_BLOCK_PAGES] == FM_REMOTE)
            return true;
    }
    return false;
}

/* A range that the child has may be the old mapping (the copy was first) or a new one in its place.  Pages that are
 * here, and zeros, are right for both; old bytes in the pool would be wrong for the new one. */
static bool settle_unmapped(void)
{
    bool ok = true;
    for (uint32_t k = 0; k < fm.proc->fork_unmaps_n; k++) {
        uint64_t page = fm.proc->fork_unmaps[2 * k], end = fm.proc->fork_unmaps[2 * k + 1];
        fm_world_take(&fm.world);
        if (!fm_mapped(page * FM_PAGE_BYTES, end * FM_PAGE_BYTES))
            fm_core_unmapped(&fm.core, page, end - page);
        else if (any_remote(page, end))
            ok = false;
        fm_world_release(&fm.world);
    }
    return ok;
}

static void child_main(void *arg)
{
    (void)arg;
    bool ok = fm.fork_slot != FM_SLOT_ANY && fm_descriptors_open() && fm_adopt_forked(fm.fork_slot) &&
              parent_says_go() && settle_unmapped();
    fm_usage_reset();
    if (ok)
        fm_watch_look();       /* the others' shares are less from now on, not when this thread happens to run again */
    __atomic_store_n(&fm.child_ready, ok ? 1 : 2, __ATOMIC_RELEASE);
    fm_futex_wake(&fm.child_ready, 1);
    if (ok)
        fm_watch_loop();
}

static void reset_locks(void)
{
    fm_lock is_free = { 0 };
    fm.fork_lock = fm.heap_lock = fm.parked_lock = fm.discards_lock = fm.own_events = is_free;
    fm.world = (fm_world){ 0 };
    fm.parked_n = fm.discards_n = 0;
    fm.bell = fm.evictor_sleeps = fm.freeze = fm.frozen = fm.thaw = 0;
    fm.hold = fm.held = fm.reader_waits = 0;
    fm.io_busy = fm.completing = fm.looking = 0;
    fm.child_ready = 0;
    fm.keeper = false;
    fm_threads_reset();
    fm_tcbs_reset();
}

/* Ends the child: going on could show it wrong bytes.  The word goes to the supervisor; the child's stderr may be full. */
static void give_up(void)
{
    fm_say(FM_LEVEL_ERROR, "a forked child could not be given its memory and is ended.", 0);
    _exit(125);
}

void fm_fork_child(void)
{
    if (fm.state == FM_ENGINE_NONE)
        return;
    bool managed = forking();
    uint64_t mask = fm.fork_signals;
    reset_locks();
    fm.shares_memory = 1;
    fm_region_forked(managed);
    fm.pid = (uint32_t)getpid();
    if (!managed) {
        if (fm.state == FM_ENGINE_WATCHING)
            fm_thread_start(fm_watch_main, NULL);
        restore_signals(mask);
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
    restore_signals(mask);
}
