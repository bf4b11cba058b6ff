/* core.c - what every part of the core shares: the state of a page, installation, and the end of transfers.
 *
 * Nothing here waits.  The one rule of a completion: look again whether the world that it was
 * meant for still exists; a frame whose owner has gone is an orphan, and is just put back.
 */
#include "core/core.h"

#include <errno.h>
#include <stddef.h>

#include "fm_assert.h"

#define TRIES_MAX 3u

void fm_core_init(struct fm_core *c, uint32_t frames)
{
    fm_assert(frames > 0 && frames <= FM_FRAMES_MAX && c->ops != NULL && c->count != NULL);
    c->frames_n = frames;
    c->kind_n[FM_FRAME_EMPTY] = frames;
    for (uint32_t f = 0; f < frames; f++) {
        c->frame[f] = (struct fm_frame){ .page = FM_PAGE_NONE, .slot = FM_SLOT_NONE, .kind = FM_FRAME_EMPTY };
        c->bits[FM_FRAME_EMPTY][f / 64] |= 1ull << (f % 64);
    }
    for (uint32_t k = 0; k < FM_STREAMS; k++)
        c->stream[k].next = FM_PAGE_NONE;
    c->spare = FM_EXTENT_NONE;
    c->aside_frame = FM_FRAME_NONE;
    c->failed_stores = 0;
}

void fm_charge(struct fm_core *c, int64_t pages)
{
    __atomic_add_fetch(&c->local_pages, pages, __ATOMIC_RELAXED);
}

void fm_state_set(struct fm_core *c, struct fm_block *b, uint32_t i, enum fm_state s)
{
    int64_t remote = (s == FM_REMOTE) - (b->state[i] == FM_REMOTE);
    if (remote != 0)
        __atomic_add_fetch(&c->remote_pages, remote, __ATOMIC_RELAXED);
    __atomic_store_n(&b->state[i], (uint8_t)s, __ATOMIC_RELAXED);    /* fm_core_fault() guesses from it without a lock */
}

static void wake_if_waiting(struct fm_core *c, struct fm_block *b, uint32_t i)
{
    if ((b->flags[i] & FM_WAITING) == 0)
        return;
    b->flags[i] &= (uint16_t)~FM_WAITING;
    if (!fm_in_limbo(b))
        c->ops->wake(c->ctx, b->page + i, 1);
}

void fm_page_resident(struct fm_core *c, struct fm_block *b, uint32_t i, uint32_t n)
{
    uint32_t run = 0;
    for (uint32_t k = i; k < i + n; k++) {
        fm_state_set(c, b, k, FM_RESIDENT);
        b->flags[k] &= (uint16_t)~(FM_WAITING | FM_MARKER);
        b->flags[k] |= c->copying ? FM_PUT_BACK : 0;
        bool queued = (b->flags[k] & FM_QUEUED) != 0;
        b->flags[k] |= FM_QUEUED;
        if (!queued)
            run++;
        if (run > 0 && (queued || k + 1 == i + n))
            fm_queue_push(c, b->page + k + 1 - queued - run, run);
        if (queued)
            run = 0;
    }
}

/* The page lets go of its slot; while a transfer uses it, the transfer releases it at its end. */
void fm_slot_detach(struct fm_core *c, struct fm_block *b, uint32_t i)
{
    uint32_t slot = b->slot[i], f = b->frame[i];
    b->flags[i] &= (uint16_t)~FM_HASHED;
    if (slot == FM_SLOT_NONE)
        return;
    b->slot[i] = FM_SLOT_NONE;
    if (f != FM_FRAME_NONE && c->frame[f].io != 0 && c->frame[f].slot == slot)
        c->frame[f].slot_orphan = 1;
    else
        fm_slot_release(&c->ledger, slot);
}

void fm_page_gone(struct fm_core *c, struct fm_block *b, uint32_t i)
{
    fm_slot_detach(c, b, i);
    fm_state_set(c, b, i, FM_FRESH);
    b->flags[i] &= (uint16_t)~(FM_ZAPPING | FM_FOUND | FM_LAZY);
    fm_charge(c, -1);
}

/* A page that the kernel may take may as well have been moved away, which an unread event will tell: then any operation on
 * its place says so. */
