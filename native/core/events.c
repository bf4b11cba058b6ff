/* events.c - what the program does to its address space: discard, unmap, move.
 *
 * Called with the world held exclusively, by the thread that read the event, in the same critical section; nothing
 * here changes residency or waits.  Two threads' events can be read in another order than that in which
 * the kernel acted.  If a mapping is moved onto a range that by our books is still in use, then the
 * event that ends the old use is still to come: the old records wait for it in limbo, and the
 * range is noted as a debt, so that the late event does not hit the new pages.
 */
#include <stddef.h>

#include "core/core.h"
#include "fm_assert.h"

/* Calls for each block's part of a range; skips what has no record. */
struct walk {
    uint64_t page, end;       /* what is left */
    struct fm_block *b;
    uint32_t i, n;
};

static bool walk_next(struct fm_core *c, struct walk *w)
{
    while (w->page < w->end) {
        uint64_t no = w->page / FM_BLOCK_PAGES;
        uint64_t leaf_end = ((no >> FM_TABLE_BITS) + 1) << FM_TABLE_BITS;
        if (no >= (uint64_t)FM_TABLE_SIZE * FM_TABLE_SIZE)
            return false;
        if (c->table[no >> FM_TABLE_BITS] == NULL) {
            w->page = leaf_end * FM_BLOCK_PAGES;
            continue;
        }
        w->b = fm_block_find(c, w->page);
        w->i = (uint32_t)(w->page % FM_BLOCK_PAGES);
        uint64_t left = w->end - w->page;
        w->n = left < FM_BLOCK_PAGES - w->i ? (uint32_t)left : FM_BLOCK_PAGES - w->i;
        w->page += w->n;
        if (w->b != NULL)
            return true;
    }
    return false;
}

/* ---- discard ----------------------------------------------------------------------------------- */

void fm_page_discarded(struct fm_core *c, struct fm_block *b, uint32_t i)
{
    b->flags[i] |= fm_defect(c, SKIP_ZAPPING) ? FM_DISCARDED : FM_DISCARDED | FM_ZAPPING;
    b->zap_turn = __atomic_load_n(&c->zap_turn, __ATOMIC_ACQUIRE);
    if (b->state[i] == FM_RESIDENT) {
        fm_slot_detach(c, b, i);
        b->flags[i] &= (uint16_t)~FM_LAZY;
    }
}

/* One event is our own drop's, whatever was moved to that place meanwhile: it takes nothing from a page that is not there.
 * Should the program discard the page at the same time there are two, and it does not matter which is taken for which. */
static bool own_event(struct fm_core *c, struct fm_block *b, uint32_t i)
{
    uint64_t k = b->page + i - c->freeing.page;
    if ((c->own_events >> k & 1) == 0)
        return false;
    c->own_events &= ~(1ull << k);
    b->flags[i] &= (uint16_t)~FM_DROPPING;
    return true;
}

static void remove_page(struct fm_core *c, struct fm_block *b, uint32_t i)
{
    uint16_t keep = FM_QUEUED | FM_KEEP | FM_PINNED | FM_DISCARDED | FM_ZAPPING;
    fm_page_discarded(c, b, i);
    switch ((enum fm_state)b->state[i]) {
    case FM_FRESH:
        break;
    case FM_RESIDENT:
        if (fm_defect(c, REMOVE_IS_FRESH)) {
            fm_state_set(c, b, i, FM_FRESH);
            b->flags[i] &= (uint16_t)~FM_DISCARDED;
            fm_charge(c, -1);
        }
        break;
    case FM_LEAVING:
        if (b->frame[i] != FM_FRAME_NONE && c->frame[b->frame[i]].dropping != 0) {
            fm_slot_detach(c, b, i);   /* our drop is still to come, so nothing may be put there; its end sees no slot */
            break;
        }
        fm_page_forget(c, b, i, keep);
        break;
    default:
        fm_page_forget(c, b, i, keep);
        fm_add(c->count->pages_discarded, 1);
        break;
    }
}

