/* fault.c - a fault is resolved from the state of its page, on whatever thread it comes.
 *
 * Frames are taken before the block is entered (reclaiming them enters other blocks), and what is
 * left over is put back.  Faults that meet an operation under way just wait: whoever ends the
 * operation wakes them, and they look again.
 */
#include <stddef.h>

#include "core/core.h"
#include "fm_assert.h"

/* Frames in hand while a fault is looked at. */
struct hand {
    uint32_t first, n;
};

static void put_hand(struct fm_core *c, struct hand *h)
{
    if (h->n > 0)
        fm_frames_put(c, h->first, h->n, FM_FRAME_FREE);
    h->n = 0;
}

/* The first n frames of the hand are in use. */
static uint32_t use_hand(struct hand *h, uint32_t n)
{
    uint32_t f = h->first;
    fm_assert(n <= h->n);
    h->first += n;
    h->n -= n;
    return f;
}

static uint32_t run_of(const struct fm_block *b, uint32_t i, uint32_t want, enum fm_state s)
{
    uint32_t n = 0;
    while (n < want && i + n < FM_BLOCK_PAGES && b->state[i + n] == s)
        n++;
    return n;
}

/* What an operation that stopped short means to the fault on b[i]. */
static enum fm_fault_result settle(struct fm_core *c, struct fm_block *b, uint32_t i, enum fm_res r)
{
    if (r == FM_AGAIN)
        return FM_FAULT_RETRY;
    if (r == FM_EXIST && b->state[i] != FM_RESIDENT) {
        b->flags[i] |= FM_FOUND;         /* nobody has told us of it: it may have been freed (MADV_FREE) before we knew it */
        fm_charge(c, 1);
        fm_page_resident(c, b, i, 1);
    }
    c->ops->wake(c->ctx, b->page + i, 1);
    return FM_FAULT_DONE;
}

static bool charge_if_room(struct fm_core *c, uint32_t n)
{
    int64_t limit = __atomic_load_n(&c->limit_pages, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&c->local_pages, (int64_t)n, __ATOMIC_RELAXED) <= limit ||
        __atomic_load_n(&c->overdraft, __ATOMIC_ACQUIRE) > 0)
        return true;
    fm_charge(c, -(int64_t)n);
    return false;
}

/* Zeros from new memory while the budget has room, else from frames that are cleared. */
static enum fm_fault_result fault_fresh(struct fm_core *c, struct fm_block *b, uint32_t i, uint32_t bits,
                                        uint32_t want, struct hand *h, uint32_t *took)
{
    uint32_t n = run_of(b, i, want, FM_FRESH), done = 0;
    enum fm_res r;
    if (charge_if_room(c, n)) {
        if ((bits & FM_FAULT_WRITE) != 0)
            r = c->ops->copy_in(c->ctx, b->page + i, FM_FRAME_NONE, n, &done);
        else
            r = c->ops->zero(c->ctx, b->page + i, n, &done);
        fm_charge(c, (int64_t)done - n);
        for (uint32_t k = 0; k < done; k++)
            b->flags[i + k] &= (uint16_t)~(FM_ZAPPING | FM_FOUND);
        if (done > 0)
            fm_page_resident(c, b, i, done);
    } else {
        n = n < h->n ? n : h->n;
        if (n == 0)
            return FM_FAULT_NO_FRAME;
        uint32_t f = use_hand(h, n);
        c->ops->clear(c->ctx, f, n);
        done = fm_install(c, b, i, f, n, &r);
        if (done < n)
            fm_frames_put(c, f + done, n - done, FM_FRAME_FREE);
    }
    if (done == 0)
        return settle(c, b, i, r);
    *took = done;
    if ((bits & FM_FAULT_AHEAD) == 0)
        fm_add(c->count->faults_fresh, 1);
    fm_add(c->count->pages_zeroed, done);
    return FM_FAULT_DONE;
}

