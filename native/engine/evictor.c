/* evictor.c - the evictor's thread: keeps head-room, so that a fault waits only when there is no frame at all.
 *
 * The only thread that evicts, drops and gives memory back, because those can wait for events to be read, and the
 * thread that reads them waits for nobody.  It also tries parked faults again, and stands still for a fork.
 */
#include <stddef.h>

#include "engine/engine.h"
#include "fm_assert.h"

#define BATCH 64u
#define IDLE_NS 20000000
#define FULL_FORGOTTEN_NS 60000000000ull
#define REFUSALS 64u              /* so many stores must have failed in a row */
#define REFUSED_NS 10000000ull
#define GIVEN_NS 1000000000ull
#define GROWING_NS 50000000ull    /* the same, where the pool is about to become larger */

void fm_evictor_ring(void)
{
    __atomic_add_fetch(&fm.bell, 1, __ATOMIC_ACQ_REL);
    if (__atomic_load_n(&fm.evictor_sleeps, __ATOMIC_ACQUIRE) != 0)
        fm_futex_wake(&fm.bell, 1);
}

void fm_park(uint64_t page, uint32_t bits, uint64_t since_ns)
{
    fm_lock_take(&fm.parked_lock);
    bool room = fm.parked_n < FM_PARKED_MAX;
    if (room)
        fm.parked[fm.parked_n++] = (struct fm_parked){ page, bits, since_ns };
    fm_lock_drop(&fm.parked_lock);
    if (!room)      /* it faults again, and by then there may be */
        fm_engine_ops.wake(NULL, page, 1);
    fm_evictor_ring();
}

static void retry_parked(void)
{
    struct fm_parked mine[64];
    uint32_t n = 0;
    if (__atomic_load_n(&fm.parked_n, __ATOMIC_ACQUIRE) == 0)
        return;
    fm_lock_take(&fm.parked_lock);
    while (n < 64 && fm.parked_n > 0)
        mine[n++] = fm.parked[--fm.parked_n];
    fm_lock_drop(&fm.parked_lock);
    for (uint32_t k = 0; k < n; k++) {
        enum fm_fault_result r = fm_core_fault(&fm.core, mine[k].page, mine[k].bits);
        if (r == FM_FAULT_RETRY)
            fm_engine_ops.wake(NULL, mine[k].page, 1);     /* the reader deals with what is pending, then with it */
        else if (r == FM_FAULT_NO_FRAME)
            fm_park(mine[k].page, mine[k].bits, mine[k].since_ns);
        else
            fm_add(fm.proc->counters.stall_ns, fm_now_ns() - mine[k].since_ns);
    }
}

static bool pool_grows(void) { return __atomic_load_n(&fm.control->pool_grows, __ATOMIC_RELAXED) != 0; }

/* Once, and again only when it has not been full for long. */
static void tell_when_full(void)
{
    static uint64_t full_ns;
    uint64_t before = full_ns;
    if (pool_grows())
        return;
    full_ns = fm_now_ns();
    if (before != 0 && full_ns - before < FULL_FORGOTTEN_NS)
        return;
    const char *why = fm.chain.full;
    fm_say(FM_LEVEL_WARNING, why != NULL ? why : "the pool is full: pages stay local, over the budget.", fm.chain.full_errno);
}

/* When nothing more can leave, what is here now is as near to the budget as can be: from then on pages are only
 * exchanged.  To go on emptying staging would only slow the program down. */
static struct {
    int64_t pages;
    uint64_t until_ns;
} given;

static int64_t room_of(const struct fm_core *c)
{
    int64_t limit = __atomic_load_n(&c->limit_pages, __ATOMIC_RELAXED);
    int64_t local = __atomic_load_n(&c->local_pages, __ATOMIC_RELAXED);
    if (given.until_ns != 0 && limit < given.pages && fm_now_ns() < given.until_ns)
        limit = given.pages;
    return limit - local;
}

/* The pool refuses whatever it is given (a device that fails, say): as good as full, but tried now and then. */
static bool refuses(struct fm_core *c) { return __atomic_load_n(&c->failed_stores, __ATOMIC_RELAXED) >= REFUSALS; }

