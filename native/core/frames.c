/* frames.c - the frames of the staging area: page-sized places that memory moves through.
 *
 * The same few hundred frames take pages that leave and bring pages that come, so the steady state
 * allocates nothing and stays in the processor's cache.  Runs are searched within words of 64 bits,
 * which is as long as a window or a batch gets.
 */
#include "core/core.h"
#include "fm_assert.h"

/* The lowest run of up to want set bits in x: its length, and where it begins. */
static uint32_t find_run(uint64_t x, uint32_t want, uint32_t *at)
{
    uint32_t len = 0;
    for (uint64_t y = x; y != 0 && len < want; y &= y >> 1) {
        *at = (uint32_t)__builtin_ctzll(y);
        len++;
    }
    return len;
}

static bool has_bits(enum fm_frame_kind kind)
{
    return kind == FM_FRAME_EMPTY || kind == FM_FRAME_FREE || kind == FM_FRAME_DEAD;
}

static void set_kind(struct fm_core *c, uint32_t first, uint32_t n, enum fm_frame_kind kind)
{
    for (uint32_t f = first; f < first + n; f++) {
        enum fm_frame_kind was = c->frame[f].kind;
        if (has_bits(was))
            c->bits[was][f / 64] &= ~(1ull << (f % 64));
        if (has_bits(kind))
            c->bits[kind][f / 64] |= 1ull << (f % 64);
        /* Atomic for those who look without the lock, to decide whether it is worth taking. */
        __atomic_store_n(&c->kind_n[was], c->kind_n[was] - 1, __ATOMIC_RELAXED);
        __atomic_store_n(&c->kind_n[kind], c->kind_n[kind] + 1, __ATOMIC_RELAXED);
        c->frame[f].kind = (uint8_t)kind;
    }
}

FM_UNLOCKED_LOOK uint64_t fm_owner_unlocked(const struct fm_frame *fr) { return fr->page; }

uint32_t fm_frames_take(struct fm_core *c, enum fm_frame_kind kind, uint32_t want, uint32_t *first)
{
    uint32_t best = 0;
    fm_assert(has_bits(kind));
    if (__atomic_load_n(&c->kind_n[kind], __ATOMIC_RELAXED) == 0)
        return 0;
    fm_lock_take(&c->frames_lock);
    for (uint32_t w = 0; w * 64 < c->frames_n && best < want; w++) {
        uint32_t at = 0, len = find_run(c->bits[kind][w], want, &at);
        if (len > best) {
            best = len;
            *first = w * 64 + at;
        }
    }
    if (best > 0)
        set_kind(c, *first, best, FM_FRAME_BUSY);
    fm_lock_drop(&c->frames_lock);
    for (uint32_t k = 0; k < best; k++)
        fm_assert(c->frame[*first + k].page == FM_PAGE_NONE && c->frame[*first + k].io == 0);
    return best;
}

void fm_frames_put(struct fm_core *c, uint32_t first, uint32_t n, enum fm_frame_kind kind)
{
    for (uint32_t f = first; f < first + n; f++) {
        fm_assert(c->frame[f].kind == FM_FRAME_BUSY && c->frame[f].io == 0);
        c->frame[f].page = FM_PAGE_NONE;
        c->frame[f].copied = 0;
        c->frame[f].dirty = 0;
        c->frame[f].dropping = 0;
    }
    fm_lock_take(&c->frames_lock);
    if (kind == FM_FRAME_FREE && c->frames_shared)
        kind = FM_FRAME_DEAD;
    set_kind(c, first, n, kind);
    fm_lock_drop(&c->frames_lock);
}

#define STAGED_CAP (FM_FRAMES_MAX * 2)

static bool entry_live(struct fm_core *c, uint32_t k)
{
    struct fm_frame *fr = &c->frame[c->staged[k % STAGED_CAP].frame];
    return fr->kind == FM_FRAME_STAGED && fr->turn == c->staged[k % STAGED_CAP].turn;
}

