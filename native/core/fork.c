/* fork.c - the child of a fork makes its copy of the books its own.
 *
 * The child's memory is a snapshot in which the parent's evictor stood still, but its fault
 * handler may have been in the middle of something.  What was on its way is settled by
 * looking: a page that is there is resident, one that is not can be had from its slot.  Frames are
 * not inherited (MADV_DONTFORK), so whatever was only in a frame is lost to the child.
 */
#include <stddef.h>

#include "core/core.h"
#include "fm_assert.h"

static void settle_page(struct fm_core *c, struct fm_block *b, uint32_t i, uint64_t there)
{
    bool in_pool = b->slot[i] != FM_SLOT_NONE && (b->flags[i] & FM_HASHED) != 0;
    bool put_back = (b->flags[i] & FM_PUT_BACK) != 0;
    b->flags[i] &= FM_DISCARDED | FM_FOUND | FM_HASHED | FM_KEEP | FM_LAZY | FM_PINNED;
    b->frame[i] = FM_FRAME_NONE;
    switch ((enum fm_state)b->state[i]) {
    case FM_LEAVING:
    case FM_STAGED:
    case FM_ARRIVING:
        if ((there & 1) != 0)
            b->state[i] = FM_RESIDENT;
        else
            b->state[i] = in_pool ? FM_REMOTE : FM_LOST;
        break;
    case FM_RESIDENT:
        if ((there & 1) != 0)
            break;
        /* Put back while the memory was being copied, it is not the child's, but its slot holds the bytes.  Otherwise a
         * page that was discarded has been zapped since, and its slot holds what it was before. */
        if (in_pool && (put_back || !fm_missing_means_zeros(b, i))) {
            b->state[i] = FM_REMOTE;
            break;
        }
        fm_slot_detach(c, b, i);
        b->state[i] = fm_missing_means_zeros(b, i) ? FM_FRESH : FM_LOST;
        break;
    case FM_REMOTE:           /* without its slot: it was being forgotten just then */
        if (!in_pool) {
            fm_slot_detach(c, b, i);
            b->state[i] = fm_missing_means_zeros(b, i) ? FM_FRESH : FM_LOST;
        }
        break;
    default:
        break;
    }
    if (b->state[i] != FM_RESIDENT)
        b->flags[i] &= (uint16_t)~FM_LAZY;
}

static void settle_block(struct fm_core *c, struct fm_block *b)
{
    uint64_t there[FM_BLOCK_PAGES / 64];
    b->lock = (fm_lock){ 0 };
    b->extent = FM_EXTENT_NONE;            /* the parent goes on filling it */
    c->ops->present(c->ctx, b->page, FM_BLOCK_PAGES, there);
    for (uint32_t i = 0; i < FM_BLOCK_PAGES; i++) {
        settle_page(c, b, i, there[i / 64] >> (i % 64));
        c->remote_pages += b->state[i] == FM_REMOTE;
        if (b->state[i] == FM_RESIDENT) {
            c->local_pages++;
            b->flags[i] |= FM_QUEUED;
        }
    }
    for (uint32_t i = 0, run = 0; i <= FM_BLOCK_PAGES; i++) {
        bool resident = i < FM_BLOCK_PAGES && b->state[i] == FM_RESIDENT;
        if (!resident && run > 0)
            fm_queue_push(c, b->page + i - run, run);
        run = resident ? run + 1 : 0;
    }
}

void fm_core_copying(struct fm_core *c, bool on)
{
    for (struct fm_block *b = on ? c->blocks : NULL; b != NULL; b = b->next) {
        fm_lock_take(&b->lock);
        for (uint32_t i = 0; i < FM_BLOCK_PAGES; i++)
            b->flags[i] &= (uint16_t)~FM_PUT_BACK;
        fm_lock_drop(&b->lock);
    }
    __atomic_store_n(&c->copying, on, __ATOMIC_SEQ_CST);
}

/* A transfer that was about to start when its page let go of the slot would release it at its end: here it never ends. */
static void release_orphans(struct fm_core *c)
{
    for (uint32_t f = 0; f < c->frames_n; f++)
        if (c->frame[f].slot_orphan != 0)
            fm_slot_release(&c->ledger, c->frame[f].slot);
}

void fm_core_forked(struct fm_core *c)
{
    fm_lock free_lock = { 0 };
    c->copying = false;
    c->blocks_lock = c->frames_lock = c->queue_lock = c->streams_lock = c->drops_lock = free_lock;
    c->queue_head = c->queue_tail = 0;
    c->drops_n = c->stayed = 0;
    c->staged_head = c->staged_tail = 0;
    c->local_pages = c->remote_pages = 0;
    c->overdraft = 0;
    __builtin_memset(c->bits, 0, sizeof c->bits);
    __builtin_memset(c->kind_n, 0, sizeof c->kind_n);
    release_orphans(c);
    fm_core_init(c, c->frames_n);          /* forgets the spare extent: it is the parent's */
    fm_assert(c->limbo == NULL);
    for (struct fm_block *b = c->blocks; b != NULL; b = b->next)
        settle_block(c, b);
}
