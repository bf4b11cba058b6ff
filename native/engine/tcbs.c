/* tcbs.c - where the control blocks of the program's threads lie, living and dead: those pages must not be evicted.
 *
 * A living thread's because the kernel writes there when it ends, and can't wait for a page any more.  A dead one's
 * because libc keeps its stack for the next thread, with the lists that it walks in the child of a fork before
 * any handler of ours has run there.  So an address that was ever seen stays noted, and adoption leaves it out.
 * fm_keep_thread() runs on the program's threads, whose stacks may be managed: it takes no lock, or a fault on its own
 * stack could wait for it for ever.
 */
#include <stddef.h>

#include "engine/engine.h"

#define TCBS_MAX 1024u
#define ASKS_MAX 64u
#define CONTROL_BLOCK_BYTES 4096u      /* more than any libc's */

enum ask_state { ASK_FREE = 0, ASK_TAKEN, ASK_ASKED, ASK_ANSWERED };

static uint64_t seen[TCBS_MAX];        /* a hash table; entries never leave */
static struct {
    uint64_t tcb;
    uint32_t state;
} asks[ASKS_MAX];

static void pages_of(uint64_t tcb, uint64_t *start, uint64_t *end)
{
    uint64_t page = FM_PAGE_BYTES - 1;
    *start = (tcb - fm.tls_bytes) & ~page;
    *end = (tcb + CONTROL_BLOCK_BYTES + page) & ~page;
}

/* False: it was there already. */
static bool note(uint64_t tcb)
{
    uint32_t at = (uint32_t)((tcb >> 6) * 0x9e3779b97f4a7c15ull >> 54);
    for (uint32_t k = 0; k < TCBS_MAX; k++, at = (at + 1) % TCBS_MAX) {
        uint64_t was = __atomic_load_n(&seen[at], __ATOMIC_ACQUIRE);
        if (was == 0 && __atomic_compare_exchange_n(&seen[at], &was, tcb, false, __ATOMIC_SEQ_CST, __ATOMIC_ACQUIRE))
            return true;
        if (was == tcb)
            return false;
    }
    return true;                       /* full: as good as new each time */
}

void fm_tcb_note(uint64_t tcb) { (void)note(tcb); }

bool fm_tcb_next(uint32_t *at, uint64_t *start, uint64_t *end)
{
    for (; *at < TCBS_MAX; (*at)++) {
        uint64_t tcb = __atomic_load_n(&seen[*at], __ATOMIC_SEQ_CST);
        if (tcb == 0)
            continue;
        pages_of(tcb, start, end);
        (*at)++;
        return true;
    }
    return false;
}

/* ---- those that are managed already --------------------------------------------------------------------- */

static void keep_managed(uint64_t start, uint64_t end)
{
    uint64_t at = start / FM_PAGE_BYTES, last = end / FM_PAGE_BYTES;
    struct fm_range r;
    for (;;) {
        fm_world_share(&fm.world);
        bool some = at < last && fm_ranges_next(&fm.core.managed, at, last, &r);
        fm_world_unshare(&fm.world);
        if (!some)
            return;
        fm_core_keep(&fm.core, r.page, r.end - r.page);
        at = r.end;
    }
}

void fm_tcbs_keep(void)
{
    uint64_t start, end;
    for (uint32_t at = 0; fm_tcb_next(&at, &start, &end);)
        keep_managed(start, end);
}

/* On the evictor's thread, so that no page of them is on its way out. */
void fm_tcbs_answer(void)
{
    for (uint32_t k = 0; k < ASKS_MAX; k++) {
        uint64_t start, end;
        if (__atomic_load_n(&asks[k].state, __ATOMIC_ACQUIRE) != ASK_ASKED)
            continue;
        pages_of(asks[k].tcb, &start, &end);
        keep_managed(start, end);
        __atomic_store_n(&asks[k].state, ASK_ANSWERED, __ATOMIC_RELEASE);
        fm_futex_wake(&asks[k].state, 1);
    }
}

void fm_tcbs_reset(void)
{
    for (uint32_t k = 0; k < ASKS_MAX; k++)
        asks[k].state = ASK_FREE;
}

/* ---- a new thread, about itself -------------------------------------------------------------------------- */

static void ask(uint64_t tcb)
{
    uint32_t k = 0, is_free = ASK_FREE, now;
    while (!__atomic_compare_exchange_n(&asks[k].state, &is_free, ASK_TAKEN, false, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED)) {
        is_free = ASK_FREE;
        k = (k + 1) % ASKS_MAX;
        if (k == 0)
            fm_sleep_ns(100000);
    }
    asks[k].tcb = tcb;
    __atomic_store_n(&asks[k].state, ASK_ASKED, __ATOMIC_SEQ_CST);
    __atomic_fetch_or(&fm.freeze, FM_FREEZE_KEEP, __ATOMIC_SEQ_CST);
    fm_evictor_ring();
    while ((now = __atomic_load_n(&asks[k].state, __ATOMIC_ACQUIRE)) != ASK_ANSWERED)
        fm_futex_wait(&asks[k].state, now, -1);
    __atomic_store_n(&asks[k].state, ASK_FREE, __ATOMIC_RELEASE);
}

/* A stack that libc kept from a thread that we never saw, or one that the program gave, may be managed by now. */
void fm_keep_thread(uint64_t tcb)
{
    uint64_t start, end;
    if (!note(tcb) || __atomic_load_n(&fm.state, __ATOMIC_SEQ_CST) != FM_ENGINE_ADOPTED)
        return;
    ask(tcb);
    /* Kept from now on, and here: what left before comes back by being touched. */
    pages_of(tcb, &start, &end);
    for (uint64_t at = start + fm.tls_bytes % FM_PAGE_BYTES; at < tcb; at += FM_PAGE_BYTES)
        if (at >= tcb - fm.tls_bytes)
            (void)*(volatile char *)at;
    (void)*(volatile char *)tcb;
}
