/* evict.c - pages leave: moved (or, where moving is refused, copied) out, hashed, stored when they changed.
 *
 * Runs on the evictor's thread alone, in batches.  The first half moves pages into empty frames, where nobody
 * can write to them any more; the second looks at the bytes and decides: all zeros, the same
 * as in the pool, or to be stored.  Only an acknowledged store lets a frame be used again.
 * The copy path leaves the page write-protected in the program until its store is acknowledged; how it leaves then is
 * drop.c's business.
 */
#include <stddef.h>

#include "core/core.h"
#include "fm_assert.h"

#define BATCH_MAX 64u
#define STAYED_MANY 64u       /* copies of so many pages in a row were for nothing: time for a pause */
#define FULL_TRIES 64u        /* when the pool is full: how many entries that can't leave are passed over */

/* Frames that hold pages on their way out. */
struct batch {
    uint32_t n;
    uint32_t frame[BATCH_MAX];
};

/* The program discarded the page, and the kernel may still be about to zap it.  Two turns: the first call of
 * fm_core_zaps_done() after the event may have been on its way before it. */
static bool zapping(const struct fm_core *c, const struct fm_block *b, uint32_t i)
{
    return (b->flags[i] & FM_ZAPPING) != 0 && __atomic_load_n(&c->zap_turn, __ATOMIC_ACQUIRE) - b->zap_turn < 2;
}

static bool evictable(const struct fm_core *c, const struct fm_block *b, uint32_t i)
{
    return b->state[i] == FM_RESIDENT && (b->flags[i] & (FM_KEEP | FM_PINNED)) == 0 && !zapping(c, b, i);
}

/* Pages b[i..i+n) are in frames f.. now, or will be copied there. */
static void leaving(struct fm_core *c, struct fm_block *b, uint32_t i, uint32_t f, uint32_t n, bool copied, struct batch *batch)
{
    for (uint32_t k = 0; k < n; k++) {
        struct fm_frame *fr = &c->frame[f + k];
        fm_state_set(c, b, i + k, FM_LEAVING);
        b->flags[i + k] &= (uint16_t)~(copied ? 0 : FM_FOUND);
        fm_assert(copied || (b->flags[i + k] & FM_LAZY) == 0);
        b->frame[i + k] = f + k;
        fr->page = b->page + i + k;
        fr->copied = copied;
        fr->dirty = 1;
        fm_assert(batch->n < BATCH_MAX);
        batch->frame[batch->n++] = f + k;
    }
}

/* The page stays for now, and comes up again when the others have had their turn. */
static void to_the_back(struct fm_core *c, struct fm_block *b, uint32_t i)
{
    if ((b->flags[i] & FM_QUEUED) != 0)
        return;                          /* of a run that was asked for: its entry is still in the queue */
    b->flags[i] |= FM_QUEUED;
    fm_queue_push(c, b->page + i, 1);
}

enum step { STEP_OK, STEP_RETRY, STEP_FULL, STEP_FRAMES };

struct run {
    uint64_t page;
    uint32_t n;
    uint32_t first, frames;      /* empty frames in hand */
    bool queued;                 /* taken out of the queue, and not asked for by its address */
    bool unshared;               /* the sharing has been ended: what is busy now is pinned */
    uint32_t busy;               /* stopped there: pages to be unshared */
    uint64_t lazy;               /* the page that was FM_LAZY and was written to, to end that */
    enum fm_res lazy_res;        /* ... how that went */
    uint64_t lazy_events;        /* ... and how many events had been applied before */
};

/* ---- the copy path ------------------------------------------------------------------------- */

