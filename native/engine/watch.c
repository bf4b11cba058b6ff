/* watch.c - the watcher: the engine's first thread, and while memory is not short its only one.
 *
 * It looks at the process's anonymous memory now and then (the nearer the budget, the oftener), adopts when the
 * budget nears, and from then on turns the budget (budget.c) into the core's limit and takes in new mappings.
 */
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>

#include "engine/engine.h"
#include "fm_assert.h"

#define MIB (1ull << 20)
#define FILL_BYTES_PER_NS 16ull         /* how fast a program may grow (huge pages: 7 were seen): decides when to look again */
#define PREPARE_PART 16u                /* of its share of the budget: from there on adoption is prepared */
#define LOOK_MIN_NS 300000ull
#define LOOK_MAX_NS 10000000ull
/* After a discard's event has been read the kernel still has to carry it out.  Nothing tells when it has, except for
 * pages that are found missing; this long is taken to be enough for the others (those freed by MADV_FREE). */
#define ZAPS_NS 1000000000ull

struct watch {
    int64_t unmanaged_seen;              /* pages, at the last scan */
    uint64_t scan_ns;
    uint64_t zaps_ns;
    bool prepared;
};

static struct watch watch;

static void recount_discards(void)
{
    struct fm_range mine[64];
    uint32_t n;
    if (__atomic_load_n(&fm.discards_n, __ATOMIC_ACQUIRE) == 0)
        return;
    fm_lock_take(&fm.discards_lock);
    n = fm.discards_n;
    __builtin_memcpy(mine, fm.discards, n * sizeof mine[0]);
    fm.discards_n = 0;
    fm_lock_drop(&fm.discards_lock);
    fm_lock_take(&fm.fork_lock);         /* a fork copies our books: nothing may change in them meanwhile */
    for (uint32_t k = 0; k < n; k++)
        fm_core_recount(&fm.core, mine[k].page, mine[k].end - mine[k].page);
    fm_lock_drop(&fm.fork_lock);
}

static void publish(const struct fm_usage *u)
{
    uint64_t local = (uint64_t)u->local_pages * FM_PAGE_BYTES;
    fm.proc->local_bytes = local;
    uint64_t remote = fm.state == FM_ENGINE_ADOPTED ? (uint64_t)fm.core.remote_pages * FM_PAGE_BYTES : 0;
    fm.proc->remote_bytes = remote;
    fm.proc->need_bytes = (uint64_t)u->worst_pages * FM_PAGE_BYTES + remote;
    if (local > fm.proc->counters.peak_local_bytes)
        fm.proc->counters.peak_local_bytes = local;
}

/* Managed: what the budget leaves to managed pages and frames, and what has appeared meanwhile. */
static uint64_t look_managed(const struct fm_usage *u, uint64_t share)
{
    struct fm_core *c = &fm.core;
    int64_t unmanaged = u->anonymous_pages - __atomic_load_n(&c->local_pages, __ATOMIC_RELAXED);
    /* The core counts every page that is here in full, so what others count as well comes on top. */
    int64_t elsewhere = u->anonymous_pages - u->worst_pages;
    int64_t limit = (int64_t)(share / FM_PAGE_BYTES) + elsewhere - (unmanaged > 0 ? unmanaged : 0);
    int64_t least = 2 * (int64_t)FM_FRAMES;
    uint64_t now = fm_now_ns();
    recount_discards();
    if (now - watch.zaps_ns > ZAPS_NS) {
        fm_core_zaps_done(&fm.core);
        watch.zaps_ns = now;
    }
    __atomic_store_n(&c->limit_pages, limit > least ? limit : least, __ATOMIC_RELAXED);
    int64_t room = limit - __atomic_load_n(&c->local_pages, __ATOMIC_RELAXED);
    if (room < (int64_t)FM_FRAMES)
        fm_evictor_ring();
    fm_tell_when_over(-room, unmanaged);
    bool grown = unmanaged - watch.unmanaged_seen > (int64_t)(MIB / FM_PAGE_BYTES);
    if (room < 8 * (int64_t)FM_FRAMES && ((grown && now - watch.scan_ns > 2000000) || now - watch.scan_ns > 200000000)) {
        fm_lock_take(&fm.fork_lock);
        bool seen_all = fm_adopt_scan();
        fm_lock_drop(&fm.fork_lock);
        if (!seen_all)
            return LOOK_MIN_NS;          /* the program was changing its mappings: once more, before it fills them */
        watch.unmanaged_seen = fm_usage().anonymous_pages - __atomic_load_n(&c->local_pages, __ATOMIC_RELAXED);
        watch.scan_ns = fm_now_ns();
    }
    return room < 4 * (int64_t)FM_FRAMES ? 1000000 : 5000000;
}

