/* blocks.c - where the record of a page is found: a two-level table of 2 MiB blocks.
 *
 * Lookups take no lock: entries are published once and taken out only while events
 * are applied, when nobody is inside (see core.h).  Blocks are made when first needed,
 * so that a huge reservation costs nothing, and freed when all of one is unmapped.
 */
#include <stddef.h>

#include "core/core.h"
#include "fm_assert.h"

#define BLOCK_NO(page) ((page) / FM_BLOCK_PAGES)

static bool in_table(uint64_t page) { return BLOCK_NO(page) < (uint64_t)FM_TABLE_SIZE * FM_TABLE_SIZE; }

struct fm_block *fm_block_find(struct fm_core *c, uint64_t page)
{
    uint64_t no = BLOCK_NO(page);
    if (!in_table(page))
        return NULL;
    struct fm_block **leaf = __atomic_load_n(&c->table[no >> FM_TABLE_BITS], __ATOMIC_ACQUIRE);
    return leaf != NULL ? __atomic_load_n(&leaf[no & (FM_TABLE_SIZE - 1)], __ATOMIC_ACQUIRE) : NULL;
}

static struct fm_block *block_make(struct fm_core *c, uint64_t page)
{
    struct fm_block *b = c->blocks_free;
    if (b != NULL) {
        c->blocks_free = b->next;
        __builtin_memset(b, 0, sizeof *b);
    } else {
        b = c->ops->block_memory(c->ctx);
        if (b == NULL)
            return NULL;
        c->blocks_made++;
    }
    b->page = page - page % FM_BLOCK_PAGES;
    b->extent = FM_EXTENT_NONE;
    bool hull = b->page < c->hull_end && b->page + FM_BLOCK_PAGES > c->hull_first;
    uint16_t discarded = fm_defect(c, SKIP_ZAPPING) ? FM_DISCARDED : FM_DISCARDED | FM_ZAPPING;
    for (uint32_t i = 0; i < FM_BLOCK_PAGES; i++) {
        b->slot[i] = FM_SLOT_NONE;
        b->frame[i] = FM_FRAME_NONE;
        b->flags[i] = hull ? discarded : 0;
    }
    b->zap_turn = __atomic_load_n(&c->zap_turn, __ATOMIC_ACQUIRE);
    return b;
}

struct fm_block *fm_block_get(struct fm_core *c, uint64_t page)
{
    struct fm_block *b = fm_block_find(c, page);
    if (b != NULL || !in_table(page))
        return b;
    fm_lock_take(&c->blocks_lock);
    uint64_t no = BLOCK_NO(page);
    struct fm_block ***leaf = &c->table[no >> FM_TABLE_BITS];
    if (*leaf == NULL)
        __atomic_store_n(leaf, c->ops->memory(c->ctx, NULL, 0, FM_TABLE_SIZE * sizeof(void *)), __ATOMIC_RELEASE);
    if (*leaf != NULL && (b = (*leaf)[no & (FM_TABLE_SIZE - 1)]) == NULL && (b = block_make(c, page)) != NULL) {
        b->next = c->blocks;
        c->blocks = b;
        __atomic_store_n(&(*leaf)[no & (FM_TABLE_SIZE - 1)], b, __ATOMIC_RELEASE);
    }
    fm_lock_drop(&c->blocks_lock);
    return b;
}

void fm_block_free(struct fm_core *c, struct fm_block *b)
{
    uint64_t no = BLOCK_NO(b->page);
    struct fm_block **at = &c->blocks;
    while (*at != b) {
        fm_assert(*at != NULL);
        at = &(*at)->next;
    }
    *at = b->next;
    c->table[no >> FM_TABLE_BITS][no & (FM_TABLE_SIZE - 1)] = NULL;
    if (b->extent != FM_EXTENT_NONE)
        fm_extent_release(&c->ledger, b->extent);
    b->next = c->blocks_free;
    c->blocks_free = b;
}

struct fm_block *fm_block_of_owner(struct fm_core *c, uint64_t owner)
{
    if (owner == FM_PAGE_NONE)
        return NULL;
    if ((owner & FM_LIMBO_BIT) == 0)
        return fm_block_find(c, owner);
    struct fm_block *b = c->limbo;
    while (b != NULL && (owner < b->page || owner >= b->page + FM_BLOCK_PAGES))
        b = b->next;
    return b;
}

void fm_block_enter(struct fm_core *c, struct fm_block *b)
{
    c->ops->enter(c->ctx);
    fm_lock_take(&b->lock);
}

void fm_block_leave(struct fm_core *c, struct fm_block *b)
{
    fm_lock_drop(&b->lock);
    c->ops->leave(c->ctx);
}