/* Write-protect b[i] and mark it; its bytes are read when no lock is held. */
static enum fm_res copy_begin(struct fm_core *c, struct fm_block *b, uint32_t i, struct run *run, struct batch *batch)
{
    uint32_t f, made;
    /* A zap that is still to come could hit it while it is FM_LAZY: then nobody would know why it is missing. */
    if ((b->flags[i] & FM_DISCARDED) != 0 && __atomic_load_n(&c->zap_turn, __ATOMIC_ACQUIRE) - b->zap_turn < 2)
        return FM_GONE;
    if (fm_frames_take(c, FM_FRAME_FREE, 1, &f) == 0) {
        if (run->frames > 0) {           /* taken for moving, and maybe the last ones */
            f = run->first++;
            run->frames--;
        } else if (fm_frames_take(c, FM_FRAME_EMPTY, 1, &f) == 0) {
            return FM_FAIL;
        }
        if (c->ops->fill_frames(c->ctx, f, 1, &made) != FM_OK) {
            fm_frames_put(c, f, 1, FM_FRAME_EMPTY);
            return FM_AGAIN;
        }
        fm_charge(c, 1);
    }
    enum fm_res r = fm_defect(c, DROP_UNREAD) ? FM_OK : c->ops->protect(c->ctx, b->page + i, 1, true);
    if (r != FM_OK) {
        fm_frames_put(c, f, 1, FM_FRAME_FREE);
        return r;
    }
    leaving(c, b, i, f, 1, true, batch);
    return FM_OK;
}

/* The copy of frame f's page is of no use: the page stays in the program. */
void fm_copy_undo(struct fm_core *c, struct fm_block *b, uint32_t i, uint32_t f)
{
    uint64_t there;
    b->frame[i] = FM_FRAME_NONE;
    fm_frames_put(c, f, 1, FM_FRAME_FREE);
    c->ops->present(c->ctx, b->page + i, 1, &there);
    if ((there & 1) == 0 && fm_page_missing(c, b, i)) {
        b->flags[i] &= (uint16_t)~FM_WAITING;
        c->ops->wake(c->ctx, b->page + i, 1);
        return;
    }
    fm_page_resident(c, b, i, 1);
    fm_unprotect(c, b, i);
}

/* Is frame f still that of a page on its way out?  If so: inside its block.  An orphan is put back. */
struct fm_block *fm_enter_leaving(struct fm_core *c, uint32_t f)
{
    c->ops->enter(c->ctx);
    struct fm_block *b = fm_block_of_owner(c, c->frame[f].page);
    if (b == NULL) {
        fm_frames_put(c, f, 1, FM_FRAME_FREE);
        c->ops->leave(c->ctx);
        return NULL;
    }
    fm_lock_take(&b->lock);
    uint32_t i = (uint32_t)(c->frame[f].page - b->page);
    fm_assert(b->frame[i] == f && b->state[i] == FM_LEAVING);
    return b;
}

static bool copy_read(struct fm_core *c, uint32_t f)
{
    uint64_t owner = __atomic_load_n(&c->frame[f].page, __ATOMIC_RELAXED);
    if (owner != FM_PAGE_NONE && (owner & FM_LIMBO_BIT) == 0 && c->ops->read_page(c->ctx, owner, f))
        return true;
    struct fm_block *b = fm_enter_leaving(c, f);
    if (b != NULL) {
        fm_copy_undo(c, b, (uint32_t)(c->frame[f].page - b->page), f);
        fm_block_leave(c, b);
    }
    return false;
}

/* ---- the first half: out of the program ------------------------------------------------------- */

static bool copying(const struct fm_core *c) { return !c->can_move || c->evict_mode == FM_EVICT_COPY; }

/* b[i] can't leave now, or has gone. */
static void stays(struct fm_core *c, struct fm_block *b, uint32_t i)
{
    uint64_t there;
    c->ops->present(c->ctx, b->page + i, 1, &there);
    if ((there & 1) != 0 || (!fm_page_missing(c, b, i) && (b->flags[i] & FM_LAZY) != 0))
        to_the_back(c, b, i);
}

/* MOVE refused b[i]. */
static enum step refused(struct fm_core *c, struct fm_block *b, uint32_t i, enum fm_res r, struct run *run, struct batch *batch)
{
    switch (r) {
    case FM_AGAIN:
        return STEP_RETRY;
    case FM_BUSY:
        if (!run->unshared) {
            for (run->busy = 1; run->busy < run->n && evictable(c, b, i + run->busy);)
                run->busy++;
            return STEP_OK;
        }
        fm_add(c->count->pages_pinned, 1);
        if (fm_defect(c, COPY_PINNED))
            return copy_begin(c, b, i, run, batch) == FM_AGAIN ? STEP_RETRY : STEP_OK;
        to_the_back(c, b, i);
        return STEP_OK;
    case FM_REFUSED:
        r = copy_begin(c, b, i, run, batch);
        if (r == FM_OK || r == FM_AGAIN || r == FM_FAIL)
            return r == FM_OK ? STEP_OK : r == FM_AGAIN ? STEP_RETRY : STEP_FRAMES;
        break;
    default:
        break;
    }
    stays(c, b, i);
    return STEP_OK;
}

