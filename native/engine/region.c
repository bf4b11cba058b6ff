/* region.c - regions: memory that a program asks us to manage, by the table of functions in region.h.
 *
 * The program's threads post a call and sleep; they hold no lock of ours and touch no descriptor of ours.  The watcher
 * serves what changes which memory is managed and how much of it may be here, the evictor everything about pages, a step
 * at a time between its own.  A call that takes long is answered with MORE, so that its caller can look at its signals.
 * In a process that `farmem run` did not start nothing but regions is managed (fm.regions_only).
 */
#include "region.h"

#include <stddef.h>

#include "engine/engine.h"
#include "engine/uffd_api.h"
#include "fm_assert.h"

#define CALLS_MAX 64u
#define SLICE_NS 100000000ull
#define STEP_PAGES 1024u                 /* looked at before the evictor does something else */
#define STEP_BYTES (64ull << 21)
#define AHEAD_PAGES 256u                 /* fetches that are begun before the first has come */
#define EVICT_PAGES 64u
#define STAYED_TRIES 3u
#define CPUS_MAX 4096u
#define CHANGING_NS 20000
#define ADD_TRIES 100000
#define IDLE_NS 1000000000ull

enum call_state {
    CALL_FREE = 0,
    CALL_TAKEN,
    CALL_POSTED,
    CALL_LOOKING,                        /* the watcher's: answered when it has looked once more */
    CALL_ANSWERED
};

static struct call {
    uint32_t state;                      /* enum call_state */
    bool begun;
    uint64_t begun_ns;
    uint64_t ahead;                      /* page: what has been begun, or is settled, up to here */
    struct fm_region_call what;
} calls[CALLS_MAX];

static uint32_t posted, watch_bell, joined;
static bool starved;

_Static_assert(FM_REGION_HEAD_ROOM_BYTES == 2 * FM_FRAMES * FM_PAGE_BYTES, "twice the staging area");
_Static_assert((int)FM_REGION_NORMAL == (int)FM_ADVICE_NORMAL && (int)FM_REGION_SEQUENTIAL == (int)FM_ADVICE_SEQUENTIAL &&
                   (int)FM_REGION_RANDOM == (int)FM_ADVICE_RANDOM,
               "advice has the same numbers for Python and for the core");

static uint64_t page_of(uint64_t address) { return address / FM_PAGE_BYTES; }
static uint64_t first_page(const struct call *k) { return page_of(k->what.start); }
static uint64_t end_page(const struct call *k) { return page_of(k->what.start + k->what.bytes); }
static bool adopted(void) { return __atomic_load_n(&fm.state, __ATOMIC_SEQ_CST) == FM_ENGINE_ADOPTED; }

static void answer(struct call *k, enum fm_region_answer a)
{
    struct fm_core *c = &fm.core;
    k->what.answer = a;
    k->what.local_bytes = (uint64_t)__atomic_load_n(&c->local_pages, __ATOMIC_RELAXED) * FM_PAGE_BYTES;
    k->what.limit_bytes = (uint64_t)__atomic_load_n(&c->limit_pages, __ATOMIC_RELAXED) * FM_PAGE_BYTES;
    k->what.remote_bytes = (uint64_t)__atomic_load_n(&c->remote_pages, __ATOMIC_RELAXED) * FM_PAGE_BYTES;
    k->what.pinned_bytes = (uint64_t)__atomic_load_n(&c->pinned_pages, __ATOMIC_RELAXED) * FM_PAGE_BYTES;
    __atomic_sub_fetch(&posted, 1, __ATOMIC_SEQ_CST);
    __atomic_store_n(&k->state, CALL_ANSWERED, __ATOMIC_SEQ_CST);
    fm_futex_wake(&k->state, 1);
}

/* ---- the evictor's part ------------------------------------------------------------------------------- */

static bool is_managed(uint64_t page, uint64_t end)
{
    struct fm_range piece;
    fm_world_share(&fm.world);
    bool all = fm_ranges_next(&fm.core.managed, page, end, &piece) && piece.page == page && piece.end == end;
    fm_world_unshare(&fm.world);
    return all;
}

/* Is there room for all of it at once, beside what is pinned elsewhere and what the engine needs to work in? */
static bool has_room(const struct call *k, const struct fm_tally *t)
{
    int64_t limit = __atomic_load_n(&fm.core.limit_pages, __ATOMIC_RELAXED), pinned = fm.core.pinned_pages;
    int64_t more = (int64_t)(end_page(k) - first_page(k)) - (int64_t)t->pinned;
    return pinned + more + (int64_t)(FM_REGION_HEAD_ROOM_BYTES / FM_PAGE_BYTES) <= limit;
}