bool fm_page_missing(struct fm_core *c, struct fm_block *b, uint32_t i)
{
    if ((b->flags[i] & FM_LAZY) != 0 && c->ops->protect(c->ctx, b->page + i, 1, true) != FM_OK)
        return false;
    if (fm_missing_means_zeros(b, i)) {
        fm_page_gone(c, b, i);
        return true;
    }
    if (!fm_missing_means_remote(b, i))
        return false;
    fm_assert((b->flags[i] & FM_HASHED) != 0);
    fm_state_set(c, b, i, FM_REMOTE);
    b->flags[i] &= (uint16_t)~(FM_ZAPPING | FM_FOUND | FM_LAZY);
    fm_charge(c, -1);
    return true;
}

void fm_flags_cut(struct fm_core *c, struct fm_block *b, uint32_t i, uint16_t keep)
{
    if ((b->flags[i] & FM_PINNED & ~keep) != 0)
        __atomic_sub_fetch(&c->pinned_pages, 1, __ATOMIC_RELAXED);
    b->flags[i] &= keep;
}

void fm_page_forget(struct fm_core *c, struct fm_block *b, uint32_t i, uint16_t keep)
{
    uint32_t f = b->frame[i];
    uint8_t state = b->state[i];
    fm_slot_detach(c, b, i);
    wake_if_waiting(c, b, i);
    if (state == FM_RESIDENT || (state == FM_LEAVING && (f == FM_FRAME_NONE || c->frame[f].copied)))
        fm_charge(c, -1);
    if (f != FM_FRAME_NONE) {
        struct fm_frame *fr = &c->frame[f];
        b->frame[i] = FM_FRAME_NONE;
        fr->page = FM_PAGE_NONE;     /* whoever has it in hand puts it back */
        bool in_hand = fr->io != 0 || state == FM_LEAVING || state == FM_ARRIVING;
        if (!in_hand && (fr->kind == FM_FRAME_BUSY || fm_frame_unstage(c, f)))
            fm_frames_put(c, f, 1, FM_FRAME_FREE);
    }
    fm_state_set(c, b, i, FM_FRESH);
    fm_flags_cut(c, b, i, keep);
}

void fm_page_lost(struct fm_core *c, struct fm_block *b, uint32_t i)
{
    fm_state_set(c, b, i, FM_LOST);
    b->flags[i] &= (uint16_t)~(FM_WAITING | FM_MARKER);
    fm_add(c->count->pages_lost, 1);
    c->ops->message(c->ctx, FM_LEVEL_ERROR,
                    c->can_poison ? "page lost: its bytes can't be had from the pool; touching it is SIGBUS; address"
                                  : "page lost: its bytes can't be had from the pool; touching it ends the program; address",
                    (b->page + i) * FM_PAGE_BYTES);
    if (!fm_in_limbo(b) && (!c->can_poison || c->ops->poison(c->ctx, b->page + i) != FM_OK))
        c->ops->wake(c->ctx, b->page + i, 1);    /* whoever waits for it faults again, and is dealt with then */
}

uint32_t fm_install(struct fm_core *c, struct fm_block *b, uint32_t i, uint32_t frame, uint32_t n, enum fm_res *res)
{
    uint32_t moved = 0, copied = 0;
    fm_assert(!fm_in_limbo(b) && n > 0 && i + n <= FM_BLOCK_PAGES);
    *res = FM_REFUSED;
    if (c->can_move)
        *res = c->ops->move_in(c->ctx, b->page + i, frame, n, &moved);
    /* BUSY: the kernel tells the end of direct I/O a moment before it lets go of the frame.  What is in it is final. */
    if (*res == FM_REFUSED || *res == FM_BUSY)
        *res = c->ops->copy_in(c->ctx, b->page + i + moved, frame + moved, n - moved, &copied);
    for (uint32_t k = 0; k < moved + copied; k++) {
        b->frame[i + k] = FM_FRAME_NONE;
        b->flags[i + k] &= (uint16_t)~(FM_ZAPPING | FM_FOUND);
    }
    if (moved > 0)
        fm_frames_put(c, frame, moved, FM_FRAME_EMPTY);
    if (copied > 0) {
        fm_charge(c, copied);
        fm_frames_put(c, frame + moved, copied, FM_FRAME_FREE);
    }
    if (moved + copied > 0)
        fm_page_resident(c, b, i, moved + copied);
    return moved + copied;
}