static void fetch_begin(struct fm_core *c, struct fm_block *b, uint32_t i, uint32_t f, uint32_t n, bool marker)
{
    for (uint32_t k = 0; k < n; k++) {
        struct fm_frame *fr = &c->frame[f + k];
        fm_assert(b->slot[i + k] != FM_SLOT_NONE && (b->flags[i + k] & FM_HASHED) != 0);
        fm_state_set(c, b, i + k, FM_ARRIVING);
        b->frame[i + k] = f + k;
        fr->page = b->page + i + k;
        fr->slot = b->slot[i + k];
        fr->io = FM_IO_FETCH;
    }
    c->frame[f].transfer = (struct fm_io){ .kind = FM_IO_FETCH, .n = n, .frame = f, .slot = b->slot[i], .marker = marker };
}

/* Pages from i on that lie in the pool side by side. */
static uint32_t remote_run(const struct fm_block *b, uint32_t i, uint32_t want)
{
    uint32_t n = run_of(b, i, want, FM_REMOTE), k = 1;
    while (k < n && fm_slots_go_on(b->slot[i + k - 1], b->slot[i + k]))
        k++;
    return n == 0 ? 0 : k;
}

/* Starting a fetch only fills in the transfer; *io is submitted when no lock is held any more. */
static enum fm_fault_result fault_remote(struct fm_core *c, struct fm_block *b, uint32_t i, uint32_t bits, uint32_t want,
                                         struct hand *h, uint32_t *took, struct fm_io **io)
{
    uint32_t n = remote_run(b, i, want < h->n ? want : h->n);
    if (h->n == 0)
        return FM_FAULT_NO_FRAME;
    fm_assert(n >= 1);
    uint32_t f = use_hand(h, n);
    bool ahead = (bits & FM_FAULT_AHEAD) != 0;
    fetch_begin(c, b, i, f, n, !ahead && n >= FM_WINDOW_MAX / 4);
    *io = &c->frame[f].transfer;
    *took = n;
    fm_add(c->count->pages_prefetched, ahead ? n : n - 1);
    if (!ahead) {
        b->flags[i] |= FM_WAITING;
        fm_add(c->count->faults_fetch, 1);
    }
    return FM_FAULT_WAIT;
}

/* Marked resident.  A thread may have been overtaken by another that resolved the same fault (and then the page is
 * there); a page that was discarded, or dropped, has gone (see look()); anything else must be explained by an event that is
 * still to be read, or is our bug. */
static enum fm_fault_result fault_resident(struct fm_core *c, struct fm_block *b, uint32_t i, uint32_t bits)
{
    if ((bits & FM_FAULT_PROTECTED) != 0) {
        fm_add(c->count->faults_write_protect, 1);
        enum fm_res off = c->ops->protect(c->ctx, b->page + i, 1, false);
        return off == FM_OK ? FM_FAULT_DONE : settle(c, b, i, off);
    }
    fm_add(c->count->faults_spurious, 1);
    c->ops->wake(c->ctx, b->page + i, 1);
    return FM_FAULT_DONE;
}

static enum fm_fault_result fault_missing(struct fm_core *c, struct fm_block *b, uint32_t i)
{
    enum fm_res r = c->ops->poison(c->ctx, b->page + i);
    if (r != FM_OK)
        return settle(c, b, i, r);
    c->ops->message(c->ctx, FM_LEVEL_ERROR, "bug: a page that should be there is missing; touching it is SIGBUS; address",
                    (b->page + i) * FM_PAGE_BYTES);
    fm_charge(c, -1);
    fm_slot_detach(c, b, i);
    fm_state_set(c, b, i, FM_LOST);
    fm_add(c->count->pages_lost, 1);
    return FM_FAULT_DONE;
}

static enum fm_fault_result fault_staged(struct fm_core *c, struct fm_block *b, uint32_t i, uint32_t bits, bool *marker)
{
    uint32_t f = b->frame[i];
    enum fm_res r;
    bool ahead = (bits & FM_FAULT_AHEAD) != 0;
    fm_assert(f != FM_FRAME_NONE && c->frame[f].page == b->page + i);
    if (c->frame[f].io != 0) {
        b->flags[i] |= FM_WAITING;           /* the bytes are being sent from this frame */
        fm_add(c->count->faults_wait, !ahead);
        return FM_FAULT_WAIT;
    }
    bool was_staged = fm_frame_unstage(c, f);
    fm_assert(was_staged || c->frame[f].dirty);
    bool mark = (b->flags[i] & FM_MARKER) != 0;
    if (fm_install(c, b, i, f, 1, &r) == 0) {
        if (was_staged)
            fm_frame_stage(c, f);
        return settle(c, b, i, r == FM_EXIST ? FM_GONE : r);
    }
    if (ahead)
        return FM_FAULT_DONE;
    *marker = mark;
    fm_add(c->count->faults_rescue, 1);
    if (mark)
        fm_add(c->count->pages_prefetched_used, 1);
    return FM_FAULT_DONE;
}