/* Bringing: what must be settled before the first page.  False: it has been answered. */
static bool may_bring(struct call *k)
{
    struct fm_tally t = { .first_lost = FM_PAGE_NONE };
    uint64_t page = first_page(k), n = end_page(k) - page;
    if (k->what.mark != 0)
        return true;
    k->what.mark = 1;
    bool fits = n <= (uint64_t)__atomic_load_n(&fm.core.limit_pages, __ATOMIC_RELAXED);
    if (fits)
        fm_core_tally(&fm.core, page, n, &t);
    if (!fits || !has_room(k, &t)) {
        answer(k, FM_REGION_NO_ROOM);
        return false;
    }
    if (t.first_lost != FM_PAGE_NONE) {
        k->what.at = t.first_lost * FM_PAGE_BYTES;
        answer(k, FM_REGION_LOST);
        return false;
    }
    if (k->what.kind == FM_REGION_PIN && !fm_core_pin(&fm.core, page, n)) {
        fm_core_unpin(&fm.core, page, n);
        answer(k, FM_REGION_NO_MEMORY);
        return false;
    }
    return true;
}

/* Begin to fetch what lies behind the page that is waited for. */
static bool begin_ahead(struct call *k, uint64_t at, uint64_t end)
{
    uint64_t before, to = end - at < AHEAD_PAGES ? end : at + AHEAD_PAGES;
    k->ahead = k->ahead > at ? k->ahead : at + 1;
    before = k->ahead;
    for (; k->ahead < to; k->ahead++) {
        enum fm_fault_result r = fm_core_bring(&fm.core, k->ahead, (uint32_t)(to - k->ahead));
        if (r == FM_FAULT_RETRY || r == FM_FAULT_NO_FRAME)
            break;
    }
    return k->ahead > before;
}

static bool bring(struct call *k)
{
    uint64_t at = page_of(k->what.at), end = end_page(k), before = at;
    enum fm_fault_result r = FM_FAULT_HERE;
    if (!may_bring(k))
        return true;
    for (uint32_t n = 0; n < STEP_PAGES && at < end; n++, at++) {
        uint64_t left = end - at;
        r = fm_core_bring(&fm.core, at, left < FM_WINDOW_MAX ? (uint32_t)left : FM_WINDOW_MAX);
        if (r != FM_FAULT_HERE)
            break;
    }
    k->what.at = at * FM_PAGE_BYTES;
    if (at == end || r == FM_FAULT_LOST) {
        if (r == FM_FAULT_LOST && k->what.kind == FM_REGION_PIN)
            fm_core_unpin(&fm.core, first_page(k), end - first_page(k));
        answer(k, at == end ? FM_REGION_DONE : FM_REGION_LOST);
        return true;
    }
    switch (r) {
    case FM_FAULT_RETRY:
        fm_sleep_ns(CHANGING_NS);
        return true;
    case FM_FAULT_NO_FRAME:
        starved = true;
        return at > before;
    case FM_FAULT_WAIT:
        return begin_ahead(k, at, end) || at > before;
    default:
        return true;
    }
}

/* The kernel does not take a page that a processor has just put aside to be sorted in with others later (a page that was
 * fetched a moment ago): MADV_PAGEOUT does that first, for the processor that it runs on.  So run it on each. */
static void sort_in(uint64_t address)
{
    uint64_t mine[CPUS_MAX / 64] = { 0 }, one[CPUS_MAX / 64] = { 0 };
    if (fm_sys(SYS_sched_getaffinity, 0, sizeof mine, mine) <= 0)
        return;
    for (uint32_t cpu = 0; cpu < CPUS_MAX; cpu++) {
        if ((mine[cpu / 64] >> (cpu % 64) & 1) == 0)
            continue;
        one[cpu / 64] = 1ull << (cpu % 64);
        if (fm_sys(SYS_sched_setaffinity, 0, sizeof one, one) == 0)
            fm_sys(SYS_madvise, address, FM_PAGE_BYTES, FM_MADV_PAGEOUT);
        one[cpu / 64] = 0;
    }
    fm_sys(SYS_sched_setaffinity, 0, sizeof mine, mine);
}

/* What was to leave and would not is tried again (value counts: it is not used by this call).  False: none, or often
 * enough. */
static bool again(struct call *k)
{
    if (k->what.value >= STAYED_TRIES || !fm_core_stayed(&fm.core, first_page(k), end_page(k) - first_page(k)))
        return false;
    k->what.value++;
    k->what.at = k->what.start;
    k->ahead = 0;
    sort_in(k->what.start);
    return true;
}