/* A page that could not be put back now keeps its frame: the fault on it that is tried again finds it STAGED. */
static void leave_staged(struct fm_core *c, struct fm_block *b, uint32_t i, uint32_t f, enum fm_res why)
{
    fm_state_set(c, b, i, FM_STAGED);
    fm_frame_stage(c, f);
    if (why == FM_AGAIN && (b->flags[i] & FM_WAITING) != 0 && !fm_in_limbo(b)) {
        b->flags[i] &= (uint16_t)~FM_WAITING;
        c->ops->later(c->ctx, b->page + i);
    } else {
        wake_if_waiting(c, b, i);
    }
}

/* Pages b[i..i+n) have arrived in frames f.. and are verified. */
static void arrive(struct fm_core *c, struct fm_block *b, uint32_t i, uint32_t f, uint32_t n, bool marker)
{
    uint32_t put = n;
    if (marker && (b->flags[i + n - 1] & FM_WAITING) == 0)
        put = n - 1;
    if (fm_in_limbo(b))
        put = 0;
    uint32_t k = 0;
    enum fm_res r = FM_OK;
    while (k < put) {
        k += fm_install(c, b, i + k, f + k, put - k, &r);
        if (k < put && r == FM_EXIST) {
            /* Somebody else's page is there (a ptrace write, say): it counts as the program's own. */
            b->frame[i + k] = FM_FRAME_NONE;
            fm_frames_put(c, f + k, 1, FM_FRAME_FREE);
            fm_slot_detach(c, b, i + k);
            fm_charge(c, 1);
            c->ops->wake(c->ctx, b->page + i + k, 1);
            fm_page_resident(c, b, i + k, 1);
            k++;
        } else if (k < put) {
            break;
        }
    }
    for (; k < n; k++) {
        if (marker && k == n - 1)
            b->flags[i + k] |= FM_MARKER;
        leave_staged(c, b, i + k, f + k, r);
    }
}

static void slot_orphan_end(struct fm_core *c, struct fm_frame *fr)
{
    fr->io = 0;
    if (fr->slot_orphan) {
        fr->slot_orphan = 0;
        fm_slot_release(&c->ledger, fr->slot);
    }
    fr->slot = FM_SLOT_NONE;
}

/* One page's bytes did not come, or are not the right ones.  True: the caller submits f's transfer once more. */
static bool fetch_failed(struct fm_core *c, struct fm_block *b, uint32_t i, uint32_t f, const struct fm_io *io)
{
    struct fm_frame *fr = &c->frame[f];
    uint32_t tries = io->tries + 1;
    if (!io->final && tries < (io->status != 0 ? TRIES_MAX : 2)) {
        fr->io = FM_IO_FETCH;
        fr->slot = b->slot[i];
        fr->transfer = (struct fm_io){ .kind = FM_IO_FETCH, .n = 1, .frame = f, .slot = b->slot[i], .tries = tries };
        fm_add(c->count->fetch_retries, 1);
        return true;
    }
    b->frame[i] = FM_FRAME_NONE;
    fm_frames_put(c, f, 1, FM_FRAME_FREE);
    fm_slot_detach(c, b, i);
    fm_page_lost(c, b, i);
    return false;
}

static bool verified(struct fm_core *c, struct fm_block *b, uint32_t i, const uint64_t h[2])
{
    return fm_defect(c, NO_HASH_CHECK) || (b->hash[i][0] == h[0] && b->hash[i][1] == h[1]);
}

/* The frames f.. of one block, as far as they are contiguous there.  Returns how many it dealt with; again: a
 * bit per frame (from io->frame on) that must be fetched once more. */
static uint32_t fetched_run(struct fm_core *c, const struct fm_io *io, uint32_t at, const uint64_t (*h)[2], uint64_t *again)
{
    uint32_t f = io->frame + at, n = 1;
    c->ops->enter(c->ctx);
    uint64_t owner = c->frame[f].page;
    struct fm_block *b = fm_block_of_owner(c, owner);
    if (b == NULL) {
        slot_orphan_end(c, &c->frame[f]);
        fm_frames_put(c, f, 1, FM_FRAME_FREE);
        c->ops->leave(c->ctx);
        return 1;
    }
    while (at + n < io->n && c->frame[f + n].page == owner + n && owner + n < b->page + FM_BLOCK_PAGES)
        n++;
    fm_lock_take(&b->lock);
    uint32_t i = (uint32_t)(owner - b->page), good = 0;
    for (uint32_t k = 0; k < n; k++) {
        fm_assert(b->state[i + k] == FM_ARRIVING && b->frame[i + k] == f + k);
        slot_orphan_end(c, &c->frame[f + k]);
        bool ok = io->status == 0 && verified(c, b, i + k, h[at + k]);
        if (ok)
            good++;
        if (good > 0 && (!ok || k + 1 == n)) {
            uint32_t first = k + ok - good;
            arrive(c, b, i + first, f + first, good, io->marker && at + k + 1 == io->n && ok);
            good = 0;
        }
        if (!ok && fetch_failed(c, b, i + k, f + k, io))
            *again |= 1ull << (at + k);
    }
    fm_lock_drop(&b->lock);
    c->ops->leave(c->ctx);
    return n;
}