/* Stale entries (rescued since) are only found out at the head.  When the ring is full there is at least one,
 * since it has more places than there are frames: turn the live ones round until it is met. */
static void ring_push(struct fm_core *c, uint32_t f)
{
    while (c->staged_tail - c->staged_head == STAGED_CAP) {
        uint32_t k = c->staged_head++;
        if (entry_live(c, k))
            c->staged[c->staged_tail++ % STAGED_CAP] = c->staged[k % STAGED_CAP];
    }
    c->staged[c->staged_tail % STAGED_CAP].frame = f;
    c->staged[c->staged_tail++ % STAGED_CAP].turn = c->frame[f].turn;
}

void fm_frame_stage(struct fm_core *c, uint32_t f)
{
    struct fm_frame *fr = &c->frame[f];
    fm_assert(fr->kind == FM_FRAME_BUSY && fr->io == 0 && fr->page != FM_PAGE_NONE);
    fr->dirty = 0;
    fm_lock_take(&c->frames_lock);
    set_kind(c, f, 1, FM_FRAME_STAGED);
    fr->turn++;
    ring_push(c, f);
    fm_lock_drop(&c->frames_lock);
}

bool fm_frame_unstage(struct fm_core *c, uint32_t f)
{
    fm_lock_take(&c->frames_lock);
    bool ours = c->frame[f].kind == FM_FRAME_STAGED;
    if (ours)
        set_kind(c, f, 1, FM_FRAME_BUSY);
    fm_lock_drop(&c->frames_lock);
    return ours;
}

uint32_t fm_frame_oldest(struct fm_core *c)
{
    uint32_t f = FM_FRAME_NONE;
    fm_lock_take(&c->frames_lock);
    while (c->staged_head != c->staged_tail && f == FM_FRAME_NONE) {
        uint32_t k = c->staged_head++;
        if (entry_live(c, k))
            f = c->staged[k % STAGED_CAP].frame;
    }
    fm_lock_drop(&c->frames_lock);
    return f;
}

uint32_t fm_frames_for_fetch(struct fm_core *c, uint32_t want, uint32_t *first)
{
    uint32_t n = fm_frames_take(c, FM_FRAME_FREE, want, first);
    if (n > 0)
        return n;
    if (!c->frames_shared && fm_core_reclaim(c, want) > 0 && (n = fm_frames_take(c, FM_FRAME_FREE, want, first)) > 0)
        return n;
    /* New memory, while there is room; a shared job's frames are always new. */
    int64_t room = __atomic_load_n(&c->limit_pages, __ATOMIC_RELAXED) - __atomic_load_n(&c->local_pages, __ATOMIC_RELAXED);
    if (__atomic_load_n(&c->overdraft, __ATOMIC_ACQUIRE) > 0)
        room = want;
    if (room <= 0)
        return 0;
    n = fm_frames_take(c, FM_FRAME_EMPTY, want < room ? want : (uint32_t)room, first);
    if (n == 0)
        return 0;
    c->ops->enter(c->ctx);
    uint32_t made = 0;
    c->ops->fill_frames(c->ctx, *first, n, &made);
    c->ops->leave(c->ctx);
    if (made < n)
        fm_frames_put(c, *first + made, n - made, FM_FRAME_EMPTY);
    fm_charge(c, made);
    return made;
}

void fm_core_share_frames(struct fm_core *c)
{
    fm_lock_take(&c->frames_lock);
    if (!fm_defect(c, REUSE_SHARED_FRAMES))
        __atomic_store_n(&c->frames_shared, true, __ATOMIC_SEQ_CST);
    for (uint32_t f = 0; f < c->frames_n; f++)
        if (c->frames_shared && c->frame[f].kind == FM_FRAME_FREE)
            set_kind(c, f, 1, FM_FRAME_DEAD);
    fm_lock_drop(&c->frames_lock);
}