/* Fetch what a stream will want next: as many runs as lie in [from, from + n), as far as frames go. */
static void prefetch(struct fm_core *c, uint64_t from, uint32_t n)
{
    while (n > 0) {
        struct hand h = { 0, 0 };
        h.n = fm_frames_for_fetch(c, n, &h.first);
        struct fm_io *io = NULL;
        uint32_t step = 1;
        c->ops->enter(c->ctx);
        struct fm_block *b = h.n > 0 ? fm_block_find(c, from) : NULL;
        if (b != NULL) {
            fm_lock_take(&b->lock);
            uint32_t i = (uint32_t)(from % FM_BLOCK_PAGES);
            uint32_t run = remote_run(b, i, h.n);
            if (run > 0) {
                uint32_t f = use_hand(&h, run);
                fetch_begin(c, b, i, f, run, run == n || run >= FM_WINDOW_MAX / 4);
                fm_add(c->count->pages_prefetched, run);
                io = &c->frame[f].transfer;
                step = run;
            }
            fm_lock_drop(&b->lock);
        }
        c->ops->leave(c->ctx);
        put_hand(c, &h);
        if (io != NULL)
            c->ops->submit(c->ctx, io);
        if (b == NULL)
            return;
        from += step;
        n -= step;
    }
}

static enum fm_fault_result look(struct fm_core *c, struct fm_block *b, uint32_t i, uint32_t bits, uint32_t want,
                                 struct hand *h, uint32_t *took, struct fm_io **io, bool *marker)
{
    switch ((enum fm_state)b->state[i]) {
    case FM_FRESH:
        return fault_fresh(c, b, i, bits, want, h, took);
    case FM_RESIDENT:
        if ((bits & FM_FAULT_PROTECTED) == 0) {
            uint64_t there;      /* looked at once: a discarded page can go between two looks */
            c->ops->present(c->ctx, b->page + i, 1, &there);
            if ((there & 1) == 0 && fm_page_missing(c, b, i))
                return look(c, b, i, bits, want, h, took, io, marker);     /* FRESH or REMOTE */
            if ((there & 1) == 0)
                return (b->flags[i] & FM_LAZY) != 0 ? FM_FAULT_RETRY : fault_missing(c, b, i);
            if ((bits & FM_FAULT_AHEAD) != 0)
                return FM_FAULT_HERE;
        }
        return fault_resident(c, b, i, bits);
    case FM_LEAVING:
    case FM_ARRIVING:
        b->flags[i] |= FM_WAITING;
        fm_add(c->count->faults_wait, (bits & FM_FAULT_AHEAD) == 0);
        return FM_FAULT_WAIT;
    case FM_STAGED:
        return fault_staged(c, b, i, bits, marker);
    case FM_REMOTE:
        return fault_remote(c, b, i, bits, want, h, took, io);
    case FM_LOST:
        break;
    }
    if ((bits & FM_FAULT_AHEAD) != 0)
        return FM_FAULT_LOST;
    enum fm_res r = c->ops->poison(c->ctx, b->page + i);
    fm_add(c->count->faults_lost, 1);
    if (r == FM_AGAIN)
        return FM_FAULT_RETRY;
    c->ops->wake(c->ctx, b->page + i, 1);
    return FM_FAULT_DONE;
}

/* Does the page's state call for frames?  Only a guess, made without a lock: what is wrong is put back. */
static bool wants_frames(struct fm_core *c, const struct fm_block *b, uint32_t i)
{
    uint8_t s = __atomic_load_n(&b->state[i], __ATOMIC_RELAXED);
    int64_t room = __atomic_load_n(&c->limit_pages, __ATOMIC_RELAXED) - __atomic_load_n(&c->local_pages, __ATOMIC_RELAXED);
    return s == FM_REMOTE || ((s == FM_FRESH || s == FM_RESIDENT) && room < (int64_t)FM_WINDOW_MAX);
}