static void fetch_done(struct fm_core *c, struct fm_io *done)
{
    struct fm_io io = *done;       /* its frame may be reused as soon as it is installed */
    uint64_t h[FM_WINDOW_MAX][2], again = 0;
    fm_assert(io.n >= 1 && io.n <= FM_WINDOW_MAX);
    if (io.status == 0) {
        for (uint32_t k = 0; k < io.n; k++)
            c->ops->hash(c->ctx, io.frame + k, h[k]);
        fm_add(c->count->pages_fetched, io.n);
        fm_add(c->count->bytes_in, (uint64_t)io.n * FM_PAGE_BYTES);
    }
    for (uint32_t k = 0; k < io.n;)
        k += fetched_run(c, &io, k, h, &again);
    for (; again != 0; again &= again - 1)
        c->ops->submit(c->ctx, &c->frame[io.frame + (uint32_t)__builtin_ctzll(again)].transfer);
}

/* A thread that can't be let go on now is woken: it faults again. */
void fm_unprotect(struct fm_core *c, struct fm_block *b, uint32_t i)
{
    if (c->ops->protect(c->ctx, b->page + i, 1, false) != FM_OK)
        c->ops->wake(c->ctx, b->page + i, 1);
}

/* A store failed for good: the page goes back to the program, which has the only copy. */
static void store_failed(struct fm_core *c, struct fm_block *b, uint32_t i, uint32_t f)
{
    fm_add(c->count->store_errors, 1);
    fm_slot_detach(c, b, i);
    if (c->frame[f].copied) {
        b->frame[i] = FM_FRAME_NONE;
        fm_frames_put(c, f, 1, FM_FRAME_FREE);
        fm_page_resident(c, b, i, 1);
        fm_unprotect(c, b, i);
        return;
    }
    enum fm_res r = FM_AGAIN;
    if (fm_in_limbo(b) || fm_install(c, b, i, f, 1, &r) == 0)
        wake_if_waiting(c, b, i);          /* still STAGED and dirty: the evictor tries again */
}

static void stored_page(struct fm_core *c, struct fm_block *b, uint32_t i, uint32_t f, bool ok)
{
    struct fm_frame *fr = &c->frame[f];
    enum fm_res r = FM_OK;
    fm_assert(b->frame[i] == f && (b->state[i] == FM_STAGED || (b->state[i] == FM_LEAVING && fr->copied)));
    if (!ok) {
        store_failed(c, b, i, f);
        return;
    }
    b->flags[i] |= FM_HASHED;
    fr->dirty = 0;
    if (fr->copied) {
        fm_drop_later(c, f);
        return;
    }
    if ((b->flags[i] & FM_WAITING) != 0 && !fm_in_limbo(b) && fm_install(c, b, i, f, 1, &r) == 1) {
        fm_add(c->count->faults_rescue, 1);
        return;
    }
    leave_staged(c, b, i, f, r);
}

static void store_done(struct fm_core *c, struct fm_io *done)
{
    struct fm_io io = *done;
    if (io.status != 0 && !io.final && io.tries + 1 < TRIES_MAX) {
        done->tries++;
        done->status = 0;
        c->ops->submit(c->ctx, done);
        return;
    }
    if (io.status == 0) {
        fm_add(c->count->bytes_out, (uint64_t)io.n * FM_PAGE_BYTES);
        __atomic_store_n(&c->failed_stores, 0, __ATOMIC_RELAXED);
    } else if (__atomic_fetch_add(&c->failed_stores, 1, __ATOMIC_RELAXED) == 0) {
        c->ops->message(c->ctx, FM_LEVEL_WARNING, "the pool could not store pages: they stay local; error", (uint64_t)io.status);
    }
    for (uint32_t f = io.frame; f < io.frame + io.n; f++) {
        c->ops->enter(c->ctx);
        struct fm_frame *fr = &c->frame[f];
        struct fm_block *b = fm_block_of_owner(c, fr->page);
        if (b != NULL)
            fm_lock_take(&b->lock);
        slot_orphan_end(c, fr);
        if (b != NULL) {
            stored_page(c, b, (uint32_t)(fr->page - b->page), f, io.status == 0);
            fm_lock_drop(&b->lock);
        } else {
            fm_frames_put(c, f, 1, FM_FRAME_FREE);
        }
        c->ops->leave(c->ctx);
    }
}