void fm_core_removed(struct fm_core *c, uint64_t page, uint64_t n)
{
    fm_add(c->count->events_remove, 1);
    if (fm_defect(c, IGNORE_REMOVE) && c->evict_mode != FM_EVICT_COPY)
        return;
    struct walk w = { .page = page, .end = page + n };
    bool may_be_own = page >= c->freeing.page && page + n <= c->freeing.end;
    uint64_t covered = 0;
    while (walk_next(c, &w)) {
        covered += w.n;
        for (uint32_t i = w.i; i < w.i + w.n; i++)
            if (!may_be_own || !own_event(c, w.b, i))
                remove_page(c, w.b, i);
        fm_extent_give_up(c, w.b);
    }
    if (covered < n) {
        if (c->hull_first == c->hull_end)
            c->hull_first = c->hull_end = page;
        c->hull_first = page < c->hull_first ? page : c->hull_first;
        c->hull_end = page + n > c->hull_end ? page + n : c->hull_end;
    }
}

/* ---- limbo ------------------------------------------------------------------------------------- */

static struct fm_block *limbo_find(struct fm_core *c, uint64_t page)
{
    struct fm_block *b = fm_block_of_owner(c, page | FM_LIMBO_BIT);
    uint32_t i = (uint32_t)(page % FM_BLOCK_PAGES);
    return b != NULL && (b->limbo_mask[i / 64] >> (i % 64) & 1) != 0 ? b : NULL;
}

static struct fm_block *limbo_get(struct fm_core *c, uint64_t page)
{
    struct fm_block *b = fm_block_of_owner(c, page | FM_LIMBO_BIT);
    if (b == NULL) {
        b = c->blocks_free;
        if (b != NULL)
            c->blocks_free = b->next;
        else
            b = c->ops->block_memory(c->ctx);
        fm_assert(b != NULL);         /* without a place for the record bytes would be lost: stop */
        __builtin_memset(b, 0, sizeof *b);
        b->page = (page - page % FM_BLOCK_PAGES) | FM_LIMBO_BIT;
        b->extent = FM_EXTENT_NONE;
        b->next = c->limbo;
        c->limbo = b;
    }
    return b;
}

static void limbo_drop(struct fm_core *c, struct fm_block *b, uint32_t i)
{
    uint64_t any = 0;
    b->limbo_mask[i / 64] &= ~(1ull << (i % 64));
    for (uint32_t w = 0; w < FM_BLOCK_PAGES / 64; w++)
        any |= b->limbo_mask[w];
    if (any != 0)
        return;
    if (b->extent != FM_EXTENT_NONE)
        fm_extent_release(&c->ledger, b->extent);
    struct fm_block **at = &c->limbo;
    while (*at != b)
        at = &(*at)->next;
    *at = b->next;
    b->next = c->blocks_free;
    c->blocks_free = b;
}

/* ---- a record moves ---------------------------------------------------------------------------- */

/* A page that is being copied out is still the program's, wherever it goes: the copy is given up.  What a drop under way has
 * done to it by now:
 * FM_DROP_FREED: the kernel may take it, or did already.
 * FM_DROP_BEGUN, and an event was read: either our free has met it, and then undo_astray() takes that back; or the event
 * was the program's, and it is gone, or about to be.  So if it is missing it was discarded.
 * Else nothing. */
static void copy_given_up(struct fm_core *c, struct fm_block *b, uint32_t i)
{
    uint32_t f = b->frame[i];
    if (b->state[i] != FM_LEAVING || f == FM_FRAME_NONE || !c->frame[f].copied)
        return;
    bool event = c->frame[f].dropping == FM_DROP_BEGUN && (b->flags[i] & FM_DROPPING) == 0;
    if (event)
        b->flags[i] = (uint16_t)((b->flags[i] & ~FM_LAZY) | FM_DISCARDED);
    if (c->frame[f].dropping == FM_DROP_FREED)
        b->flags[i] |= FM_LAZY;
    else if ((b->flags[i] & FM_LAZY) == 0)
        fm_slot_detach(c, b, i);             /* the slot's bytes may be yet to come */
    b->flags[i] &= (uint16_t)~FM_DROPPING;
    c->frame[f].page = FM_PAGE_NONE;
    b->frame[i] = FM_FRAME_NONE;
    fm_state_set(c, b, i, FM_RESIDENT);
}

