/* sim_check.c - what must always hold, looked at when no coroutine is inside the core. */
#include <stddef.h>
#include <string.h>

#include "sim.h"

static uint8_t used[EXTENTS_MAX * FM_EXTENT_SLOTS];

static void use_slot(uint32_t slot)
{
    sim_expect(slot < EXTENTS_MAX * FM_EXTENT_SLOTS && used[slot] == 0, "slot %u is used twice", slot);
    used[slot] = 1;
}

static int64_t check_frames(const struct fm_core *c)
{
    uint32_t kind_n[FM_FRAME_KINDS] = { 0 };
    int64_t memory = 0;
    for (uint32_t f = 0; f < c->frames_n; f++) {
        const struct fm_frame *fr = &c->frame[f];
        kind_n[fr->kind]++;
        memory += S.frame[f] != PHYS_NONE;
        for (uint32_t k = 0; k < FM_FRAME_KINDS; k++) {
            bool bit = (c->bits[k][f / 64] >> (f % 64) & 1) != 0;
            bool must = k == fr->kind && (k == FM_FRAME_EMPTY || k == FM_FRAME_FREE || k == FM_FRAME_DEAD);
            sim_expect(bit == must, "frame %u of kind %u: bit %d in the map of kind %u", f, fr->kind, bit, k);
        }
        if (fr->kind != FM_FRAME_BUSY)
            sim_expect((S.frame[f] != PHYS_NONE) == (fr->kind != FM_FRAME_EMPTY), "frame %u of kind %u: memory %d", f, fr->kind,
                       S.frame[f] != PHYS_NONE);
        if (fr->io != 0 && fr->slot_orphan)
            use_slot(fr->slot);
        sim_expect(fr->kind != FM_FRAME_STAGED || fr->page != FM_PAGE_NONE, "staged frame %u has no page", f);
        if (fr->page == FM_PAGE_NONE)
            continue;
        struct fm_block *b = fm_block_of_owner(S.core, fr->page);
        sim_expect(b != NULL && b->frame[fr->page - b->page] == f, "frame %u: its page does not point back", f);
    }
    for (uint32_t k = 0; k < FM_FRAME_KINDS; k++)
        sim_expect(kind_n[k] == c->kind_n[k], "%u frames of kind %u, counted %u", kind_n[k], k, c->kind_n[k]);
    return memory;
}

struct tally { int64_t local, remote, pinned; };

static void check_presence(const struct fm_block *b, uint32_t i)
{
    uint64_t page = b->page + i;
    bool calm = S.changing == 0 && S.events_n == 0 && !fm_in_limbo(b);
    if (!calm || !in_space(page))
        return;
    const struct pte *p = pte_of(page);
    bool there = p->phys != PHYS_NONE, thrown = fm_missing_means_zeros(b, i) || fm_missing_means_remote(b, i);
    uint8_t s = b->state[i];
    sim_expect(s == FM_FRESH || (p->map != 0 && p->registered), "page %u has state %u and is not managed",
               (uint32_t)(page - AS_BASE), s);
    if (s == FM_RESIDENT && !thrown)
        sim_expect(there, "page %u is resident by the books and not there", (uint32_t)(page - AS_BASE));
    bool copied = b->frame[i] != FM_FRAME_NONE && S.core->frame[b->frame[i]].copied;
    if (s == FM_STAGED || s == FM_REMOTE || s == FM_ARRIVING || s == FM_LOST || (s == FM_LEAVING && !copied))
        sim_expect(!there, "page %u has state %u and is there", (uint32_t)(page - AS_BASE), s);
}