/* No memory for a record, and without one a page is FRESH.  It gets its zeros and is the program's own from then on:
 * never evicted, but neither wrong nor waited for. */
static enum fm_fault_result fault_without_record(struct fm_core *c, uint64_t page)
{
    enum fm_res r = FM_AGAIN;
    uint32_t done;
    c->ops->enter(c->ctx);
    if (fm_block_find(c, page) == NULL)
        r = c->ops->copy_in(c->ctx, page, FM_FRAME_NONE, 1, &done);
    if (r != FM_OK && r != FM_AGAIN)
        c->ops->wake(c->ctx, page, 1);
    c->ops->leave(c->ctx);
    return r == FM_AGAIN ? FM_FAULT_RETRY : FM_FAULT_DONE;
}

/* The evictor waits for this page itself, and nobody else makes room: see fm_write_to(). */
static bool frame_aside(struct fm_core *c, uint64_t page, struct hand *h)
{
    if (__atomic_load_n(&c->aside_frame, __ATOMIC_ACQUIRE) == FM_FRAME_NONE ||
        __atomic_load_n(&c->aside_page, __ATOMIC_RELAXED) != page)
        return false;
    h->first = __atomic_exchange_n(&c->aside_frame, FM_FRAME_NONE, __ATOMIC_ACQ_REL);
    h->n = h->first != FM_FRAME_NONE;
    return h->n > 0;
}

/* Resolve page, whose record is b, with up to want pages from it on. */
static enum fm_fault_result resolve(struct fm_core *c, struct fm_block *b, uint64_t page, uint32_t bits, uint32_t want,
                                    uint32_t *took, bool *marker)
{
    struct hand h = { 0, 0 };
    struct fm_io *io = NULL;
    uint32_t i = (uint32_t)(page % FM_BLOCK_PAGES);
    bool asked = wants_frames(c, b, i);
again:
    if (asked)
        h.n = fm_frames_for_fetch(c, want, &h.first);
    c->ops->enter(c->ctx);
    if (fm_block_find(c, page) != b) {      /* its range was unmapped in between */
        c->ops->leave(c->ctx);
        put_hand(c, &h);
        return FM_FAULT_RETRY;
    }
    fm_lock_take(&b->lock);
    enum fm_fault_result r = look(c, b, i, bits, want, &h, took, &io, marker);
    fm_lock_drop(&b->lock);
    c->ops->leave(c->ctx);
    put_hand(c, &h);
    if (r == FM_FAULT_NO_FRAME && !asked) {
        asked = true;                        /* the page changed after the guess: nobody has looked for a frame yet */
        goto again;
    }
    if (r == FM_FAULT_NO_FRAME && frame_aside(c, page, &h)) {
        asked = false;
        goto again;
    }
    if (io != NULL)
        c->ops->submit(c->ctx, io);
    return r;
}

enum fm_fault_result fm_core_fault(struct fm_core *c, uint64_t page, uint32_t bits)
{
    struct fm_block *b = fm_block_get(c, page);
    uint32_t i = (uint32_t)(page % FM_BLOCK_PAGES), want = 1, took = 0;
    bool marker = false;
    if (b == NULL)
        return fault_without_record(c, page);
    uint8_t s = __atomic_load_n(&b->state[i], __ATOMIC_RELAXED);
    bool plan = s == FM_FRESH || s == FM_REMOTE;
    if (plan)
        want = fm_stream_plan(c, page);
    enum fm_fault_result r = resolve(c, b, page, bits, want, &took, &marker);
    if (plan && took > 0)
        fm_stream_took(c, page, want, took);
    uint64_t from;
    uint32_t ahead;
    while (marker && (ahead = fm_stream_ahead(c, page, &from)) > 0)
        prefetch(c, from, ahead);
    return r;
}

enum fm_fault_result fm_core_bring(struct fm_core *c, uint64_t page, uint32_t n)
{
    struct fm_block *b = fm_block_get(c, page);
    uint32_t took = 0;
    bool marker = false;
    fm_assert(n >= 1);
    if (b == NULL)
        return FM_FAULT_NO_FRAME;
    n = n < FM_WINDOW_MAX ? n : FM_WINDOW_MAX;
    return resolve(c, b, page, FM_FAULT_WRITE | FM_FAULT_AHEAD, n, &took, &marker);
}