/* QUEUED belongs to the address, everything else to the page. */
static void record_move(struct fm_core *c, struct fm_block *from, uint32_t i, struct fm_block *to, uint32_t j)
{
    uint16_t moves = FM_DISCARDED | FM_FOUND | FM_HASHED | FM_KEEP | FM_LAZY | FM_PINNED;
    to->state[j] = from->state[i];
    fm_flags_cut(c, to, j, FM_QUEUED);
    to->flags[j] |= from->flags[i] & (moves | FM_MARKER);
    to->slot[j] = from->slot[i];
    to->frame[j] = from->frame[i];
    to->hash[j][0] = from->hash[i][0];
    to->hash[j][1] = from->hash[i][1];
    if (to->frame[j] != FM_FRAME_NONE)
        c->frame[to->frame[j]].page = to->page + j;
    if ((from->flags[i] & FM_WAITING) != 0 && !fm_in_limbo(from))
        c->ops->wake(c->ctx, from->page + i, 1);
    from->state[i] = FM_FRESH;
    from->slot[i] = FM_SLOT_NONE;
    from->frame[i] = FM_FRAME_NONE;
    from->flags[i] &= FM_QUEUED;
}

static void into_limbo(struct fm_core *c, uint64_t page)
{
    struct fm_block *b = fm_block_find(c, page);
    uint32_t i = (uint32_t)(page % FM_BLOCK_PAGES);
    if (b == NULL)
        return;
    if (b->state[i] != FM_FRESH) {
        struct fm_block *l = limbo_get(c, page);
        copy_given_up(c, b, i);
        fm_assert((l->limbo_mask[i / 64] >> (i % 64) & 1) == 0);
        l->limbo_mask[i / 64] |= 1ull << (i % 64);
        l->flags[i] = 0;
        record_move(c, b, i, l, i);
    }
    fm_flags_cut(c, b, i, FM_QUEUED);
}

/* The old use of [page, end), as far as a debt says that it was ended out of order. */
static void limbo_unmapped(struct fm_core *c, uint64_t page, uint64_t end)
{
    for (; page < end; page++) {
        struct fm_block *l = limbo_find(c, page);
        if (l == NULL)
            continue;
        fm_page_forget(c, l, (uint32_t)(page % FM_BLOCK_PAGES), 0);
        limbo_drop(c, l, (uint32_t)(page % FM_BLOCK_PAGES));
    }
}

static void live_unmapped(struct fm_core *c, uint64_t page, uint64_t end)
{
    struct walk w = { .page = page, .end = end };
    while (walk_next(c, &w)) {
        for (uint32_t i = w.i; i < w.i + w.n; i++)
            fm_page_forget(c, w.b, i, FM_QUEUED);
        if (w.n == FM_BLOCK_PAGES)
            fm_block_free(c, w.b);
    }
    fm_ranges_cut(c, &c->managed, page, end);
    fm_stream_advise(c, page, end, FM_ADVICE_NORMAL);
}

void fm_core_managed(struct fm_core *c, uint64_t page, uint64_t n)
{
    fm_ranges_add(c, &c->managed, page, page + n);
}

/* What of an event's range [page, end) is about an old use.  An event that pays a debt of a range which was moved in is
 * about the old use of all that they have in common: the books may know only a part of that (a mapping grows in place
 * without a word). */
static bool next_old(const struct fm_core *c, uint64_t page, uint64_t end, struct fm_range *old)
{
    struct fm_range debt;
    for (; page < end && fm_ranges_next(&c->arrivals, page, end, old); page = old->end)
        if (fm_ranges_next(&c->debts, old->page, old->end, &debt))
            return true;
    return false;
}

static void pay(struct fm_core *c, uint64_t page, uint64_t end)
{
    struct fm_range x, debt;
    limbo_unmapped(c, page, end);
    fm_ranges_cut(c, &c->debts, page, end);
    for (uint64_t at = 0; fm_ranges_next(&c->arrivals, at, FM_PAGE_NONE, &x); at = x.end)
        if (!fm_ranges_next(&c->debts, x.page, x.end, &debt))
            fm_ranges_cut(c, &c->arrivals, x.page, x.end);
}

void fm_core_unmapped(struct fm_core *c, uint64_t page, uint64_t n)
{
    struct fm_range old;
    uint64_t end = page + n;
    fm_add(c->count->events_unmap, 1);
    if (fm_defect(c, IGNORE_UNMAP))
        return;
    while (page < end && next_old(c, page, end, &old)) {
        if (old.page > page)
            live_unmapped(c, page, old.page);
        pay(c, old.page, old.end);
        page = old.end;
    }
    if (page < end)
        live_unmapped(c, page, end);
}