static void check_page(const struct fm_block *b, uint32_t i, struct tally *t)
{
    uint8_t s = b->state[i];
    uint32_t f = b->frame[i];
    bool copied = f != FM_FRAME_NONE && S.core->frame[f].copied;
    if (fm_in_limbo(b) && (b->limbo_mask[i / 64] >> (i % 64) & 1) == 0)
        return;
    sim_expect(f == FM_FRAME_NONE || S.core->frame[f].page == b->page + i, "page %u: its frame belongs to another", i);
    bool holds = s == FM_LEAVING || s == FM_STAGED || s == FM_ARRIVING;
    sim_expect(holds == (f != FM_FRAME_NONE) || (fm_in_limbo(b) && s == FM_LEAVING), "page %u: state %u, frame %u", i, s, f);
    if ((b->flags[i] & FM_LAZY) != 0) {
        sim_expect(s == FM_RESIDENT || s == FM_LEAVING, "page %u has state %u and is lazy", i, s);
        sim_expect(b->slot[i] == FM_SLOT_NONE || (b->flags[i] & FM_HASHED) != 0, "page %u is lazy, and its slot is not filled",
                   i);
    }
    t->remote += s == FM_REMOTE;
    t->pinned += (b->flags[i] & FM_PINNED) != 0;
    t->local += s == FM_RESIDENT || (s == FM_LEAVING && (copied || f == FM_FRAME_NONE));
    sim_expect(s != FM_FRESH || b->slot[i] == FM_SLOT_NONE, "page %u is fresh and has a slot", i);
    if (b->slot[i] != FM_SLOT_NONE)
        use_slot(b->slot[i]);
    check_presence(b, i);
}

static void check_ledger(const struct fm_core *c)
{
    for (uint32_t s = 0; s < c->ledger.extents * FM_EXTENT_SLOTS; s++) {
        bool ours = (c->ledger.bitmap[s / 64] >> (s % 64) & 1) != 0;
        sim_expect(ours == (used[s] != 0), "slot %u: used %d, in the ledger %d", s, used[s], ours);
        sim_expect(!ours || c->ledger.slot_refs[s] > 0, "slot %u is ours and has no reference", s);
        if (S.depth == 0 && S.family->children == 0)
            sim_expect(c->ledger.slot_refs[s] == ours, "slot %u has %u references", s, c->ledger.slot_refs[s]);
    }
    if (S.depth > 0 || S.family->children > 0)
        return;
    uint32_t filling = c->spare != FM_EXTENT_NONE, taken = 0;
    for (const struct fm_block *b = c->blocks; b != NULL; b = b->next)
        filling += b->extent != FM_EXTENT_NONE;
    for (const struct fm_block *b = c->limbo; b != NULL; b = b->next)
        filling += b->extent != FM_EXTENT_NONE;
    for (uint32_t e = 0; e < c->ledger.extents; e++)
        taken += c->ledger.extent_owner[e] != 0;
    sim_expect(filling == taken, "%u extents are filled or spare, %u are taken", filling, taken);
}

/* Who waits must be in somebody's hand. */
static void check_waiters(void)
{
    for (uint32_t k = 0; k < CO_N; k++) {
        bool known = false;
        if (!S.blocked[k] || S.co[k].sp == NULL)
            continue;
        uint64_t page = S.blocked_page[k];
        for (uint32_t f = 0; f < FAULTS_MAX; f++)
            known = known || (S.fault[f].state != FAULT_NONE && S.fault[f].page == page);
        struct fm_block *b = fm_block_find(S.core, page);
        known = known || (b != NULL && (b->flags[page % FM_BLOCK_PAGES] & FM_WAITING) != 0);
        sim_expect(known, "a thread waits for page %u for ever (state %d)", (uint32_t)(page - AS_BASE),
                   b != NULL ? b->state[page % FM_BLOCK_PAGES] : -1);
    }
}

void sim_check(void)
{
    struct fm_core *c = S.core;
    struct tally t = { 0, 0, 0 };
    memset(used, 0, sizeof used);
    t.local = check_frames(c);
    for (const struct fm_block *b = c->blocks; b != NULL; b = b->next)
        for (uint32_t i = 0; i < FM_BLOCK_PAGES; i++)
            check_page(b, i, &t);
    for (const struct fm_block *b = c->limbo; b != NULL; b = b->next)
        for (uint32_t i = 0; i < FM_BLOCK_PAGES; i++)
            check_page(b, i, &t);
    sim_expect(t.remote == c->remote_pages, "%lld pages are remote, counted %lld", (long long)t.remote,
               (long long)c->remote_pages);
    sim_expect(t.local == c->local_pages, "%lld pages are local, counted %lld", (long long)t.local, (long long)c->local_pages);
    sim_expect(t.pinned == c->pinned_pages, "%lld pages are pinned, counted %lld", (long long)t.pinned,
               (long long)c->pinned_pages);
    check_ledger(c);
    check_waiters();
}