static void adopt_now(uint64_t share)
{
    fm_lock_take(&fm.fork_lock);
    __atomic_store_n(&fm.core.limit_pages, (int64_t)(share / FM_PAGE_BYTES), __ATOMIC_RELAXED);
    if (!fm_adopt())
        fm.gave_up = true;
    watch.scan_ns = fm_now_ns();
    fm_lock_drop(&fm.fork_lock);
}

bool fm_watch_adopt(void)
{
    if (fm.state != FM_ENGINE_ADOPTED && !fm.gave_up)
        adopt_now(fm_budget_share(fm.proc->need_bytes));
    return fm.state == FM_ENGINE_ADOPTED;
}

/* How long to wait before the next look. */
uint64_t fm_watch_look(void)
{
    struct fm_usage u = fm_usage();
    publish(&u);
    uint64_t mine = fm.proc->need_bytes, share = fm_budget_share(mine);
    if (fm.state == FM_ENGINE_ADOPTED)
        return look_managed(&u, share);
    uint64_t head_room = share / 8 < 64 * MIB ? share / 8 : 64 * MIB;
    if (mine + head_room >= share && !fm.gave_up) {
        adopt_now(share);
        return LOOK_MIN_NS;
    }
    uint64_t next = share - head_room;
    if (mine < share / PREPARE_PART) {
        next = share / PREPARE_PART;
    } else if (!watch.prepared) {
        watch.prepared = true;           /* once: whether it can't be done is adoption's to say */
        fm_prepare();
    }
    uint64_t wait = mine < next ? (next - mine) / FILL_BYTES_PER_NS : LOOK_MAX_NS;
    return wait < LOOK_MIN_NS ? LOOK_MIN_NS : wait > LOOK_MAX_NS ? LOOK_MAX_NS : wait;
}

void fm_watch_loop(void)
{
    for (;;) {
        uint64_t wait = fm_watch_look();
        if (!fm.keeper && fm.state == FM_ENGINE_ADOPTED && !fm_wire_alive()) {
            fm_say(FM_LEVEL_WARNING, "the supervisor has gone: going on without it.", 0);
            fm_keeper_start();
        }
        fm_region_watch(wait);
    }
}

/* A descriptor table of our own, empty at first: the program can close nothing of ours, and we hold nothing of its. */
bool fm_descriptors_open(void)
{
    if ((fm.early_defects & (FM_DEFECT_SHARE_DESCRIPTORS | FM_DEFECT_LOG_TO_STDERR)) == 0 &&
        fm_sys(SYS_close_range, 0, ~0u, 2 /* CLOSE_RANGE_UNSHARE */) != 0)
        return false;
    fm.statm = (int)fm_sys(SYS_openat, AT_FDCWD, "/proc/self/statm", O_RDONLY | O_CLOEXEC);
    fm.maps = (int)fm_sys(SYS_openat, AT_FDCWD, "/proc/self/maps", O_RDONLY | O_CLOEXEC);
    fm.pagemap = (int)fm_sys(SYS_openat, AT_FDCWD, "/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    fm.mem = (int)fm_sys(SYS_openat, AT_FDCWD, "/proc/self/mem", O_RDWR | O_CLOEXEC);
    fm.rollup = (int)fm_sys(SYS_openat, AT_FDCWD, "/proc/self/smaps_rollup", O_RDONLY | O_CLOEXEC);
    fm.tasks = (int)fm_sys(SYS_openat, AT_FDCWD, "/proc/self/task", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    return fm.statm >= 0 && fm.maps >= 0 && fm.pagemap >= 0 && fm.mem >= 0 && fm.tasks >= 0;
}

void fm_watch_main(void *arg)
{
    (void)arg;
    fm.pid = (uint32_t)fm_sys(SYS_getpid);
    __builtin_memset(&watch, 0, sizeof watch);
    fm.prepared = false;                 /* a parent's: it is no descriptor of this table */
    fm_usage_reset();
    if (!fm_descriptors_open() || !fm_wire_join(FM_SLOT_ANY)) {
        __atomic_store_n(&fm.state, FM_ENGINE_NONE, __ATOMIC_RELEASE);
        return;
    }
    fm_region_joined();
    fm_watch_loop();
}
