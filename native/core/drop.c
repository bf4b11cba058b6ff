/* drop.c - the copy path's end: a page whose bytes are in the pool leaves the program.
 *
 * A drop goes by address, and between our last look and the drop the program may have put another page there: the kernel
 * lets go of the address space while it waits for us to read the drop's own event.  So the kernel is asked for nothing
 * that it could do to a wrong page.  MADV_FREE makes the page clean and leaves it where it is; MADV_PAGEOUT takes a page
 * only if it is still so: not written since, not pinned, not shared.  A wrong page that was met by the first keeps its
 * bytes, and is written to before anything else is done.
 *
 * What the kernel would not take stays in the program as FM_LAZY: it may take it later, by itself, as long as it is
 * clean, and then the bytes are those in the slot.  Runs on the evictor's thread alone.
 */
#include <stddef.h>

#include "core/core.h"
#include "fm_assert.h"

#define BATCH_MAX 64u

/* Frames whose pages lie side by side. */
struct drop_run {
    uint64_t page;
    uint32_t n;
    uint32_t frame[BATCH_MAX];
};

void fm_drop_later(struct fm_core *c, uint32_t f)
{
    fm_lock_take(&c->drops_lock);
    fm_assert(c->drops_n < FM_FRAMES_MAX);
    c->drops[c->drops_n++] = f;
    fm_lock_drop(&c->drops_lock);
}

/* ---- writing to a page of the program's ---------------------------------------------------------- */

/* A frame with memory, in hand; FM_FRAME_NONE: there is none to be had.  Dead frames (and staged ones, where they would be
 * dead next) only the evictor makes anew, and it is about to wait. */
static uint32_t one_frame(struct fm_core *c)
{
    uint32_t f, made = 0;
    if (fm_frames_take(c, FM_FRAME_FREE, 1, &f) == 1)
        return f;
    if (fm_frames_take(c, FM_FRAME_EMPTY, 1, &f) == 0 &&
        (fm_core_shrink(c, 1) == 0 || fm_frames_take(c, FM_FRAME_EMPTY, 1, &f) == 0))
        return FM_FRAME_NONE;
    c->ops->enter(c->ctx);
    c->ops->fill_frames(c->ctx, f, 1, &made);
    c->ops->leave(c->ctx);
    if (made == 0) {
        fm_frames_put(c, f, 1, FM_FRAME_EMPTY);
        return FM_FRAME_NONE;
    }
    fm_charge(c, 1);
    return f;
}

/* Should the page be gone when the kernel comes to it, the evictor itself waits for it to be brought: then nobody makes
 * room, so zeros must be had over budget, and the frame for a fetch is set aside.  Without one (the evictor has them all in
 * hand) it might wait for ever: what can be put off is, FM_BUSY. */
enum fm_res fm_write_to(struct fm_core *c, uint64_t page, enum fm_res (*op)(void *ctx, uint64_t page, uint32_t n), bool must)
{
    uint32_t f = one_frame(c);
    if (f == FM_FRAME_NONE && !must)
        return FM_BUSY;
    __atomic_store_n(&c->aside_page, page, __ATOMIC_RELAXED);
    __atomic_store_n(&c->aside_frame, f, __ATOMIC_RELEASE);
    __atomic_add_fetch(&c->overdraft, 1, __ATOMIC_ACQ_REL);
    enum fm_res r = op(c->ctx, page, 1);
    __atomic_sub_fetch(&c->overdraft, 1, __ATOMIC_ACQ_REL);
    f = __atomic_exchange_n(&c->aside_frame, FM_FRAME_NONE, __ATOMIC_ACQ_REL);
    if (f != FM_FRAME_NONE)
        fm_frames_put(c, f, 1, FM_FRAME_FREE);
    return r;
}

/* ---- a page that was none of ours ---------------------------------------------------------------- */

/* What is there may be somebody's new page, and we have just told the kernel that it may take it.  It may be moved away
 * before it is written to: when this returns fm_core_remapped() has noted where to. */
static void undo_free(struct fm_core *c, uint64_t page)
{
    uint64_t there;
    c->ops->enter(c->ctx);
    c->ops->present(c->ctx, page, 1, &there);
    c->ops->leave(c->ctx);
    if ((there & 1) != 0)
        fm_write_to(c, page, c->ops->undo_free, true);
    c->ops->settle(c->ctx);
}

/* Pages that were moved away from where we drop, maybe after the drop hit them: fm_core_remapped() notes where to.  When there
 * are none, none are noted any more: in one step, or one that is noted in between would be left over. */