static bool is_lazy(const struct fm_core *c, const struct fm_block *b, uint32_t i)
{
    return evictable(c, b, i) && (b->flags[i] & FM_LAZY) != 0;
}

static uint64_t events_applied(const struct fm_core *c)
{
    const struct fm_counters *n = c->count;
    return __atomic_load_n(&n->events_remove, __ATOMIC_RELAXED) + __atomic_load_n(&n->events_unmap, __ATOMIC_RELAXED) +
           __atomic_load_n(&n->events_remap, __ATOMIC_RELAXED);
}

/* The first page of run is through, one way or another. */
static void pass(struct fm_block *b, struct run *run)
{
    b->flags[run->page - b->page] &= (uint16_t)~(run->queued ? FM_QUEUED : 0);
    run->page++;
    run->n--;
}

/* The kernel may take the first page of run (FM_LAZY).  Moved out so it could go from the frame, before a byte of it was
 * seen.  So it is written to first, outside the lock, and is an ordinary page from then on: certainly so only if no event
 * was applied meanwhile, and none is unread.  *copy: it is to be copied, whatever the others are.  STEP_FULL: passed by. */
static enum step lazy_settled(struct fm_core *c, struct fm_block *b, struct run *run, bool *copy)
{
    uint32_t i = (uint32_t)(run->page - b->page);
    uint64_t there;
    c->ops->present(c->ctx, run->page, 1, &there);
    if ((there & 1) == 0) {
        pass(b, run);
        stays(c, b, i);
        return STEP_FULL;
    }
    if (run->lazy != run->page) {
        run->lazy = run->page;
        run->busy = 1;
        return STEP_FULL;
    }
    run->lazy = FM_PAGE_NONE;
    if (run->lazy_res == FM_OK && events_applied(c) == run->lazy_events) {
        enum fm_res r = c->ops->protect(c->ctx, run->page, 1, false);
        b->flags[i] &= (uint16_t)~(r == FM_OK ? FM_LAZY : 0);
        return r == FM_AGAIN ? STEP_RETRY : STEP_OK;
    }
    /* What can't be written to can't be moved either.  As to the rest: something changes just now. */
    *copy = copying(c) || run->lazy_res == FM_REFUSED;
    if (*copy)
        return STEP_OK;
    pass(b, run);
    to_the_back(c, b, i);
    return STEP_FULL;
}

/* Move what can be moved of run (which lies in b) until its frames are used up or it ends; run is shortened
 * from the front by what was dealt with. */
static enum step move_run(struct fm_core *c, struct fm_block *b, struct run *run, struct batch *batch)
{
    enum step s = STEP_OK;
    while (run->n > 0 && s == STEP_OK && run->busy == 0) {
        uint32_t i = (uint32_t)(run->page - b->page), n = 0, done = 0;
        enum fm_res r = FM_REFUSED;
        if (batch->n == BATCH_MAX)
            return STEP_FRAMES;
        if (evictable(c, b, i) && !fm_slot_grant(c, b, i))
            return STEP_FULL;
        bool copy = copying(c);
        if (is_lazy(c, b, i)) {
            enum step settled = lazy_settled(c, b, run, &copy);
            if (settled == STEP_RETRY)
                return STEP_RETRY;
            if (settled == STEP_FULL)
                continue;
        }
        while (n < run->n && n < run->frames && batch->n + n < BATCH_MAX && evictable(c, b, i + n) && !is_lazy(c, b, i + n) &&
               fm_slot_grant(c, b, i + n))
            n++;
        if (n == 0 && evictable(c, b, i) && !copy)
            return STEP_FRAMES;
        if (n > 0 && !copy)
            r = c->ops->move_out(c->ctx, run->page, run->first, n, &done);
        if (r == FM_REFUSED && n > done + 1) {
            /* The run may just reach beyond its mapping: only a page that is refused by itself may be copied. */
            uint32_t one = 0;
            r = c->ops->move_out(c->ctx, run->page + done, run->first + done, 1, &one);
            done += one;
        }
        if (done > 0) {
            leaving(c, b, i, run->first, done, false, batch);
            fm_add(c->count->pages_moved_out, done);
            run->first += done;
            run->frames -= done;
        }
        for (uint32_t k = 0; k < done && run->queued; k++)
            b->flags[i + k] &= (uint16_t)~FM_QUEUED;
        run->page += done;
        run->n -= done;
        if (done > 0 && (r == FM_OK || run->n == 0 || batch->n == BATCH_MAX))
            continue;
        b->flags[i + done] &= (uint16_t)~(run->queued ? FM_QUEUED : 0);
        if (evictable(c, b, i + done))
            s = refused(c, b, i + done, r, run, batch);
        else if (b->state[i + done] == FM_RESIDENT && zapping(c, b, i + done))
            stays(c, b, i + done);
        if (s == STEP_OK && run->busy == 0) {
            run->page++;
            run->n--;
        } else if (run->queued) {
            b->flags[i + done] |= FM_QUEUED;
        }
    }
    return s;
}

