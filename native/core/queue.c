/* queue.c - resident pages in the order in which they came: what the plain plan evicts first.
 *
 * A ring of runs of up to 64 pages.  A page has at most one entry (FM_QUEUED belongs to its address), so
 * the ring holds no more entries than there are resident pages; it grows when it is full.
 */
#include <stddef.h>

#include "core/core.h"
#include "fm_assert.h"

#define RUN_BITS 6
#define RUN_MAX (1u << RUN_BITS)
#define FIRST_CAP 4096u

static bool grow(struct fm_core *c)
{
    uint64_t cap = c->queue_cap == 0 ? FIRST_CAP : c->queue_cap * 2;
    uint64_t *q = c->ops->memory(c->ctx, NULL, 0, cap * sizeof *q);
    if (q == NULL)
        return false;
    for (uint64_t k = c->queue_head; k != c->queue_tail; k++)
        q[k & (cap - 1)] = c->queue[k & (c->queue_cap - 1)];
    if (c->queue != NULL)
        c->ops->memory(c->ctx, c->queue, c->queue_cap * sizeof *q, 0);
    c->queue = q;
    c->queue_cap = cap;
    return true;
}

static bool room(struct fm_core *c) { return c->queue_tail - c->queue_head < c->queue_cap || grow(c); }

/* Without memory for the ring the pages just stay resident: never wrong, only over budget. */
void fm_queue_push(struct fm_core *c, uint64_t page, uint32_t n)
{
    fm_lock_take(&c->queue_lock);
    while (n > 0 && room(c)) {
        uint32_t k = n < RUN_MAX ? n : RUN_MAX;
        c->queue[c->queue_tail++ & (c->queue_cap - 1)] = page << RUN_BITS | (k - 1);
        page += k;
        n -= k;
    }
    fm_lock_drop(&c->queue_lock);
}

bool fm_queue_pop(struct fm_core *c, uint64_t *page, uint32_t *n)
{
    fm_lock_take(&c->queue_lock);
    bool some = c->queue_head != c->queue_tail;
    if (some) {
        uint64_t e = c->queue[c->queue_head++ & (c->queue_cap - 1)];
        *page = e >> RUN_BITS;
        *n = (uint32_t)(e & (RUN_MAX - 1)) + 1;
    }
    fm_lock_drop(&c->queue_lock);
    return some;
}

uint64_t fm_queue_entries(struct fm_core *c)
{
    fm_lock_take(&c->queue_lock);
    uint64_t n = c->queue_tail - c->queue_head;
    fm_lock_drop(&c->queue_lock);
    return n;
}

void fm_queue_unpop(struct fm_core *c, uint64_t page, uint32_t n)
{
    fm_assert(n > 0 && n <= RUN_MAX);
    fm_lock_take(&c->queue_lock);
    if (room(c))
        c->queue[--c->queue_head & (c->queue_cap - 1)] = page << RUN_BITS | (n - 1);
    fm_lock_drop(&c->queue_lock);
}
