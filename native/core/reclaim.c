/* reclaim.c - frames back from the staged pages, and memory back from the frames.
 *
 * A staged page can be had from the pool as well, so its frame is given up at will: by the evictor, and by a fault
 * that needs a frame now (fm_frames_for_fetch()).  Only the evictor gives memory back.
 */
#include <stddef.h>

#include "core/core.h"
#include "fm_assert.h"

bool fm_page_reclaim(struct fm_core *c, struct fm_block *b, uint32_t i)
{
    uint32_t f = b->frame[i];
    if (!fm_frame_unstage(c, f))
        return false;
    fm_assert(b->slot[i] != FM_SLOT_NONE && (b->flags[i] & FM_HASHED) != 0);
    b->frame[i] = FM_FRAME_NONE;
    b->flags[i] &= (uint16_t)~FM_MARKER;
    fm_state_set(c, b, i, FM_REMOTE);
    fm_frames_put(c, f, 1, FM_FRAME_FREE);
    return true;
}

uint32_t fm_core_reclaim(struct fm_core *c, uint32_t n)
{
    uint32_t made = 0, tries = c->frames_n, f;
    while (made < n && tries-- > 0 && (f = fm_frame_oldest(c)) != FM_FRAME_NONE) {
        c->ops->enter(c->ctx);
        struct fm_block *b = fm_block_of_owner(c, fm_owner_unlocked(&c->frame[f]));
        if (b != NULL) {
            fm_lock_take(&b->lock);
            uint32_t i = (uint32_t)(c->frame[f].page - b->page);
            if (i < FM_BLOCK_PAGES && b->frame[i] == f && b->state[i] == FM_STAGED && fm_page_reclaim(c, b, i))
                made++;
            fm_lock_drop(&b->lock);
        }
        c->ops->leave(c->ctx);
    }
    return made;
}

uint32_t fm_core_shrink(struct fm_core *c, uint32_t n)
{
    uint32_t gone = 0, first, k;
    while (gone < n) {
        uint32_t want = n - gone < 64 ? n - gone : 64;
        k = fm_frames_take(c, FM_FRAME_DEAD, want, &first);
        if (k == 0)
            k = fm_frames_take(c, FM_FRAME_FREE, want, &first);
        if (k == 0 && fm_core_reclaim(c, want) == 0)
            break;
        if (k == 0)
            continue;
        c->ops->drop_frames(c->ctx, first, k);
        fm_frames_put(c, first, k, FM_FRAME_EMPTY);
        fm_charge(c, -(int64_t)k);
        gone += k;
    }
    return gone;
}