void fm_core_io_done(struct fm_core *c, struct fm_io *io)
{
    if (io->kind == FM_IO_FETCH)
        fetch_done(c, io);
    else
        store_done(c, io);
    c->ops->frames_freed(c->ctx);
}

struct fm_block *fm_block_enter_made(struct fm_core *c, uint64_t page)
{
    for (;;) {
        struct fm_block *b = fm_block_get(c, page);
        if (b == NULL)
            return NULL;
        fm_block_enter(c, b);
        if (fm_block_find(c, page) == b)
            return b;
        fm_block_leave(c, b);           /* it was unmapped, and its record freed, in between */
    }
}

static void found_in_block(struct fm_core *c, struct fm_block *b, uint32_t i, uint32_t n)
{
    uint64_t there[FM_BLOCK_PAGES / 64];
    uint32_t run = 0;
    c->ops->present(c->ctx, b->page + i, n, there);
    for (uint32_t k = i; k <= i + n; k++) {
        bool fresh = k < i + n && b->state[k] == FM_FRESH && (there[(k - i) / 64] >> ((k - i) % 64) & 1) != 0;
        if (fresh)
            b->flags[k] |= FM_FOUND;
        if (!fresh && run > 0) {
            fm_charge(c, run);
            fm_page_resident(c, b, k - run, run);
        }
        run = fresh ? run + 1 : 0;
    }
}

void fm_core_found(struct fm_core *c, uint64_t page, uint32_t n)
{
    while (n > 0) {
        uint32_t left = FM_BLOCK_PAGES - (uint32_t)(page % FM_BLOCK_PAGES), k = n < left ? n : left;
        struct fm_block *b = fm_block_enter_made(c, page);
        struct fm_range piece = { .page = page, .end = page };
        /* What was unmapped since the caller looked may be somebody else's by now, and not registered. */
        while (b != NULL && piece.end < page + k && fm_ranges_next(&c->managed, piece.end, page + k, &piece))
            found_in_block(c, b, (uint32_t)(piece.page - b->page), (uint32_t)(piece.end - piece.page));
        if (b != NULL)
            fm_block_leave(c, b);
        page += k;
        n -= k;
    }
}

void fm_core_keep(struct fm_core *c, uint64_t page, uint64_t n)
{
    for (; n > 0 && !fm_defect(c, ADOPT_TLS); n--, page++) {
        struct fm_block *b = fm_block_enter_made(c, page);
        if (b == NULL)
            continue;
        b->flags[page % FM_BLOCK_PAGES] |= FM_KEEP;
        fm_block_leave(c, b);
    }
}

void fm_core_zaps_done(struct fm_core *c)
{
    __atomic_add_fetch(&c->zap_turn, 1, __ATOMIC_ACQ_REL);
}

void fm_core_recount(struct fm_core *c, uint64_t page, uint64_t n)
{
    uint64_t bits[FM_BLOCK_PAGES / 64];
    while (n > 0) {
        uint32_t i = (uint32_t)(page % FM_BLOCK_PAGES);
        uint32_t k = n < FM_BLOCK_PAGES - i ? (uint32_t)n : FM_BLOCK_PAGES - i;
        c->ops->enter(c->ctx);
        struct fm_block *b = fm_block_find(c, page);
        if (b != NULL) {
            fm_lock_take(&b->lock);
            c->ops->present(c->ctx, page, k, bits);
            for (uint32_t j = 0; j < k; j++)
                if (b->state[i + j] == FM_RESIDENT && (bits[j / 64] >> (j % 64) & 1) == 0)
                    fm_page_missing(c, b, i + j);
            fm_lock_drop(&b->lock);
        }
        c->ops->leave(c->ctx);
        page += k;
        n -= k;
    }
}
