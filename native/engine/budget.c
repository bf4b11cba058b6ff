/* budget.c - how much anonymous memory this process has here, and how much of the job's budget is its own.
 *
 * Memory that is shared since a fork counts once in the job.  Only the kernel knows how much that is (Pss_Anon), and
 * asking it costs 8 ms for each GiB, so a process that shares is asked now and then, and in between the worst is assumed:
 * that it goes on ceasing to share as fast as it did.  Called by the watcher alone.
 */
#include <stddef.h>
#include <string.h>

#include "engine/engine.h"

#define MIB (1ull << 20)
#define SHARE_MIN_BYTES (8 * MIB)
#define LEDGER_LOOK_NS 16000000ull
#define LEDGER_LOOK_NEAR_NS 1000000ull
#define NEAR_BYTES (64 * MIB)
#define ROLLUP_PART 10u                 /* asking may take one part in so many of the watcher's time */
#define ROLLUP_MIN_NS 2000000ull
#define UNSHARE_FLOOR_PAGES_PER_MS 16   /* assumed at least: 64 MiB/s */
#define GUARD_PAGES_PER_MS 256          /* 1 GiB/s */
#define SHARED_LEAST_PAGES 16
#define OVER_PAGES 4096                 /* 16 MiB */
#define OVER_TELL_NS 1000000000ull

static struct {
    uint64_t others_bytes;              /* need of the job's other processes */
    uint64_t ledger_ns;                 /* when that was looked at */
    int64_t elsewhere_pages;            /* at the last look: counted by other processes of the job */
    int64_t pages_per_ms;               /* how fast that became less by itself: somebody wrote */
    uint64_t unshared;                  /* our own part of it, at the last look (counters.pages_unshared) */
    uint64_t rollup_ns, rollup_pause_ns;
    uint64_t over_since_ns;
    bool over_told;
} budget;

void fm_usage_reset(void) { __builtin_memset(&budget, 0, sizeof budget); }

static uint64_t number(const char **s)
{
    uint64_t v = 0;
    while (**s == ' ')
        (*s)++;
    for (; **s >= '0' && **s <= '9'; (*s)++)
        v = v * 10 + (uint64_t)(**s - '0');
    return v;
}

/* Anonymous pages that are here: statm's resident less shared. */
static int64_t anonymous_pages(void)
{
    char text[128];
    const char *s = text;
    long n = fm_sys(SYS_pread64, fm.statm, text, sizeof text - 1, 0);
    if (n <= 0)
        return 0;
    text[n] = 0;
    number(&s);
    uint64_t resident = number(&s), shared = number(&s);
    return (int64_t)(resident - shared);
}

/* A line of smaps_rollup, as "Pss_Anon:"; -1: the kernel does not say. */
static int64_t rollup_pages(const char *name)
{
    static char text[2048];
    long n = fm_sys(SYS_pread64, fm.rollup, text, sizeof text - 1, 0);
    text[n > 0 ? n : 0] = 0;
    const char *s = strstr(text, name);
    if (s == NULL)
        return -1;
    s += strlen(name);
    return (int64_t)(number(&s) * 1024 / FM_PAGE_BYTES);
}

/* Pages that we have made private since the last look, to evict them. */
static int64_t unshared_since(void)
{
    return (int64_t)(__atomic_load_n(&fm.proc->counters.pages_unshared, __ATOMIC_RELAXED) - budget.unshared);
}

static void ask_the_kernel(int64_t anonymous, uint64_t now)
{
    int64_t before = budget.elsewhere_pages, elapsed_ms = (int64_t)((now - budget.rollup_ns) / 1000000) + 1;
    int64_t pss = rollup_pages("Pss_Anon:"), own = unshared_since();
    uint64_t took_ns = fm_now_ns() - now;
    budget.elsewhere_pages = pss >= 0 && pss < anonymous ? anonymous - pss : 0;
    budget.unshared += (uint64_t)own;
    int64_t rate = before - own > budget.elsewhere_pages ? (before - own - budget.elsewhere_pages) / elapsed_ms : 0;
    budget.pages_per_ms = 2 * rate + UNSHARE_FLOOR_PAGES_PER_MS;
    budget.rollup_ns = now;
    budget.rollup_pause_ns = took_ns * ROLLUP_PART > ROLLUP_MIN_NS ? took_ns * ROLLUP_PART : ROLLUP_MIN_NS;
    if (budget.elsewhere_pages < SHARED_LEAST_PAGES) {
        budget.elsewhere_pages = 0;
        __atomic_store_n(&fm.shares_memory, 0, __ATOMIC_RELAXED);   /* until the next fork */
    }
}

