/* asked.c - what a program asks for its own pages: to stay (pins), to be counted, to leave staging.
 *
 * Called on the evictor's thread, so that none of the pages is on its way out meanwhile; nothing here waits.  Bringing
 * pages is in fault.c, sending them away in evict.c.
 */
#include <stddef.h>

#include "core/core.h"
#include "fm_assert.h"

/* How many of n pages from page on lie in its block. */
static uint32_t part(uint64_t page, uint64_t n)
{
    uint32_t left = FM_BLOCK_PAGES - (uint32_t)(page % FM_BLOCK_PAGES);
    return n < left ? (uint32_t)n : left;
}

/* Inside the block of a page, if it has a record; else the world alone is entered and must be left. */
static struct fm_block *enter_known(struct fm_core *c, uint64_t page)
{
    c->ops->enter(c->ctx);
    struct fm_block *b = fm_block_find(c, page);
    if (b != NULL)
        fm_lock_take(&b->lock);
    return b;
}

static void leave_known(struct fm_core *c, struct fm_block *b)
{
    if (b != NULL)
        fm_lock_drop(&b->lock);
    c->ops->leave(c->ctx);
}

/* ---- counting ------------------------------------------------------------------------------------ */

/* A resident page that was discarded, or dropped, may have gone; then it holds nothing. */
static bool has_gone(struct fm_core *c, const struct fm_block *b, uint32_t i)
{
    uint64_t there;
    if (!fm_missing_means_zeros(b, i) && !fm_missing_means_remote(b, i))
        return false;
    c->ops->present(c->ctx, b->page + i, 1, &there);
    return (there & 1) == 0;
}

static void tally_page(struct fm_core *c, const struct fm_block *b, uint32_t i, struct fm_tally *t)
{
    t->pinned += (b->flags[i] & FM_PINNED) != 0;
    switch ((enum fm_state)b->state[i]) {
    case FM_FRESH:
        t->fresh++;
        break;
    case FM_RESIDENT:
        if (!has_gone(c, b, i))
            t->resident++;
        else if (fm_missing_means_remote(b, i))
            t->remote++;
        else
            t->fresh++;
        break;
    case FM_REMOTE:
        t->remote++;
        break;
    case FM_LOST:
        t->lost++;
        if (b->page + i < t->first_lost)
            t->first_lost = b->page + i;
        break;
    default:
        t->moving++;
        break;
    }
}

void fm_core_tally(struct fm_core *c, uint64_t page, uint64_t n, struct fm_tally *t)
{
    for (uint32_t k; n > 0; page += k, n -= k) {
        k = part(page, n);
        struct fm_block *b = enter_known(c, page);
        uint32_t i = (uint32_t)(page % FM_BLOCK_PAGES);
        for (uint32_t j = i; b != NULL && j < i + k; j++)
            tally_page(c, b, j, t);
        t->fresh += b == NULL ? k : 0;
        leave_known(c, b);
    }
}

/* ---- pins ------------------------------------------------------------------------------------------ */

bool fm_core_pin(struct fm_core *c, uint64_t page, uint64_t n)
{
    for (uint32_t k; n > 0; page += k, n -= k) {
        k = part(page, n);
        struct fm_block *b = fm_block_enter_made(c, page);
        if (b == NULL)
            return false;
        uint32_t i = (uint32_t)(page % FM_BLOCK_PAGES);
        for (uint32_t j = i; j < i + k; j++) {
            if ((b->flags[j] & FM_PINNED) == 0)
                __atomic_add_fetch(&c->pinned_pages, 1, __ATOMIC_RELAXED);
            b->flags[j] |= FM_PINNED;
        }
        fm_block_leave(c, b);
    }
    return true;
}

void fm_core_unpin(struct fm_core *c, uint64_t page, uint64_t n)
{
    for (uint32_t k; n > 0; page += k, n -= k) {
        k = part(page, n);
        struct fm_block *b = enter_known(c, page);
        uint32_t i = (uint32_t)(page % FM_BLOCK_PAGES);
        for (uint32_t j = i; b != NULL && j < i + k; j++) {
            fm_flags_cut(c, b, j, (uint16_t)~FM_PINNED);
            if (b->state[j] == FM_RESIDENT)
                fm_page_resident(c, b, j, 1);      /* its turn to be evicted comes again */
        }
        leave_known(c, b);
    }
}

/* ---- leaving staging --------------------------------------------------------------------------------- */

/* True: the page is not on its way any more. */
static bool out_of_staging(struct fm_core *c, struct fm_block *b, uint32_t i)
{
    switch ((enum fm_state)b->state[i]) {
    case FM_STAGED:
        return fm_page_reclaim(c, b, i);
    case FM_LEAVING:
    case FM_ARRIVING:
        return false;
    default:
        return true;
    }
}

bool fm_core_leave_staging(struct fm_core *c, uint64_t page, uint64_t n)
{
    bool all = true;
    for (uint32_t k; n > 0; page += k, n -= k) {
        k = part(page, n);
        struct fm_block *b = enter_known(c, page);
        uint32_t i = (uint32_t)(page % FM_BLOCK_PAGES);
        for (uint32_t j = i; b != NULL && j < i + k; j++)
            all = out_of_staging(c, b, j) && all;
        leave_known(c, b);
    }
    return all;
}

bool fm_core_stayed(struct fm_core *c, uint64_t page, uint64_t n)
{
    uint64_t there;
    bool some = false;
    for (uint32_t k; n > 0 && !some; page += k, n -= k) {
        k = part(page, n);
        struct fm_block *b = enter_known(c, page);
        uint32_t i = (uint32_t)(page % FM_BLOCK_PAGES);
        for (uint32_t j = i; b != NULL && j < i + k && !some; j++) {
            if (b->state[j] != FM_RESIDENT || (b->flags[j] & FM_LAZY) == 0)
                continue;
            c->ops->present(c->ctx, b->page + j, 1, &there);
            some = (there & 1) != 0;
        }
        leave_known(c, b);
    }
    return some;
}
