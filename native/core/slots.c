/* slots.c - the place in the pool that a page's bytes will be stored in.
 *
 * A block fills one extent, page by page.  Capacity is granted before a page leaves, never during: the ledger gives the
 * extent, the backend the space for it.  The evictor's alone, except for giving an extent up.  A place on a server that
 * can't be had (its span is shut) is as good as none: what is here is stored elsewhere, even if it was there already.
 */
#include <stddef.h>

#include "core/core.h"

static uint64_t slot_place(const struct fm_block *b, uint32_t i)
{
    return (uint64_t)b->extent * FM_EXTENT_SLOTS + i;
}

/* The page's slot can take other bytes. */
static bool slot_own(struct fm_core *c, const struct fm_block *b, uint32_t i)
{
    return b->slot[i] != FM_SLOT_NONE && !fm_slot_shared(&c->ledger, b->slot[i]) && !fm_slot_shut(&c->ledger, b->slot[i]);
}

static bool slot_usable(struct fm_core *c, const struct fm_block *b, uint32_t i)
{
    if (slot_own(c, b, i))
        return true;
    return b->extent != FM_EXTENT_NONE && !fm_slot_shut(&c->ledger, (uint32_t)slot_place(b, i)) &&
           __atomic_load_n(&c->ledger.slot_refs[slot_place(b, i)], __ATOMIC_ACQUIRE) == 0;
}

/* Neighbouring blocks get neighbouring extents where possible. */
static uint32_t extent_hint(struct fm_core *c, uint64_t page)
{
    c->ops->enter(c->ctx);
    struct fm_block *before = fm_block_find(c, page - FM_BLOCK_PAGES);
    uint32_t hint = before != NULL && before->extent != FM_EXTENT_NONE ? before->extent + 1 : FM_EXTENT_NONE;
    c->ops->leave(c->ctx);
    return hint;
}

/* Outside every lock: the backend may have to wait for a file system. */
bool fm_spare_ready(struct fm_core *c, uint64_t page)
{
    if (c->spare != FM_EXTENT_NONE)
        return true;
    c->spare = fm_extent_take(&c->ledger, extent_hint(c, page));
    if (c->spare == FM_EXTENT_NONE || c->ops->grant(c->ctx, c->spare))
        return c->spare != FM_EXTENT_NONE;
    fm_extent_release(&c->ledger, c->spare);
    c->spare = FM_EXTENT_NONE;
    return false;
}

void fm_extent_give_up(struct fm_core *c, struct fm_block *b)
{
    if (b->extent == FM_EXTENT_NONE || !fm_extent_idle(&c->ledger, b->extent))
        return;
    fm_extent_release(&c->ledger, b->extent);
    b->extent = FM_EXTENT_NONE;
}

/* The page has a slot of its own, or its block has an extent with its place free. */
bool fm_slot_grant(struct fm_core *c, struct fm_block *b, uint32_t i)
{
    if (slot_usable(c, b, i))
        return true;
    if (c->spare == FM_EXTENT_NONE)
        return false;
    if (b->extent != FM_EXTENT_NONE)
        fm_extent_release(&c->ledger, b->extent);
    b->extent = c->spare;
    c->spare = FM_EXTENT_NONE;
    return slot_usable(c, b, i);
}

/* A dirty page gets the slot that its bytes will be stored in. */
void fm_slot_assign(struct fm_core *c, struct fm_block *b, uint32_t i)
{
    if (slot_own(c, b, i))
        return;
    fm_slot_detach(c, b, i);
    bool granted = fm_slot_grant(c, b, i);
    if (granted && fm_slot_take(&c->ledger, (uint32_t)slot_place(b, i)))
        b->slot[i] = (uint32_t)slot_place(b, i);
}