static bool evict(struct fm_core *c)
{
    static uint64_t tried_ns;
    uint64_t now = fm_now_ns();
    if (refuses(c) && now - tried_ns < REFUSED_NS)
        return false;
    tried_ns = now;
    enum fm_evict_result r = fm_core_evict(c, refuses(c) ? 1 : BATCH);
    if (r == FM_EVICT_FULL || refuses(c)) {
        given.pages = __atomic_load_n(&c->local_pages, __ATOMIC_RELAXED);
        given.until_ns = now + (pool_grows() ? GROWING_NS : GIVEN_NS);
    }
    if (r == FM_EVICT_FULL)
        tell_when_full();
    if (r == FM_EVICT_RETRY)
        fm_sleep_ns(20000);
    return !refuses(c) && (r == FM_EVICT_DONE || r == FM_EVICT_RETRY);
}

/* How many empty frames call for an eviction: staging fills up as the budget runs out, and from then on each frame that a
 * fault empties is filled again.  Frames that others may read are never taken for a fetch, so some are left empty. */
static uint32_t empty_enough(const struct fm_core *c, int64_t room)
{
    if (room < 0)
        return 1;
    return c->frames_shared ? 3 * BATCH : BATCH / 2;
}

/* One step towards the budget.  False: nothing to do, or nothing can be done now. */
static bool step(struct fm_core *c)
{
    int64_t room = room_of(c);
    bool copying = !c->can_move || c->evict_mode == FM_EVICT_COPY;
    bool did = false;
    if (fm_frames_of(c, FM_FRAME_DEAD) > 0)
        did = fm_core_shrink(c, fm_frames_of(c, FM_FRAME_DEAD)) > 0;
    if (__atomic_load_n(&c->drops_n, __ATOMIC_ACQUIRE) > 0)
        fm_core_evict(c, 0);
    if (room >= (int64_t)FM_FRAMES)
        return did;
    if (copying ? room < (int64_t)FM_FRAMES / 2 : fm_frames_of(c, FM_FRAME_EMPTY) >= empty_enough(c, room))
        did |= evict(c);
    if (room < 0)
        did |= fm_core_shrink(c, -room < (int64_t)BATCH ? (uint32_t)-room : BATCH) > 0;
    else if (c->frames_shared && (room < (int64_t)BATCH || fm_frames_of(c, FM_FRAME_EMPTY) < BATCH))
        did |= fm_core_shrink(c, BATCH) > 0;
    return did;
}

/* Nothing can leave (all pinned or locked, the pool is full): whoever waits for a frame gets one over the budget. */
static void give_over_budget(struct fm_core *c)
{
    if (!refuses(c) && __atomic_load_n(&fm.io_busy, __ATOMIC_ACQUIRE) != 0)
        return;
    __atomic_add_fetch(&c->overdraft, 1, __ATOMIC_ACQ_REL);
    retry_parked();
    fm_region_serve();
    __atomic_sub_fetch(&c->overdraft, 1, __ATOMIC_ACQ_REL);
}

void fm_evictor_main(void *arg)
{
    struct fm_core *c = &fm.core;
    (void)arg;
    for (;;) {
        uint32_t seen = __atomic_load_n(&fm.bell, __ATOMIC_ACQUIRE);
        if (__atomic_load_n(&fm.freeze, __ATOMIC_ACQUIRE) != 0) {
            fm_fork_stand_still();
            continue;
        }
        bool did = step(c);
        retry_parked();
        did |= fm_region_serve();
        if (did)
            continue;
        if (__atomic_load_n(&fm.parked_n, __ATOMIC_ACQUIRE) > 0 || fm_region_starved())
            give_over_budget(c);
        __atomic_store_n(&fm.evictor_sleeps, 1, __ATOMIC_SEQ_CST);
        int64_t wait = fm.parked_n > 0 ? 1000000 : IDLE_NS;
        fm_futex_wait(&fm.bell, seen, wait);
        __atomic_store_n(&fm.evictor_sleeps, 0, __ATOMIC_SEQ_CST);
    }
}
