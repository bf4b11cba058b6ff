/* test_ledger.c - the pool's reference counts: extents, slots that forked children share, and the reaping of a
 * process that died without a word.  Direct calls on a ledger in plain memory, which is all that it needs.
 */
#include <string.h>
#include <sys/mman.h>

#include "check.h"
#include "pool_ledger.h"

#define EXTENTS 4u
#define POOL_BYTES (EXTENTS * FM_EXTENT_SLOTS * 4096ull)

static uint32_t trims, trimmed_last;

static bool trim(void *ctx, uint32_t extent)
{
    (void)ctx;
    trims++;
    trimmed_last = extent;
    return true;
}

static void *make(struct fm_pool_ledger *l)
{
    uint64_t bytes = fm_pool_ledger_bytes(POOL_BYTES);
    void *base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(base != MAP_FAILED);
    CHECK(fm_pool_ledger_init(base, POOL_BYTES) == 0);
    fm_pool_ledger_view(l, base, 0);
    l->trim = trim;
    trims = 0;
    return base;
}

static void done(void *base) { munmap(base, fm_pool_ledger_bytes(POOL_BYTES)); }

static void sizes_are_checked(void)
{
    char head[4096] = { 0 };
    CHECK(fm_pool_ledger_init(head, 0) == -1);
    CHECK(fm_pool_ledger_init(head, 4096) == -1);
    CHECK(fm_pool_ledger_init(head, POOL_BYTES + 1) == -1);
    CHECK(fm_pool_ledger_init(head, 1ull << 45) == -1);
}

static void extents_are_taken_near_the_hint(void)
{
    struct fm_pool_ledger l;
    void *base = make(&l);
    CHECK(fm_extent_take(&l, 2) == 2);
    CHECK(fm_extent_take(&l, 2) == 3);
    CHECK(fm_extent_take(&l, 2) == 0);
    CHECK(fm_extent_take(&l, FM_EXTENT_NONE) == 1);
    CHECK(fm_extent_take(&l, 0) == FM_EXTENT_NONE);
    fm_extent_release(&l, 3);
    CHECK(trims == 1 && trimmed_last == 3);
    CHECK(fm_extent_take(&l, 0) == 3);
    done(base);
}

static void a_slot_keeps_its_extent(void)
{
    struct fm_pool_ledger l;
    void *base = make(&l);
    uint32_t e = fm_extent_take(&l, 1), slot = e * FM_EXTENT_SLOTS + 7;
    CHECK(fm_slot_take(&l, slot));
    CHECK(!fm_slot_take(&l, slot));
    CHECK(fm_pool_ledger_used(base) == 1);
    fm_extent_release(&l, e);
    CHECK(trims == 0);
    CHECK(fm_extent_take(&l, e) != e);
    fm_slot_release(&l, slot);
    CHECK(trims == 1 && trimmed_last == e);
    CHECK(fm_pool_ledger_used(base) == 0 && fm_pool_ledger_peak(base) == 1);
    done(base);
}

static void only_the_owner_releases_an_extent(void)
{
    struct fm_pool_ledger l, other;
    void *base = make(&l);
    uint32_t e = fm_extent_take(&l, 0);
    fm_pool_ledger_view(&other, base, 5);
    fm_extent_release(&other, e);
    CHECK(l.extent_refs[e] == 1 && l.extent_owner[e] == 1);
    done(base);
}

static void a_child_shares_slots_and_dies(void)
{
    struct fm_pool_ledger l, child;
    void *base = make(&l);
    uint32_t e = fm_extent_take(&l, 0), slot = e * FM_EXTENT_SLOTS + 65;
    CHECK(fm_slot_take(&l, slot) && fm_slot_take(&l, slot + 1));
    fm_pool_ledger_fork(&l, 3);
    fm_pool_ledger_view(&child, base, 3);
    CHECK(fm_slot_shared(&l, slot) && fm_slot_shared(&child, slot + 1));
    fm_slot_release(&l, slot);
    CHECK(!fm_slot_shared(&child, slot) && fm_pool_ledger_used(base) == 2);
    CHECK(!fm_slot_take(&l, slot));           /* the child's bytes are in it */
    fm_slot_release(&child, slot);
    CHECK(fm_pool_ledger_used(base) == 1);
    uint32_t taken = fm_extent_take(&child, FM_EXTENT_NONE);
    CHECK(fm_slot_take(&child, taken * FM_EXTENT_SLOTS));
    fm_pool_ledger_reap(base, 3, 0);       /* as if it had been killed */
    CHECK(!fm_slot_shared(&l, slot + 1) && l.slot_refs[slot + 1] == 1);
    CHECK(l.extent_refs[taken] == 0 && l.extent_owner[taken] == 0);
    CHECK(fm_pool_ledger_used(base) == 1);
    fm_pool_ledger_reap(base, 3, 0);       /* twice does no harm */
    CHECK(fm_pool_ledger_used(base) == 1 && l.extent_refs[e] == 2);
    done(base);
}

static void the_parent_dies_first(void)
{
    struct fm_pool_ledger l, child;
    void *base = make(&l);
    uint32_t e = fm_extent_take(&l, 0), slot = e * FM_EXTENT_SLOTS;
    CHECK(fm_slot_take(&l, slot));
    fm_pool_ledger_fork(&l, 9);
    fm_pool_ledger_reap(base, 0, 0);
    fm_pool_ledger_view(&child, base, 9);
    CHECK(child.slot_refs[slot] == 1 && child.extent_refs[e] == 1 && child.extent_owner[e] == 0);
    CHECK(fm_extent_take(&child, e) != e);
    fm_slot_release(&child, slot);
    CHECK(fm_pool_ledger_used(base) == 0 && child.extent_refs[e] == 0);
    done(base);
}

int main(void)
{
    sizes_are_checked();
    extents_are_taken_near_the_hint();
    a_slot_keeps_its_extent();
    only_the_owner_releases_an_extent();
    a_child_shares_slots_and_dies();
    the_parent_dies_first();
    return 0;
}