static void unshare(struct fm_core *c, struct run *run)
{
    if (run->lazy == run->page) {
        run->lazy_events = events_applied(c);
        run->lazy_res = fm_write_to(c, run->page, c->ops->unshare, false);
    } else {
        /* Making a page private can fault on one that was just discarded: zeros must be had then. */
        __atomic_add_fetch(&c->overdraft, 1, __ATOMIC_ACQ_REL);
        c->ops->unshare(c->ctx, run->page, run->busy);
        __atomic_sub_fetch(&c->overdraft, 1, __ATOMIC_ACQ_REL);
        fm_add(c->count->pages_unshared, run->busy);
        run->unshared = true;
    }
    run->busy = 0;
}

/* One entry of the queue, or a run that was asked for.  What is left of an entry goes back to the queue's head. */
static enum step evict_entry(struct fm_core *c, struct run *run, struct batch *batch)
{
    enum step s = STEP_OK;
    uint32_t before = batch->n;
    while (run->n > 0 && s == STEP_OK) {
        if (run->busy != 0) {
            unshare(c, run);
        }
        if (run->frames == 0 && !copying(c))
            run->frames = fm_frames_take(c, FM_FRAME_EMPTY, run->n, &run->first);
        c->ops->enter(c->ctx);
        struct fm_block *b = fm_block_find(c, run->page);
        if (b != NULL) {
            fm_lock_take(&b->lock);
            s = move_run(c, b, run, batch);
            fm_lock_drop(&b->lock);
        } else {
            run->n = 0;
        }
        c->ops->leave(c->ctx);
        if (s == STEP_FRAMES && batch->n == before && run->frames == 0)
            break;
        if (s == STEP_FRAMES && batch->n < BATCH_MAX && run->frames == 0 && !copying(c)) {
            run->frames = fm_frames_take(c, FM_FRAME_EMPTY, run->n, &run->first);
            s = run->frames > 0 ? STEP_OK : s;
        }
    }
    if (run->frames > 0)
        fm_frames_put(c, run->first, run->frames, FM_FRAME_EMPTY);
    run->frames = 0;
    if (run->n > 0 && run->queued)
        fm_queue_unpop(c, run->page, run->n);
    return s;
}

/* ---- the second half: what becomes of the bytes ---------------------------------------------- */

/* The bytes can be had without frame f (clean, or zeros). */
static void decided(struct fm_core *c, struct fm_block *b, uint32_t i, uint32_t f, bool zero)
{
    bool waiting = (b->flags[i] & FM_WAITING) != 0;
    enum fm_res r = FM_OK;
    c->frame[f].dirty = 0;
    if (c->frame[f].copied) {
        fm_drop_later(c, f);
        return;
    }
    fm_state_set(c, b, i, FM_STAGED);
    if (waiting && !fm_in_limbo(b) && fm_install(c, b, i, f, 1, &r) == 1) {
        fm_add(c->count->faults_rescue, 1);
        return;
    }
    b->flags[i] &= (uint16_t)~FM_WAITING;
    if (zero) {
        b->frame[i] = FM_FRAME_NONE;
        fm_frames_put(c, f, 1, FM_FRAME_FREE);
        fm_state_set(c, b, i, FM_FRESH);
    } else {
        fm_frame_stage(c, f);
    }
    if (waiting && !fm_in_limbo(b))
        c->ops->wake(c->ctx, b->page + i, 1);
}