static bool next_astray(struct fm_core *c, uint64_t *page)
{
    struct fm_range piece;
    c->ops->enter(c->ctx);
    bool some = fm_ranges_next(&c->astray, 0, FM_PAGE_NONE, &piece);
    if (some)
        *page = piece.page;
    else
        c->freeing = (struct fm_range){ 0, 0 };
    c->ops->leave(c->ctx);
    return some;
}

static void undo_astray(struct fm_core *c)
{
    for (uint64_t page; next_astray(c, &page);) {
        undo_free(c, page);
        c->ops->enter(c->ctx);
        fm_ranges_cut(c, &c->astray, page, page + 1);
        c->ops->leave(c->ctx);
    }
}

static void freeing(struct fm_core *c, uint64_t page, uint64_t end)
{
    c->ops->enter(c->ctx);
    fm_assert(c->astray.n == 0);
    c->freeing = (struct fm_range){ page, end };
    c->own_events = end - page < 64 ? (1ull << (end - page)) - 1 : ~0ull;
    c->ops->leave(c->ctx);
}

/* ---- a run ---------------------------------------------------------------------------------------- */

/* The page has left. */
static void dropped(struct fm_core *c, struct fm_block *b, uint32_t i, uint32_t f)
{
    b->frame[i] = FM_FRAME_NONE;
    fm_frames_put(c, f, 1, FM_FRAME_FREE);
    /* No slot: all zeros, or discarded by the program while we were at it. */
    fm_state_set(c, b, i, b->slot[i] != FM_SLOT_NONE ? FM_REMOTE : FM_FRESH);
    fm_charge(c, -1);
    if ((b->flags[i] & FM_WAITING) != 0)
        c->ops->wake(c->ctx, b->page + i, 1);
    b->flags[i] &= (uint16_t)~(FM_WAITING | FM_FOUND | FM_LAZY);
    c->stayed = 0;
}

/* Mark the page of frame f as being dropped by us, right before the call; false: it is not to be dropped any more. */
static bool drop_begin(struct fm_core *c, uint32_t f)
{
    uint64_t there = 1;
    struct fm_block *b = fm_enter_leaving(c, f);
    if (b == NULL)
        return false;
    uint32_t i = (uint32_t)(c->frame[f].page - b->page);
    /* Marked before, in a run that was refused before it came to this page: so this event is not ours. */
    bool discarded = c->frame[f].dropping != 0 && (b->flags[i] & FM_DROPPING) == 0;
    /* One that the kernel took earlier must not be taken for one that is discarded while we are at it. */
    if ((b->flags[i] & FM_LAZY) != 0)
        c->ops->present(c->ctx, b->page + i, 1, &there);
    bool ok = !discarded && (there & 1) != 0;
    if (ok) {
        b->flags[i] |= FM_DROPPING;
        c->frame[f].dropping = FM_DROP_BEGUN;
    } else {
        fm_copy_undo(c, b, i, f);
    }
    if (discarded)
        fm_page_discarded(c, b, i);
    fm_block_leave(c, b);
    return ok;
}

enum after { NOT_OURS, NO_EVENT, FREED };

/* After the call: was it frame f's page that was met?  No event is unread that was raised before, so the record says what
 * was there.  NO_EVENT: frame f still has it, but the call did not come so far. */
static enum after drop_look(struct fm_core *c, uint32_t f, enum fm_res r)
{
    struct fm_block *b = fm_enter_leaving(c, f);
    if (b == NULL)
        return NOT_OURS;
    bool event = (b->flags[c->frame[f].page - b->page] & FM_DROPPING) == 0;
    if (event && r == FM_OK)
        c->frame[f].dropping = FM_DROP_FREED;
    fm_block_leave(c, b);
    return event ? FREED : NO_EVENT;
}

/* False: it was not freed and yet is not there, so an event must be read first (it was moved, most likely). */
static bool drop_end(struct fm_core *c, uint32_t f, enum fm_res r)
{
    uint64_t there = 0;
    struct fm_block *b = fm_enter_leaving(c, f);
    if (b == NULL)
        return true;
    c->frame[f].dropping = 0;            /* not before: a REMAP that is applied until then must know */
    uint32_t i = (uint32_t)(c->frame[f].page - b->page);
    bool event = (b->flags[i] & FM_DROPPING) == 0, done = true;
    b->flags[i] &= (uint16_t)~FM_DROPPING;
    c->ops->present(c->ctx, b->page + i, 1, &there);
    /* Missing, and an event unread: it may have been moved away, with its bytes.  It stays, until that is known. */
    bool moved = (there & 1) == 0 && r == FM_OK && c->ops->protect(c->ctx, b->page + i, 1, true) != FM_OK;
    if ((there & 1) != 0 || moved) {
        c->stayed++;
        b->flags[i] |= r == FM_OK ? FM_LAZY : event ? 0 : FM_KEEP;    /* refused: locked, most likely: leave it be */
        fm_copy_undo(c, b, i, f);
        if (r != FM_OK && event)
            fm_page_discarded(c, b, i);      /* it may have been the program's after all */
    } else if (r != FM_OK && !event && (b->flags[i] & FM_LAZY) == 0) {
        fm_drop_later(c, f);
        done = false;
    } else {
        if (r != FM_OK && event)
            fm_slot_detach(c, b, i);         /* not ours, so the event was the program's, and so was the zap */
        dropped(c, b, i, f);
    }
    fm_block_leave(c, b);
    return done;
}