static bool send_away(struct call *k)
{
    uint64_t at = page_of(k->what.at), end = end_page(k);
    const uint64_t *errors = &fm.proc->counters.store_errors;
    uint32_t done = 0, want = end - at < EVICT_PAGES ? (uint32_t)(end - at) : EVICT_PAGES;
    k->what.mark = k->what.mark != 0 ? k->what.mark : __atomic_load_n(errors, __ATOMIC_RELAXED) + 1;
    if (at == end) {
        /* What was moved out is on its way to the pool; what has come there gives back its frame. */
        k->ahead = k->ahead != 0 ? k->ahead : first_page(k);
        while (k->ahead < end && fm_core_leave_staging(&fm.core, k->ahead, 1))
            k->ahead++;
        if (k->ahead == end && again(k))
            return true;
        if (k->ahead == end)
            answer(k, __atomic_load_n(errors, __ATOMIC_RELAXED) >= k->what.mark ? FM_REGION_STORE_FAILED : FM_REGION_DONE);
        return k->ahead == end;
    }
    enum fm_evict_result r = fm_core_evict_range(&fm.core, at, want, &done);
    k->what.at = (at + done) * FM_PAGE_BYTES;
    if (r == FM_EVICT_RETRY)
        fm_sleep_ns(CHANGING_NS);
    if (r == FM_EVICT_FULL)
        answer(k, FM_REGION_FULL);
    return r != FM_EVICT_NOTHING || fm_core_shrink(&fm.core, EVICT_PAGES) > 0;
}

/* Those that only look at the books, or change them: a part at a time. */
static bool look_through(struct call *k)
{
    struct fm_tally t = { .first_lost = FM_PAGE_NONE };
    uint64_t left = k->what.start + k->what.bytes - k->what.at, bytes = left < STEP_BYTES ? left : STEP_BYTES;
    uint64_t page = page_of(k->what.at), n = page_of(bytes);
    if (k->what.kind == FM_REGION_UNPIN) {
        fm_core_unpin(&fm.core, page, n);
    } else {
        fm_core_tally(&fm.core, page, n, &t);
        k->what.resident += t.resident;
        k->what.moving += t.moving;
        k->what.remote += t.remote;
        k->what.fresh += t.fresh;
        k->what.lost += t.lost;
        k->what.pinned += t.pinned;
        if (k->what.first_lost == 0 && t.first_lost != FM_PAGE_NONE)
            k->what.first_lost = t.first_lost * FM_PAGE_BYTES;
    }
    k->what.at += bytes;
    if (bytes == left)
        answer(k, FM_REGION_DONE);
    return true;
}

static bool serve_one(struct call *k)
{
    if (!is_managed(first_page(k), end_page(k))) {
        answer(k, FM_REGION_NOT_MANAGED);
        return true;
    }
    switch ((enum fm_region_kind)k->what.kind) {
    case FM_REGION_WILLNEED:
    case FM_REGION_PIN:
        return bring(k);
    case FM_REGION_EVICT:
        return send_away(k);
    case FM_REGION_ADVISE:
        fm_stream_advise(&fm.core, first_page(k), end_page(k), (enum fm_advice)k->what.value);
        answer(k, FM_REGION_DONE);
        return true;
    default:
        return look_through(k);
    }
}

static bool is_the_watchers(uint32_t kind)
{
    return kind == FM_REGION_ADD || kind == FM_REGION_BUDGET || kind == FM_REGION_LOOK;
}

bool fm_region_serve(void)
{
    bool did = false;
    starved = false;
    if (!fm_region_called())
        return false;
    for (struct call *k = calls; k < calls + CALLS_MAX; k++) {
        if (__atomic_load_n(&k->state, __ATOMIC_ACQUIRE) != CALL_POSTED || is_the_watchers(k->what.kind))
            continue;
        if (!k->begun) {
            k->begun = true;
            k->begun_ns = fm_now_ns();
            k->what.at = k->what.at != 0 ? k->what.at : k->what.start;
        }
        did = serve_one(k) || did;
        if (__atomic_load_n(&k->state, __ATOMIC_ACQUIRE) == CALL_POSTED && fm_now_ns() - k->begun_ns > SLICE_NS)
            answer(k, FM_REGION_MORE);
    }
    return did;
}

bool fm_region_called(void) { return __atomic_load_n(&posted, __ATOMIC_SEQ_CST) > 0; }

bool fm_region_starved(void) { return starved; }

/* ---- the watcher's part --------------------------------------------------------------------------------- */

static enum fm_region_answer add(uint64_t start, uint64_t end)
{
    enum fm_res r = FM_AGAIN;
    if (!fm_watch_adopt())
        return FM_REGION_NO_ENGINE;
    fm_lock_take(&fm.fork_lock);
    for (int k = 0; k < ADD_TRIES && (r = fm_adopt_range(start, end)) == FM_AGAIN; k++)
        fm_sleep_ns(CHANGING_NS);
    fm_lock_drop(&fm.fork_lock);
    return r == FM_OK ? FM_REGION_DONE : FM_REGION_NOT_MANAGED;
}