/* The pool has no place after all (its extent went to another use): keep the page local. */
static void no_slot(struct fm_core *c, struct fm_block *b, uint32_t i, uint32_t f)
{
    enum fm_res r;
    if (c->frame[f].copied) {
        fm_copy_undo(c, b, i, f);
        return;
    }
    fm_state_set(c, b, i, FM_STAGED);      /* dirty: fm_core_evict() puts it back if this fails */
    if (fm_in_limbo(b) || fm_install(c, b, i, f, 1, &r) == 0)
        c->ops->wake(c->ctx, b->page + i, 1);
}

/* True: frame f's page must be stored; its transfer's slot is set. */
static bool judge(struct fm_core *c, uint32_t f, const uint64_t h[2], bool zero)
{
    struct fm_frame *fr = &c->frame[f];
    struct fm_block *b = fm_enter_leaving(c, f);
    if (b == NULL)
        return false;
    uint32_t i = (uint32_t)(fr->page - b->page);
    bool store = false;
    /* A page that the kernel may have taken by now needs its slot, wherever that is. */
    bool there = b->slot[i] != FM_SLOT_NONE &&
                 ((b->flags[i] & FM_LAZY) != 0 || !fm_slot_shut(&c->ledger, b->slot[i]) || fm_defect(c, TRUST_THE_DEAD));
    bool clean = there && (b->flags[i] & FM_HASHED) != 0 &&
                 ((b->hash[i][0] == h[0] && b->hash[i][1] == h[1]) || fm_defect(c, SKIP_STORE));
    fm_add(c->count->pages_evicted, 1);
    if (fr->copied)
        fm_add(c->count->pages_copied_out, 1);
    if (zero) {
        fm_slot_detach(c, b, i);
        fm_add(c->count->pages_dropped_zero, 1);
        decided(c, b, i, f, true);
    } else if (clean) {
        fm_add(c->count->pages_dropped_clean, 1);
        decided(c, b, i, f, false);
    } else {
        fm_slot_assign(c, b, i);
        if (b->slot[i] == FM_SLOT_NONE) {
            no_slot(c, b, i, f);
        } else {
            /* Changed since it was stored last, so it is dirty, and the kernel can't take it. */
            b->flags[i] &= (uint16_t)~(FM_HASHED | FM_LAZY);
            b->hash[i][0] = h[0];
            b->hash[i][1] = h[1];
            fr->slot = b->slot[i];
            fr->io = FM_IO_STORE;
            if (!fr->copied)
                fm_state_set(c, b, i, FM_STAGED);
            store = true;
        }
    }
    fm_block_leave(c, b);
    return store;
}

static void store_runs(struct fm_core *c, const uint32_t *frame, uint32_t n)
{
    for (uint32_t k = 0; k < n;) {
        uint32_t f = frame[k], slot = c->frame[f].slot, run = 1;
        while (k + run < n && run < FM_WINDOW_MAX && frame[k + run] == f + run &&
               fm_slots_go_on(slot + run - 1, c->frame[f + run].slot))
            run++;
        fm_add(c->count->pages_stored, run);
        c->frame[f].transfer = (struct fm_io){ .kind = FM_IO_STORE, .n = run, .frame = f, .slot = slot };
        k += run;
        c->ops->submit(c->ctx, &c->frame[f].transfer);
    }
}

static void finish(struct fm_core *c, struct batch *batch)
{
    uint32_t store[BATCH_MAX], n = 0;
    for (uint32_t k = 0; k < batch->n; k++) {
        uint32_t f = batch->frame[k];
        uint64_t h[2];
        if (c->frame[f].copied && !copy_read(c, f))
            continue;
        bool zero = c->ops->hash(c->ctx, f, h);
        if (judge(c, f, h, zero))
            store[n++] = f;
    }
    store_runs(c, store, n);
    batch->n = 0;
}