/* One page's record goes from its old place to its new one.  old: the event is about the old use of the range, even where
 * that left no record. */
static void remap_page(struct fm_core *c, uint64_t from, uint64_t to, bool old)
{
    struct fm_block *b = old ? limbo_find(c, from) : fm_block_find(c, from);
    uint32_t i = (uint32_t)(from % FM_BLOCK_PAGES), j = (uint32_t)(to % FM_BLOCK_PAGES);
    if (b == NULL || (b->state[i] == FM_FRESH && (b->flags[i] & ~FM_QUEUED) == 0))
        return;
    struct fm_block *d = fm_block_get(c, to);
    fm_assert(d != NULL);                    /* without a record its bytes would be lost: stop */
    copy_given_up(c, b, i);
    record_move(c, b, i, d, j);
    if (old)
        limbo_drop(c, b, i);
    if (d->state[j] == FM_RESIDENT && (d->flags[j] & FM_QUEUED) == 0) {
        d->flags[j] |= FM_QUEUED;
        fm_queue_push(c, to, 1);
    }
}

/* A page is moved away from where we drop just now: the drop may have met it, and then it must be undone there. */
static void note_astray(struct fm_core *c, uint64_t from, uint64_t to, uint64_t n)
{
    struct fm_range piece;
    if (c->freeing.page < from + n && c->freeing.end > from) {
        uint64_t first = c->freeing.page > from ? c->freeing.page : from;
        uint64_t end = c->freeing.end < from + n ? c->freeing.end : from + n;
        fm_ranges_add(c, &c->astray, first - from + to, end - from + to);
    }
    for (uint64_t at = from; at < from + n && fm_ranges_next(&c->astray, at, from + n, &piece); at = piece.end)
        fm_ranges_add(c, &c->astray, piece.page - from + to, piece.end - from + to);
}

static void owe(struct fm_core *c, uint64_t page, uint64_t end)
{
    for (uint64_t p = page; p < end; p++)
        into_limbo(c, p);
    fm_ranges_add(c, &c->debts, page, end);
}

/* Something is moved to [page, end): what the books say of the place is about an old use, whose end is still to be told. */
static void moved_in(struct fm_core *c, uint64_t page, uint64_t end)
{
    struct fm_range old;
    for (uint64_t at = page; at < end && fm_ranges_next(&c->managed, at, end, &old); at = old.end)
        owe(c, old.page, old.end);
    /* Records beyond what is known to be managed: there a mapping has grown in place. */
    struct walk w = { .page = page, .end = end };
    while (walk_next(c, &w))
        for (uint32_t i = w.i; i < w.i + w.n; i++)
            if (w.b->state[i] != FM_FRESH)
                owe(c, w.b->page + i, w.b->page + i + 1);
    if (fm_ranges_next(&c->debts, page, end, &old))
        fm_ranges_put(c, &c->arrivals, page, end);
}

/* The kernel ends the old range with an UNMAP of its own, unless MREMAP_DONTUNMAP keeps it: so it is in the list from now on,
 * even where the mapping had grown in place and nobody knew of it. */
static void move_records(struct fm_core *c, uint64_t from, uint64_t to, uint64_t n)
{
    struct fm_range old = { 0, 0 };
    for (uint64_t p = from; p < from + n;) {
        bool some = next_old(c, p, from + n, &old);
        uint64_t end = some ? old.page : from + n;
        if (p < end)
            fm_ranges_add(c, &c->managed, p, end);
        for (; p < end; p++)
            remap_page(c, p, p - from + to, false);
        for (; some && p < old.end; p++)
            remap_page(c, p, p - from + to, true);
    }
}

void fm_core_remapped(struct fm_core *c, uint64_t from, uint64_t to, uint64_t n)
{
    fm_add(c->count->events_remap, 1);
    if (fm_defect(c, IGNORE_REMAP))
        return;
    if (!fm_defect(c, SKIP_LIMBO))
        moved_in(c, to, to + n);
    note_astray(c, from, to, n);
    move_records(c, from, to, n);
    fm_ranges_add(c, &c->managed, to, to + n);
}