/* True: the watcher is to look again before it sleeps. */
static bool serve_watch(void)
{
    bool again = false;
    for (struct call *k = calls; k < calls + CALLS_MAX; k++) {
        if (__atomic_load_n(&k->state, __ATOMIC_ACQUIRE) != CALL_POSTED || !is_the_watchers(k->what.kind))
            continue;
        if (k->what.kind != FM_REGION_BUDGET) {
            bool look = k->what.kind == FM_REGION_LOOK;
            answer(k, look ? FM_REGION_DONE : add(k->what.start, k->what.start + k->what.bytes));
            continue;
        }
        __atomic_store_n(&fm.control->budget_bytes, k->what.value, __ATOMIC_RELEASE);
        __atomic_store_n(&k->state, CALL_LOOKING, __ATOMIC_RELEASE);
        again = true;
    }
    return again;
}

static void has_looked(void)
{
    for (struct call *k = calls; k < calls + CALLS_MAX; k++)
        if (__atomic_load_n(&k->state, __ATOMIC_ACQUIRE) == CALL_LOOKING)
            answer(k, FM_REGION_DONE);
}

void fm_region_watch(uint64_t wait_ns)
{
    uint32_t seen = __atomic_load_n(&watch_bell, __ATOMIC_SEQ_CST);
    if (fm_region_called()) {
        has_looked();
        if (serve_watch())
            return;
    }
    fm_futex_wait(&watch_bell, seen, (int64_t)(fm.regions_only && !adopted() ? IDLE_NS : wait_ns));
}

void fm_region_joined(void)
{
    __atomic_store_n(&joined, 1, __ATOMIC_SEQ_CST);
    fm_futex_wake(&joined, 1 << 30);
}

/* In the child of a fork: who called is not here. */
void fm_region_forked(bool managed)
{
    __builtin_memset(calls, 0, sizeof calls);
    posted = 0;
    joined = managed;
}

/* ---- the program's threads ------------------------------------------------------------------------------ */

/* False: there is no engine, or none any more. */
static bool is_joined(void)
{
    while (__atomic_load_n(&fm.state, __ATOMIC_SEQ_CST) != FM_ENGINE_NONE) {
        if (__atomic_load_n(&joined, __ATOMIC_SEQ_CST) != 0)
            return true;
        fm_futex_wait(&joined, 0, 1000000);
    }
    return false;
}

static uint32_t api_start(const char *job, const char *defects)
{
    if (job != NULL && fm.state == FM_ENGINE_NONE) {
        fm.regions_only = true;
        fm_join(job, defects);
    }
    if (!is_joined())
        return FM_REGION_MODE_NONE;
    return fm.regions_only ? FM_REGION_MODE_REGIONS : FM_REGION_MODE_PROGRAM;
}

static struct fm_control *api_control(void) { return is_joined() ? fm.control : NULL; }

static uint32_t api_slot(void) { return is_joined() ? fm.slot : FM_SLOT_ANY; }

static struct call *take_call(void)
{
    for (uint32_t k = 0;; k = (k + 1) % CALLS_MAX) {
        uint32_t is_free = CALL_FREE;
        if (__atomic_compare_exchange_n(&calls[k].state, &is_free, CALL_TAKEN, false, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED))
            return &calls[k];
        if (k + 1 == CALLS_MAX)
            fm_sleep_ns(100000);
    }
}

static void api_call(struct fm_region_call *call)
{
    uint32_t now;
    if (!is_joined() || (!is_the_watchers(call->kind) && !adopted())) {
        call->answer = fm.state == FM_ENGINE_NONE ? FM_REGION_NO_ENGINE : FM_REGION_NOT_MANAGED;
        return;
    }
    struct call *k = take_call();
    k->what = *call;
    k->begun = false;
    k->ahead = 0;
    __atomic_add_fetch(&posted, 1, __ATOMIC_SEQ_CST);
    __atomic_store_n(&k->state, CALL_POSTED, __ATOMIC_SEQ_CST);
    if (is_the_watchers(k->what.kind)) {
        __atomic_add_fetch(&watch_bell, 1, __ATOMIC_SEQ_CST);
        fm_futex_wake(&watch_bell, 1);
    } else {
        fm_evictor_ring();
    }
    while ((now = __atomic_load_n(&k->state, __ATOMIC_ACQUIRE)) != CALL_ANSWERED)
        fm_futex_wait(&k->state, now, -1);
    *call = k->what;
    __atomic_store_n(&k->state, CALL_FREE, __ATOMIC_RELEASE);
}

__attribute__((visibility("default"))) const struct fm_region_api fm_region_api = {
    .version = FM_CONTROL_VERSION,
    .start = api_start,
    .control = api_control,
    .slot = api_slot,
    .call = api_call,
};