/* Only a hint, without a lock: the caller looks again inside the block. */
FM_UNLOCKED_LOOK static bool seems_stuck(const struct fm_frame *fr)
{
    return fr->kind == FM_FRAME_BUSY && fr->dirty && fr->io == 0 && !fr->copied;
}

/* Pages that are the only copy and could neither be stored nor put back at the time. */
static void put_back_dirty(struct fm_core *c)
{
    for (uint32_t f = 0; f < c->frames_n; f++) {
        struct fm_frame *fr = &c->frame[f];
        enum fm_res r;
        if (!seems_stuck(fr))
            continue;
        c->ops->enter(c->ctx);
        struct fm_block *b = fm_block_of_owner(c, fm_owner_unlocked(fr));
        if (b != NULL && !fm_in_limbo(b)) {
            fm_lock_take(&b->lock);
            uint32_t i = (uint32_t)(fr->page - b->page);
            /* Before we had the lock a fault may have put it back, and the frame may be another page's by now. */
            if (i < FM_BLOCK_PAGES && b->frame[i] == f && b->state[i] == FM_STAGED && fr->dirty && fr->io == 0)
                fm_install(c, b, i, f, 1, &r);
            fm_lock_drop(&b->lock);
        }
        c->ops->leave(c->ctx);
    }
}

static bool more_frames(const struct fm_core *c)
{
    return fm_frames_of(c, FM_FRAME_EMPTY) > 0 || (copying(c) && fm_frames_of(c, FM_FRAME_FREE) > 0);
}

/* What is left of the entry that was met needs an extent.  If there is none to be had its pages can't leave, but others
 * behind them may have their slots already. */
static void pool_full(struct fm_core *c, struct run *run, uint32_t *full)
{
    if (*full == 0 && fm_spare_ready(c, run->page))
        return;
    ++*full;
    if (fm_queue_pop(c, &run->page, &run->n))
        fm_queue_push(c, run->page, run->n);
}

static enum fm_evict_result outcome(enum step s, bool some, bool full)
{
    if (s == STEP_RETRY)
        return FM_EVICT_RETRY;
    if (some)
        return FM_EVICT_DONE;
    return full ? FM_EVICT_FULL : FM_EVICT_NOTHING;
}

enum fm_evict_result fm_core_evict(struct fm_core *c, uint32_t n)
{
    struct batch batch = { .n = 0 };
    struct run run = { .queued = true, .lazy = FM_PAGE_NONE };
    enum step s = STEP_OK;
    uint64_t tries = fm_queue_entries(c) + 1, out = 0;
    uint32_t full = 0;
    put_back_dirty(c);
    fm_run_drops(c);
    while (out + batch.n < n && s == STEP_OK && tries-- > 0 && fm_queue_pop(c, &run.page, &run.n)) {
        run.unshared = false;
        run.busy = 0;
        run.lazy = FM_PAGE_NONE;
        s = evict_entry(c, &run, &batch);
        if (s == STEP_FULL && full < FULL_TRIES) {
            pool_full(c, &run, &full);
            s = STEP_OK;
        }
        uint32_t had = batch.n;
        if (had < BATCH_MAX / 2 && s == STEP_OK)
            continue;
        out += had;
        finish(c, &batch);
        fm_run_drops(c);
        if (s == STEP_FRAMES && had > 0 && more_frames(c))
            s = STEP_OK;
    }
    out += batch.n;
    finish(c, &batch);
    fm_run_drops(c);
    return outcome(s, out > 0 && c->stayed < STAYED_MANY, full > 0);
}

enum fm_evict_result fm_core_evict_range(struct fm_core *c, uint64_t page, uint32_t n, uint32_t *done)
{
    uint32_t left = FM_BLOCK_PAGES - (uint32_t)(page % FM_BLOCK_PAGES);
    n = n < left ? n : left;
    n = n < BATCH_MAX ? n : BATCH_MAX;
    struct batch batch = { .n = 0 };
    struct run run = { .page = page, .n = n, .lazy = FM_PAGE_NONE };
    enum step s = evict_entry(c, &run, &batch);
    if (s == STEP_FULL && fm_spare_ready(c, run.page))
        s = evict_entry(c, &run, &batch);
    *done = n - run.n;
    finish(c, &batch);
    fm_run_drops(c);
    return outcome(s, *done > 0, s == STEP_FULL);
}
