/* ranges.c - sorted lists of page ranges: what is registered with us, and what is owed an event.
 *
 * Few and merged, so arrays with a linear search do.  Changed only with the world held exclusively.
 */
#include <stddef.h>

#include "core/core.h"
#include "fm_assert.h"

static void insert(struct fm_core *c, struct fm_ranges *r, uint32_t k, struct fm_range what)
{
    if (r->n == r->cap) {
        uint32_t cap = r->cap == 0 ? 256 : r->cap * 2;
        struct fm_range *at = c->ops->memory(c->ctx, NULL, 0, cap * sizeof *at);
        fm_assert(at != NULL);        /* without the list our picture of the address space is wrong: stop */
        for (uint32_t j = 0; j < r->n; j++)
            at[j] = r->at[j];
        if (r->at != NULL)
            c->ops->memory(c->ctx, r->at, r->cap * sizeof *at, 0);
        r->at = at;
        r->cap = cap;
    }
    for (uint32_t j = r->n; j > k; j--)
        r->at[j] = r->at[j - 1];
    r->at[k] = what;
    r->n++;
}

static void take_out(struct fm_ranges *r, uint32_t k)
{
    for (uint32_t j = k; j + 1 < r->n; j++)
        r->at[j] = r->at[j + 1];
    r->n--;
}

void fm_ranges_add(struct fm_core *c, struct fm_ranges *r, uint64_t page, uint64_t end)
{
    uint32_t k = 0;
    fm_assert(page < end);
    while (k < r->n && r->at[k].end < page)
        k++;
    while (k < r->n && r->at[k].page <= end) {
        page = r->at[k].page < page ? r->at[k].page : page;
        end = r->at[k].end > end ? r->at[k].end : end;
        take_out(r, k);
    }
    insert(c, r, k, (struct fm_range){ page, end });
}

void fm_ranges_cut(struct fm_core *c, struct fm_ranges *r, uint64_t page, uint64_t end)
{
    for (uint32_t k = 0; k < r->n;) {
        struct fm_range was = r->at[k];
        if (was.end <= page || was.page >= end) {
            k++;
            continue;
        }
        take_out(r, k);
        if (was.page < page)
            insert(c, r, k++, (struct fm_range){ was.page, page });
        if (was.end > end)
            insert(c, r, k++, (struct fm_range){ end, was.end });
    }
}

void fm_ranges_put(struct fm_core *c, struct fm_ranges *r, uint64_t page, uint64_t end)
{
    uint32_t k = 0;
    fm_assert(page < end);
    fm_ranges_cut(c, r, page, end);
    while (k < r->n && r->at[k].page < page)
        k++;
    insert(c, r, k, (struct fm_range){ page, end });
}

bool fm_ranges_next(const struct fm_ranges *r, uint64_t page, uint64_t end, struct fm_range *piece)
{
    for (uint32_t k = 0; k < r->n && r->at[k].page < end; k++) {
        if (r->at[k].end <= page)
            continue;
        piece->page = r->at[k].page > page ? r->at[k].page : page;
        piece->end = r->at[k].end < end ? r->at[k].end : end;
        return true;
    }
    return false;
}
