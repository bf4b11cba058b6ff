/* pool_ledger.c - reference counts of the job's pool; see pool_ledger.h.
 *
 * Runs in the engine (no libc state, no allocation) and, through cffi, in the
 * supervisor.  It must not assume that the process it works for is alive.
 */
#include "pool_ledger.h"

#include <linux/falloc.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "control.h"
#include "fm_assert.h"

#define LEDGER_MAGIC 0x7265676465ull
#define REFS_FREEING 0xffffffffu
#define REFS_CLOSED 0xfffffffeu
#define SLOT_BYTES 4096ull
#define EXTENT_BYTES (FM_EXTENT_SLOTS * SLOT_BYTES)
#define REAPER FM_PROCS_MAX     /* as a process's number: what the supervisor trims for the dead */
#define PUNCH_EXTENTS_MAX 16u   /* a hole is punched with the file locked: others want to read it meanwhile */

struct head {
    uint64_t magic;
    uint64_t extents;
    uint64_t used;      /* slots */
    uint64_t peak;
    uint32_t spans;     /* written last when one is added */
    uint32_t end;       /* no extent from here on was ever in a span */
    struct fm_pool_span span[FM_SPANS_MAX];
};

_Static_assert(sizeof(struct head) <= 4096 && FM_SPANS_MAX <= 64, "the head has a page, a view a bit for each span");

struct layout {
    uint64_t refs, owner, slots, checksum, bitmaps, bitmap_bytes, end;
};

