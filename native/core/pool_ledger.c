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
#define SLOT_BYTES 4096ull
#define EXTENT_BYTES (FM_EXTENT_SLOTS * SLOT_BYTES)
#define REAPER FM_PROCS_MAX     /* as a process's number: what the supervisor trims for the dead */
#define PUNCH_EXTENTS_MAX 16u   /* a hole is punched with the file locked: others want to read it meanwhile */

struct head {
    uint64_t magic;
    uint64_t extents;
    uint64_t next;      /* where the search for an empty extent begins */
    uint64_t used;      /* slots */
    uint64_t peak;
};

struct layout {
    uint64_t refs, owner, slots, checksum, bitmaps, bitmap_bytes, end;
};

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

int fm_pool_ledger_init(void *base, uint64_t pool_bytes)
{
    struct head *h = base;
    uint64_t extents = pool_bytes / EXTENT_BYTES;
    if (pool_bytes == 0 || pool_bytes % EXTENT_BYTES != 0 || extents * FM_EXTENT_SLOTS >= FM_SLOT_NONE)
        return -1;
    h->extents = extents;
    h->magic = LEDGER_MAGIC;
    return 0;
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
    l->extent_refs = (uint32_t *)((char *)base + a.refs);
    l->extent_owner = (uint32_t *)((char *)base + a.owner);
    l->slot_refs = (uint16_t *)((char *)base + a.slots);
    l->checksum = (uint64_t *)((char *)base + a.checksum);
    l->bitmap = bitmap_of(base, proc);
    l->proc = proc;
    l->trim = NULL;
    l->trim_ctx = NULL;
}

static bool swap32(uint32_t *p, uint32_t was, uint32_t is)
{
    return __atomic_compare_exchange_n(p, &was, is, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
}

uint32_t fm_extent_take(struct fm_pool_ledger *l, uint32_t hint)
{
    struct head *h = l->base;
    uint64_t from = hint != FM_EXTENT_NONE ? hint : __atomic_load_n(&h->next, __ATOMIC_RELAXED);
    for (uint32_t i = 0; i < l->extents; i++) {
        uint32_t e = (uint32_t)((from + i) % l->extents);
        if (__atomic_load_n(&l->extent_refs[e], __ATOMIC_RELAXED) != 0 || !swap32(&l->extent_refs[e], 0, 1))
            continue;
        __atomic_store_n(&l->extent_owner[e], l->proc + 1, __ATOMIC_RELEASE);
        __atomic_store_n(&h->next, (uint64_t)e + 1, __ATOMIC_RELAXED);
        return e;
    }
    return FM_EXTENT_NONE;
}

/* The owner first: whoever takes the extent next writes its own. */
static void extent_trimmed(struct fm_pool_ledger *l, uint32_t e)
{
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
    return e < l->extents && __atomic_load_n(&l->extent_refs[e], __ATOMIC_ACQUIRE) == REFS_FREEING &&
           __atomic_load_n(&l->extent_owner[e], __ATOMIC_ACQUIRE) == l->proc + 1;
}

void fm_pool_ledger_trim(struct fm_pool_ledger *l, void (*punch)(void *ctx, uint32_t extent, uint32_t n), void *ctx)
{
    for (uint32_t e = 0; e < l->extents; e++) {
        uint32_t n = 0;
        while (n < PUNCH_EXTENTS_MAX && to_trim(l, e + n))
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
    for (uint32_t w = 0; w < l->extents * (FM_EXTENT_SLOTS / 64); w++) {
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
    fm_pool_ledger_trim(&l, punch_file, &pool_fd);
}

void fm_pool_ledger_reap(void *base, uint32_t proc, int trim_later)
{
    struct fm_pool_ledger l;
    fm_pool_ledger_view(&l, base, proc);
    l.trim = trim_later != 0 ? put_off : NULL;
    for (uint32_t w = 0; w < l.extents * (FM_EXTENT_SLOTS / 64); w++)
        for (uint64_t bits = l.bitmap[w]; bits != 0; bits &= bits - 1)
            fm_slot_release(&l, w * 64 + (uint32_t)__builtin_ctzll(bits));
    for (uint32_t e = 0; e < l.extents; e++) {
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