/* Writes to shared pages are no faults of ours: what could be written before the next look is not counted on, up to half. */
static int64_t guard_pages(int64_t left)
{
    int64_t guard = (int64_t)(budget.rollup_pause_ns / 1000000) * GUARD_PAGES_PER_MS;
    return guard < left / 2 ? guard : left / 2;
}

static int64_t within(int64_t pages, int64_t most) { return pages < 0 ? 0 : pages > most ? most : pages; }

static struct fm_usage shared_usage(int64_t anonymous)
{
    uint64_t now = fm_now_ns();
    if (now - budget.rollup_ns >= budget.rollup_pause_ns)
        ask_the_kernel(anonymous, now);
    int64_t since_ms = (int64_t)((now - budget.rollup_ns) / 1000000);
    int64_t seen = budget.elsewhere_pages - unshared_since(), left = seen - since_ms * budget.pages_per_ms;
    left -= guard_pages(left);
    return (struct fm_usage){ .anonymous_pages = anonymous,
                              .local_pages = anonymous - within(seen, anonymous),
                              .worst_pages = anonymous - within(left, anonymous) };
}

struct fm_usage fm_usage(void)
{
    if (fm.regions_only) {              /* these alone are on the budget */
        int64_t pages = __atomic_load_n(&fm.core.local_pages, __ATOMIC_RELAXED);
        return (struct fm_usage){ .anonymous_pages = pages, .local_pages = pages, .worst_pages = pages };
    }
    int64_t pages = anonymous_pages();
    if (__atomic_load_n(&fm.shares_memory, __ATOMIC_RELAXED) != 0)
        return shared_usage(pages);
    return (struct fm_usage){ .anonymous_pages = pages, .local_pages = pages, .worst_pages = pages };
}

/* Says once, when it has lasted, what keeps the process over its share; again only after it was below.  over: the core's
 * pages beyond its limit; unmanaged: what is none of the core's. */
void fm_tell_when_over(int64_t over, int64_t unmanaged)
{
    uint64_t now = fm_now_ns();
    if (over < OVER_PAGES) {
        budget.over_since_ns = 0;
        budget.over_told = budget.over_told && over > 0;
        return;
    }
    if (budget.over_since_ns == 0)
        budget.over_since_ns = now;
    if (budget.over_told || now - budget.over_since_ns < OVER_TELL_NS)
        return;
    budget.over_told = true;
    int64_t locked = rollup_pages("Locked:");
    const struct fm_part parts[] = {
        { "over the share of the budget by ", (uint64_t)over * FM_PAGE_BYTES / MIB },
        { " MiB that can't leave: ", (uint64_t)(locked > 0 ? locked : 0) * FM_PAGE_BYTES / MIB },
        { " MiB are locked (mlock), ", (uint64_t)(unmanaged > 0 ? unmanaged : 0) * FM_PAGE_BYTES / MIB },
        { " MiB are never managed (stacks, libraries' data, the engine); what else stays is pinned by a device or io_uring", 0 },
    };
    fm_say_parts(FM_LEVEL_WARNING, parts, sizeof parts / sizeof parts[0]);
}

static uint64_t others_need(void)
{
    uint64_t sum = 0;
    uint32_t n = __atomic_load_n(&fm.control->procs_high, __ATOMIC_ACQUIRE);
    for (uint32_t k = 0; k < n && k < FM_PROCS_MAX; k++) {
        struct fm_proc *p = &fm.control->procs[k];
        uint32_t s = __atomic_load_n(&p->state, __ATOMIC_RELAXED);
        if (k != fm.slot && (s == FM_PROC_LIVE || s == FM_PROC_ADOPTED))
            sum += p->need_bytes;
    }
    return sum;
}

uint64_t fm_budget_share(uint64_t mine)
{
    uint64_t all = __atomic_load_n(&fm.control->budget_bytes, __ATOMIC_RELAXED), now = fm_now_ns(), share;
    bool near = mine + budget.others_bytes + NEAR_BYTES > all;
    if (now - budget.ledger_ns > (near ? LEDGER_LOOK_NEAR_NS : LEDGER_LOOK_NS)) {
        budget.others_bytes = others_need();
        budget.ledger_ns = now;
    }
    uint64_t total = mine + budget.others_bytes;
    if (total <= all)
        share = all - budget.others_bytes;
    else
        share = (uint64_t)((double)all * ((double)mine / (double)total));
    return share > SHARE_MIN_BYTES ? share : SHARE_MIN_BYTES;
}