static bool drop_run(struct fm_core *c, struct drop_run *run);

/* Nobody knows how far a call came that was refused.  Where there was an event it was ours, and the page was freed, or the
 * program's, and it was discarded: it stays, and may not be taken by our doing. */
static bool drop_refused(struct fm_core *c, struct drop_run *run, const enum after *after, enum fm_res r)
{
    bool all = true;
    for (uint32_t k = 0; k < run->n; k++)
        if (after[k] == FREED) {
            all = drop_end(c, run->frame[k], r) && all;
            undo_free(c, run->page + k);
        }
    undo_astray(c);
    for (uint32_t k = 0; k < run->n; k++) {
        struct drop_run one = { .page = run->page + k, .n = 1, .frame = { run->frame[k] } };
        if (after[k] == NO_EVENT && run->n == 1)
            all = drop_end(c, run->frame[k], r) && all;
        else if (after[k] == NO_EVENT && drop_begin(c, run->frame[k]))
            all = drop_run(c, &one) && all;
    }
    return all;
}

static bool drop_run(struct fm_core *c, struct drop_run *run)
{
    enum after after[BATCH_MAX];
    bool all = true;
    freeing(c, run->page, run->page + run->n);
    enum fm_res r = c->ops->free_lazily(c->ctx, run->page, run->n);
    c->ops->enter(c->ctx);
    c->own_events = 0;                   /* of what was refused, or is not registered, none will come */
    c->ops->leave(c->ctx);
    for (uint32_t k = 0; k < run->n; k++) {
        after[k] = drop_look(c, run->frame[k], r);
        if (after[k] == NOT_OURS)
            undo_free(c, run->page + k);
    }
    if (r != FM_OK)
        return drop_refused(c, run, after, r);
    undo_astray(c);
    for (uint32_t k = 0, n; k < run->n; k += n + 1) {
        for (n = 0; k + n < run->n && after[k + n] == FREED;)
            n++;
        if (n > 0)
            c->ops->page_out(c->ctx, run->page + k, n);
    }
    for (uint32_t k = 0; k < run->n; k++)
        if (after[k] != NOT_OURS)
            all = drop_end(c, run->frame[k], r) && all;
    return all;
}

/* Up to BATCH_MAX frames, those of neighbouring pages side by side.  Their pages may change hands until drop_begin(). */
static uint32_t take_drops(struct fm_core *c, uint32_t *frame, uint64_t *page)
{
    uint32_t n = 0;
    fm_lock_take(&c->drops_lock);
    while (n < BATCH_MAX && c->drops_n > 0) {
        uint32_t f = c->drops[--c->drops_n], at = n++;
        uint64_t owner = fm_owner_unlocked(&c->frame[f]);
        for (; at > 0 && page[at - 1] > owner; at--) {
            page[at] = page[at - 1];
            frame[at] = frame[at - 1];
        }
        page[at] = owner;
        frame[at] = f;
    }
    fm_lock_drop(&c->drops_lock);
    return n;
}

void fm_run_drops(struct fm_core *c)
{
    uint32_t frame[BATCH_MAX];
    uint64_t page[BATCH_MAX];
    for (bool all = true; all && __atomic_load_n(&c->drops_n, __ATOMIC_ACQUIRE) > 0;) {
        uint32_t n = take_drops(c, frame, page);
        for (uint32_t k = 0; k < n;) {
            struct drop_run run = { .page = page[k], .n = 0 };
            while (k < n && page[k] == run.page + run.n) {
                uint32_t f = frame[k++];
                if (!drop_begin(c, f))
                    break;               /* an orphan, and back in its place by now */
                run.frame[run.n++] = f;
            }
            if (run.n > 0)
                all = drop_run(c, &run) && all;
        }
    }
}