static bool swap32(uint32_t *p, uint32_t was, uint32_t is)
{
    return __atomic_compare_exchange_n(p, &was, is, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
}

static uint64_t pages_up(uint64_t bytes) { return (bytes + 4095) & ~4095ull; }

static struct layout layout_of(uint64_t extents)
{
    struct layout a;
    a.refs = 4096;
    a.owner = a.refs + pages_up(extents * sizeof(uint32_t));
    a.slots = a.owner + pages_up(extents * sizeof(uint32_t));
    a.checksum = a.slots + pages_up(extents * FM_EXTENT_SLOTS * sizeof(uint16_t));
    a.bitmaps = a.checksum + pages_up(extents * FM_EXTENT_SLOTS * sizeof(uint64_t));
    a.bitmap_bytes = pages_up(extents * FM_EXTENT_SLOTS / 8);
    a.end = a.bitmaps + a.bitmap_bytes * FM_PROCS_MAX;
    return a;
}

uint64_t fm_pool_ledger_bytes(uint64_t pool_bytes)
{
    return layout_of(pool_bytes / EXTENT_BYTES).end;
}

int fm_pool_ledger_init_empty(void *base, uint64_t pool_bytes)
{
    struct head *h = base;
    uint64_t extents = pool_bytes / EXTENT_BYTES;
    if (pool_bytes == 0 || pool_bytes % EXTENT_BYTES != 0 || extents * FM_EXTENT_SLOTS >= FM_SLOT_NONE)
        return -1;
    h->extents = extents;
    h->magic = LEDGER_MAGIC;
    return 0;
}

/* The place of a span that was closed; NULL: there is none that is large enough. */
static struct fm_pool_span *closed_place(struct head *h, uint32_t extents)
{
    for (struct fm_pool_span *s = h->span; s < h->span + h->spans; s++)
        if (s->extents == 0 && s->room >= extents)
            return s;
    return NULL;
}

int fm_pool_ledger_add(void *base, uint32_t extents)
{
    struct head *h = base;
    struct fm_pool_ledger l;
    uint32_t k = h->spans;
    struct fm_pool_span *closed = closed_place(h, extents), *s = &h->span[k];
    if (k == FM_SPANS_MAX || extents == 0 || (closed == NULL && extents > h->extents - h->end))
        return -1;
    *s = (struct fm_pool_span){ .first = h->end, .extents = extents, .room = extents };
    if (closed != NULL) {
        s->first = closed->first;
        s->room = closed->room;
        closed->room = 0;
    } else {
        __atomic_store_n(&h->end, h->end + extents, __ATOMIC_RELEASE);
    }
    __atomic_store_n(&h->spans, k + 1, __ATOMIC_RELEASE);
    /* Opened last: who can take one finds its span. */
    fm_pool_ledger_view(&l, base, 0);
    for (uint32_t e = s->first; closed != NULL && e < s->first + extents; e++)
        __atomic_store_n(&l.extent_refs[e], 0, __ATOMIC_RELEASE);
    return (int)k;
}

uint32_t fm_pool_ledger_room(void *base)
{
    struct head *h = base;
    uint32_t most = (uint32_t)h->extents - h->end;
    for (const struct fm_pool_span *s = h->span; s < h->span + h->spans; s++)
        most = s->extents == 0 && s->room > most ? s->room : most;
    return h->spans < FM_SPANS_MAX ? most : 0;
}

int fm_pool_ledger_close(void *base, uint32_t span)
{
    struct fm_pool_ledger l;
    fm_pool_ledger_view(&l, base, 0);
    struct fm_pool_span *s = &((struct head *)base)->span[span];
    uint32_t n = 0;
    fm_assert(span < fm_pool_spans(&l));
    while (n < s->extents && swap32(&l.extent_refs[s->first + n], 0, REFS_CLOSED))
        n++;
    if (n == s->extents) {
        __atomic_store_n(&s->extents, 0, __ATOMIC_RELEASE);
        return 0;
    }
    while (n-- > 0)
        __atomic_store_n(&l.extent_refs[s->first + n], 0, __ATOMIC_RELEASE);
    return -1;
}

int fm_pool_ledger_init(void *base, uint64_t pool_bytes)
{
    if (fm_pool_ledger_init_empty(base, pool_bytes) != 0)
        return -1;
    return fm_pool_ledger_add(base, (uint32_t)(pool_bytes / EXTENT_BYTES));
}

static uint64_t *bitmap_of(void *base, uint32_t proc)
{
    struct layout a = layout_of(((struct head *)base)->extents);
    fm_assert(proc < FM_PROCS_MAX);
    return (uint64_t *)((char *)base + a.bitmaps + a.bitmap_bytes * proc);
}

void fm_pool_ledger_view(struct fm_pool_ledger *l, void *base, uint32_t proc)
{
    struct head *h = base;
    struct layout a = layout_of(h->extents);
    fm_assert(h->magic == LEDGER_MAGIC);
    l->base = base;
    l->extents = (uint32_t)h->extents;
    l->shut = 0;
    l->extent_refs = (uint32_t *)((char *)base + a.refs);
    l->extent_owner = (uint32_t *)((char *)base + a.owner);
    l->slot_refs = (uint16_t *)((char *)base + a.slots);
    l->checksum = (uint64_t *)((char *)base + a.checksum);
    l->bitmap = bitmap_of(base, proc);
    l->proc = proc;
    l->trim = NULL;
    l->trim_ctx = NULL;
}

/* ---- spans ------------------------------------------------------------------------------------------------- */

uint32_t fm_pool_spans(const struct fm_pool_ledger *l)
{
    return __atomic_load_n(&((const struct head *)l->base)->spans, __ATOMIC_ACQUIRE);
}

const struct fm_pool_span *fm_pool_span(const struct fm_pool_ledger *l, uint32_t span)
{
    fm_assert(span < fm_pool_spans(l));
    return &((const struct head *)l->base)->span[span];
}

static uint32_t extents_of(const struct fm_pool_span *s) { return __atomic_load_n(&s->extents, __ATOMIC_ACQUIRE); }

/* They are few.  One that is closed meanwhile has no extent in use. */
uint32_t fm_pool_span_of(const struct fm_pool_ledger *l, uint32_t extent)
{
    uint32_t n = fm_pool_spans(l);
    for (uint32_t k = 0; k < n; k++) {
        const struct fm_pool_span *s = fm_pool_span(l, k);
        if (extent >= s->first && extent - s->first < extents_of(s))
            return k;
    }
    fm_assert(!"an extent that is in use lies in a span");
    return n;
}

/* Nothing behind it was ever in use. */
static uint32_t spans_end(const struct fm_pool_ledger *l)
{
    return __atomic_load_n(&((const struct head *)l->base)->end, __ATOMIC_ACQUIRE);
}

static bool is_shut(const struct fm_pool_ledger *l, uint32_t span)
{
    return (__atomic_load_n(&l->shut, __ATOMIC_ACQUIRE) >> span & 1) != 0;
}

void fm_pool_span_shut(struct fm_pool_ledger *l, uint32_t span, bool shut)
{
    if (shut)
        __atomic_fetch_or(&l->shut, 1ull << span, __ATOMIC_ACQ_REL);
    else
        __atomic_fetch_and(&l->shut, ~(1ull << span), __ATOMIC_ACQ_REL);
}

bool fm_slot_shut(const struct fm_pool_ledger *l, uint32_t slot)
{
    return __atomic_load_n(&l->shut, __ATOMIC_ACQUIRE) != 0 && is_shut(l, fm_pool_span_of(l, slot / FM_EXTENT_SLOTS));
}

/* A process that dies in between may make it wrong by one. */
static void count_taken(struct fm_pool_ledger *l, uint32_t span, bool more)
{
    uint32_t *taken = &((struct head *)l->base)->span[span].taken;
    if (more || __atomic_load_n(taken, __ATOMIC_RELAXED) > 0)
        __atomic_add_fetch(taken, more ? 1u : (uint32_t)-1, __ATOMIC_RELAXED);
}

static uint32_t free_of(const struct fm_pool_span *s)
{
    uint32_t taken = __atomic_load_n(&s->taken, __ATOMIC_RELAXED), extents = extents_of(s);
    return taken < extents ? extents - taken : 0;
}

/* The one with the most free of those that were not tried; one that is shut only when there is no other. */
static uint32_t roomiest(const struct fm_pool_ledger *l, uint64_t tried)
{
    uint32_t best = FM_SPANS_MAX;
    uint64_t most = 0;
    for (uint32_t k = 0; k < fm_pool_spans(l); k++) {
        uint64_t rank = 1 + free_of(fm_pool_span(l, k)) + ((uint64_t)!is_shut(l, k) << 32);
        if ((tried >> k & 1) != 0 || rank <= most)
            continue;
        best = k;
        most = rank;
    }
    return best;
}

/* ---- extents ----------------------------------------------------------------------------------------------- */

static uint32_t take_of_span(struct fm_pool_ledger *l, uint32_t span, uint32_t hint)
{
    struct fm_pool_span *s = &((struct head *)l->base)->span[span];
    uint32_t n = extents_of(s);
    bool near = hint != FM_EXTENT_NONE && hint >= s->first && hint - s->first < n;
    uint64_t from = near ? hint - s->first : __atomic_load_n(&s->next, __ATOMIC_RELAXED);
    for (uint32_t i = 0; i < n; i++) {
        uint32_t e = s->first + (uint32_t)((from + i) % n);
        if (__atomic_load_n(&l->extent_refs[e], __ATOMIC_RELAXED) != 0 || !swap32(&l->extent_refs[e], 0, 1))
            continue;
        __atomic_store_n(&l->extent_owner[e], l->proc + 1, __ATOMIC_RELEASE);
        __atomic_store_n(&s->next, e - s->first + 1, __ATOMIC_RELAXED);
        count_taken(l, span, true);
        return e;
    }
    return FM_EXTENT_NONE;
}

uint32_t fm_extent_take(struct fm_pool_ledger *l, uint32_t hint)
{
    uint32_t e = FM_EXTENT_NONE;
    uint64_t tried = 0;
    for (uint32_t n = fm_pool_spans(l); n > 0 && e == FM_EXTENT_NONE; n--) {
        uint32_t k = roomiest(l, tried);
        if (k == FM_SPANS_MAX)
            break;
        e = take_of_span(l, k, hint);
        tried |= 1ull << k;
    }
    return e;
}

/* The owner first: whoever takes the extent next writes its own. */
static void extent_trimmed(struct fm_pool_ledger *l, uint32_t e)
{
    count_taken(l, fm_pool_span_of(l, e), false);
    __atomic_store_n(&l->extent_owner[e], 0, __ATOMIC_RELEASE);
    __atomic_store_n(&l->extent_refs[e], 0, __ATOMIC_RELEASE);
}

/* The last reference is gone: give the memory back before anyone may take the
 * extent again, or the trim would destroy the next owner's bytes. */
static void extent_put(struct fm_pool_ledger *l, uint32_t e)
{
    uint32_t left = __atomic_sub_fetch(&l->extent_refs[e], 1, __ATOMIC_ACQ_REL);
    fm_assert(left != REFS_FREEING);
    if (left != 0 || !swap32(&l->extent_refs[e], 0, REFS_FREEING))
        return;
    __atomic_store_n(&l->extent_owner[e], l->proc + 1, __ATOMIC_RELEASE);   /* should we die now, the reaper trims it */
    if (l->trim == NULL || l->trim(l->trim_ctx, e))
        extent_trimmed(l, e);
}

static bool to_trim(const struct fm_pool_ledger *l, uint32_t e)
{
    return __atomic_load_n(&l->extent_refs[e], __ATOMIC_ACQUIRE) == REFS_FREEING &&
           __atomic_load_n(&l->extent_owner[e], __ATOMIC_ACQUIRE) == l->proc + 1;
}

void fm_pool_ledger_trim(struct fm_pool_ledger *l, uint32_t span, void (*punch)(void *ctx, uint32_t extent, uint32_t n),
                         void *ctx)
{
    const struct fm_pool_span *s = fm_pool_span(l, span);
    uint32_t end = s->first + extents_of(s);
    for (uint32_t e = s->first; e < end; e++) {
        uint32_t n = 0;
        while (n < PUNCH_EXTENTS_MAX && e + n < end && to_trim(l, e + n))
            n++;
        if (n > 0)
            punch(ctx, e, n);
        for (uint32_t k = 0; k < n; k++)
            extent_trimmed(l, e + k);
    }
}

void fm_extent_release(struct fm_pool_ledger *l, uint32_t e)
{
    fm_assert(e < l->extents);
    if (swap32(&l->extent_owner[e], l->proc + 1, 0))
        extent_put(l, e);
}

bool fm_extent_idle(struct fm_pool_ledger *l, uint32_t e)
{
    return __atomic_load_n(&l->extent_refs[e], __ATOMIC_ACQUIRE) == 1;
}

static void count_used(struct head *h)
{
    uint64_t now = __atomic_add_fetch(&h->used, 1, __ATOMIC_RELAXED);
    uint64_t peak = __atomic_load_n(&h->peak, __ATOMIC_RELAXED);
    while (now > peak &&
           !__atomic_compare_exchange_n(&h->peak, &peak, now, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
        continue;
}

bool fm_slot_take(struct fm_pool_ledger *l, uint32_t slot)
{
    uint16_t unused = 0;
    fm_assert(slot / FM_EXTENT_SLOTS < l->extents);
    if (!__atomic_compare_exchange_n(&l->slot_refs[slot], &unused, 1, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
        return false;
    __atomic_add_fetch(&l->extent_refs[slot / FM_EXTENT_SLOTS], 1, __ATOMIC_ACQ_REL);
    __atomic_fetch_or(&l->bitmap[slot / 64], 1ull << (slot % 64), __ATOMIC_ACQ_REL);
    count_used(l->base);
    return true;
}

void fm_slot_release(struct fm_pool_ledger *l, uint32_t slot)
{
    uint64_t bit = 1ull << (slot % 64);
    fm_assert(slot / FM_EXTENT_SLOTS < l->extents);
    uint64_t had = __atomic_fetch_and(&l->bitmap[slot / 64], ~bit, __ATOMIC_ACQ_REL);
    fm_assert((had & bit) != 0);
    uint16_t left = __atomic_sub_fetch(&l->slot_refs[slot], 1, __ATOMIC_ACQ_REL);
    fm_assert(left != UINT16_MAX);
    if (left == 0)
        __atomic_sub_fetch(&((struct head *)l->base)->used, 1, __ATOMIC_RELAXED);
    extent_put(l, slot / FM_EXTENT_SLOTS);
}

bool fm_slot_shared(struct fm_pool_ledger *l, uint32_t slot)
{
    return __atomic_load_n(&l->slot_refs[slot], __ATOMIC_ACQUIRE) > 1;
}

void fm_pool_ledger_fork(struct fm_pool_ledger *l, uint32_t child)
{
    uint64_t *theirs = bitmap_of(l->base, child);
    for (uint32_t w = 0; w < spans_end(l) * (FM_EXTENT_SLOTS / 64); w++) {
        uint64_t bits = __atomic_load_n(&l->bitmap[w], __ATOMIC_ACQUIRE);
        for (uint64_t rest = bits; rest != 0; rest &= rest - 1) {
            uint32_t slot = w * 64 + (uint32_t)__builtin_ctzll(rest);
            __atomic_add_fetch(&l->slot_refs[slot], 1, __ATOMIC_ACQ_REL);
            __atomic_add_fetch(&l->extent_refs[slot / FM_EXTENT_SLOTS], 1, __ATOMIC_ACQ_REL);
        }
        if (bits != 0)
            __atomic_store_n(&theirs[w], bits, __ATOMIC_RELEASE);
    }
}

static bool put_off(void *ctx, uint32_t extent)
{
    (void)ctx;
    (void)extent;
    return false;
}

static void punch_file(void *pool_fd, uint32_t extent, uint32_t n)
{
    /* Best effort: an extent that stays allocated holds nothing that is read again. */
    (void)syscall(SYS_fallocate, *(int *)pool_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, extent * EXTENT_BYTES,
                  n * EXTENT_BYTES);
}

void fm_pool_ledger_trim_reaped(void *base, int pool_fd)
{
    struct fm_pool_ledger l;
    fm_pool_ledger_view(&l, base, 0);
    l.proc = REAPER;
    for (uint32_t k = 0; k < fm_pool_spans(&l); k++)
        fm_pool_ledger_trim(&l, k, punch_file, &pool_fd);
}

void fm_pool_ledger_reap(void *base, uint32_t proc, int trim_later)
{
    struct fm_pool_ledger l;
    fm_pool_ledger_view(&l, base, proc);
    l.trim = trim_later != 0 ? put_off : NULL;
    for (uint32_t w = 0; w < spans_end(&l) * (FM_EXTENT_SLOTS / 64); w++)
        for (uint64_t bits = l.bitmap[w]; bits != 0; bits &= bits - 1)
            fm_slot_release(&l, w * 64 + (uint32_t)__builtin_ctzll(bits));
    for (uint32_t e = 0; e < spans_end(&l); e++) {
        if (!to_trim(&l, e))
            fm_extent_release(&l, e);
        /* The number of the dead may soon be another's, which trims what bears it. */
        if (to_trim(&l, e))
            __atomic_store_n(&l.extent_owner[e], REAPER + 1, __ATOMIC_RELEASE);
    }
    /* Reading a hole of a memfd fills it: give the bitmap's pages back. */
    (void)madvise(l.bitmap, layout_of(l.extents).bitmap_bytes, MADV_REMOVE);
}

uint64_t fm_pool_ledger_used(void *base) { return ((struct head *)base)->used; }
uint64_t fm_pool_ledger_peak(void *base) { return ((struct head *)base)->peak; }

uint32_t fm_pool_ledger_span_extents(void *base, uint32_t span) { return extents_of(&((struct head *)base)->span[span]); }
uint32_t fm_pool_ledger_span_free(void *base, uint32_t span) { return free_of(&((struct head *)base)->span[span]); }

uint64_t fm_pool_ledger_capacity(void *base)
{
    struct fm_pool_ledger l;
    uint64_t extents = 0;
    fm_pool_ledger_view(&l, base, 0);
    for (uint32_t k = 0; k < fm_pool_spans(&l); k++)
        extents += extents_of(fm_pool_span(&l, k));
    return extents * EXTENT_BYTES;
}

uint64_t fm_pool_ledger_span_used(void *base, uint32_t span)
{
    struct fm_pool_ledger l;
    uint64_t used = 0;
    fm_pool_ledger_view(&l, base, 0);
    const struct fm_pool_span *s = fm_pool_span(&l, span);
    for (uint32_t e = s->first, end = s->first + extents_of(s); e < end; e++) {
        uint32_t refs = __atomic_load_n(&l.extent_refs[e], __ATOMIC_ACQUIRE);
        uint32_t owned = __atomic_load_n(&l.extent_owner[e], __ATOMIC_ACQUIRE) != 0;
        if (refs != REFS_FREEING && refs > owned)
            used += refs - owned;
    }
    return used;
}
