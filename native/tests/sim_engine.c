/* sim_engine.c - the engine's threads, as simply as they can be: handlers, the reader of events, the evictor, the
 * pool, adoption.  The real ones do the same around the same calls.
 */
#include <errno.h>
#include <stddef.h>

#include "sim.h"

/* ---- the world lock, exclusive */

static bool nobody_inside(void *arg)
{
    (void)arg;
    return S.shared == 0;
}

static bool not_wanted(void *arg)
{
    (void)arg;
    return !S.wanted && !S.exclusive;
}

void world_take(void)
{
    while (S.wanted || S.exclusive)
        sim_wait(not_wanted, NULL);
    S.wanted = true;
    sim_wait(nobody_inside, NULL);
    S.wanted = false;
    S.exclusive = true;
}

void world_release(void) { S.exclusive = false; }

/* ---- events: read and applied in one critical section */

static bool some_event(void *arg)
{
    (void)arg;
    return S.events_n > 0 && !S.gate;
}

static struct event read_event(void)
{
    struct event e = *S.events[0];
    S.events[0]->read = true;
    S.events_n--;
    for (uint32_t k = 0; k < S.events_n; k++)
        S.events[k] = S.events[k + 1];
    return e;
}

static void apply_event(const struct event *e)
{
    sim_trace("apply", e->page, e->n, e->kind);
    if (e->kind == EV_REMAP)
        sim_trace("apply to", e->to, e->n, e->page);
    switch ((enum event_kind)e->kind) {
    case EV_REMOVE:
        fm_core_removed(S.core, e->page, e->n);
        break;
    case EV_UNMAP:
        fm_core_unmapped(S.core, e->page, e->n);
        break;
    case EV_REMAP:
        fm_core_remapped(S.core, e->page, e->to, e->n);
        break;
    }
}

static void reader(uint32_t id)
{
    (void)id;
    for (;;) {
        sim_wait(some_event, NULL);
        core_in();
        world_take();
        while (S.events_n > 0) {
            struct event e = read_event();
            if (sim_defect(LATE_EVENT)) {
                world_release();
                sim_yield();
                sim_yield();
                world_take();
            }
            sim_point();
            apply_event(&e);
            if (sim_chance(2))
                break;
        }
        world_release();
        core_out();
    }
}

/* ---- faults */

static bool ripe(const struct fault *f)
{
    return f->state == FAULT_UNREAD || (f->state == FAULT_RETRY_LATER && S.events_n == 0) ||
           (f->state == FAULT_FRAME_LATER && (f->seq != S.freed_seq || S.core->overdraft > 0));
}

static bool some_fault(void *arg)
{
    (void)arg;
    if (S.faults_n == 0 || S.gate)
        return false;
    for (uint32_t f = 0; f < FAULTS_MAX; f++)
        if (ripe(&S.fault[f]))
            return true;
    return false;
}

static struct fault take_fault(void)
{
    uint32_t from = (uint32_t)sim_rnd(FAULTS_MAX);
    for (uint32_t k = 0; k < FAULTS_MAX; k++) {
        struct fault *f = &S.fault[(from + k) % FAULTS_MAX];
        if (!ripe(f))
            continue;
        struct fault got = *f;
        f->state = FAULT_NONE;
        S.faults_n--;
        return got;
    }
    sim_violation("no fault to take");
}

static void put_fault(struct fault f, enum fault_state state)
{
    uint32_t k = 0;
    while (k < FAULTS_MAX && S.fault[k].state != FAULT_NONE)
        k++;
    sim_expect(k < FAULTS_MAX, "too many faults at once");
    f.state = (uint8_t)state;
    S.fault[k] = f;
    S.faults_n++;
}

static void handler(uint32_t id)
{
    (void)id;
    for (;;) {
        sim_wait(some_fault, NULL);
        struct fault f = take_fault();
        f.seq = S.freed_seq;
        core_in();
        sim_point();
        enum fm_fault_result r = fm_core_fault(S.core, f.page, f.bits);
        if (r == FM_FAULT_RETRY)
            put_fault(f, FAULT_RETRY_LATER);
        if (r == FM_FAULT_NO_FRAME)
            put_fault(f, FAULT_FRAME_LATER);
        core_out();
    }
}

/* ---- the evictor */

static bool thawed(void *arg)
{
    (void)arg;
    return !S.freeze && !S.gate;
}

/* What a program asks for its own pages.  Few pins, or no budget would be large enough. */
static void asked(void)
{
    struct fm_core *c = S.core;
    struct fm_tally t = { .first_lost = FM_PAGE_NONE };
    uint64_t page = program_page(), n = 1 + sim_rnd(60);
    uint32_t done;
    struct fm_range piece;
    if (!fm_ranges_next(&c->managed, page, page + n, &piece))
        return;
    page = piece.page;
    n = piece.end - piece.page;
    switch (sim_rnd(7)) {
    case 0:
        fm_core_tally(c, page, n, &t);
        sim_expect(t.resident + t.moving + t.remote + t.fresh + t.lost == n, "a page was counted twice, or not at all");
        break;
    case 1:
        if (c->pinned_pages < PINNED_MAX)
            fm_core_pin(c, page, n < PINNED_MAX - (uint64_t)c->pinned_pages ? n : PINNED_MAX - (uint64_t)c->pinned_pages);
        break;
    case 2:
        fm_core_unpin(c, page, n);
        break;
    case 3:
        fm_core_evict_range(c, page, (uint32_t)n, &done);
        sim_expect(done <= n, "more was evicted than was asked for");
        break;
    case 4:
        fm_core_leave_staging(c, page, n);
        break;
    case 5:
        fm_stream_advise(c, page, page + n, (enum fm_advice)sim_rnd(FM_ADVICES));
        break;
    default:
        for (uint32_t k = 0; k < n && !S.freeze; k++)
            fm_core_bring(c, page + k, (uint32_t)(n - k));
        break;
    }
}

static void evict_step(void)
{
    struct fm_core *c = S.core;
    bool short_of = c->local_pages + 4 > c->limit_pages;
    uint64_t what = sim_rnd(8);
    if (what < 4 && (short_of || sim_chance(6))) {
        if (fm_core_evict(c, 1 + (uint32_t)sim_rnd(40)) == FM_EVICT_FULL)
            c->limit_pages = S.stop ? 1 << 20 : c->limit_pages;    /* nothing else helps: the budget gives way */
    } else if (what == 4) {
        fm_core_reclaim(c, 1 + (uint32_t)sim_rnd(8));
    } else if (what == 5 && (short_of || c->kind_n[FM_FRAME_EMPTY] == 0 || c->kind_n[FM_FRAME_DEAD] > 0)) {
        fm_core_shrink(c, 1 + (uint32_t)sim_rnd(8));
    } else if (what == 6) {
        fm_core_evict(c, 0);
    } else if (what == 7 && sim_chance(4)) {
        fm_core_recount(c, program_page(), 1 + sim_rnd(700));
    } else if (what == 7 && !S.stop) {
        asked();
    }
    S.freed_seq++;
}

static void evictor(uint32_t id)
{
    (void)id;
    for (;;) {
        if (S.freeze) {
            S.evictor_idle = true;
            sim_wait(thawed, NULL);
            S.evictor_idle = false;
        }
        core_in();
        if (!S.freeze)
            evict_step();
        sim_free_ends();
        core_out();
        sim_yield();
    }
}

/* ---- the pool: transfers end in any order, some badly */

static bool some_io(void *arg)
{
    (void)arg;
    return S.io_n > 0 && !S.gate;
}

static void store_page(uint32_t slot, uint32_t frame)
{
    sim_expect(S.frame[frame] != PHYS_NONE, "a frame without memory is stored");
    if (!sim_defect(LOSE_STORE) || !sim_chance(50))
        S.family->slot[slot] = phys_version(S.frame[frame]);
}

static void fetch_page(uint32_t slot, uint32_t frame, bool failed)
{
    uint64_t v = S.family->slot[slot];
    sim_expect(S.frame[frame] != PHYS_NONE, "a page is fetched into a frame without memory");
    bool spoil = failed || (S.faults_on && sim_rnd(1000000) < S.bad_ppm);
    bad_note(v, !spoil);
    phys_engine_writes(S.frame[frame], spoil ? v ^ (1ull << 40) : v);
}

static void transfer(const struct fm_io *io, bool failed)
{
    for (uint32_t k = 0; k < io->n; k++) {
        uint32_t at = sim_defect(WRONG_SLOT) && k > 0 && k + 1 == io->n ? k - 1 : k;
        sim_point();
        if (io->kind == FM_IO_FETCH)
            fetch_page(io->slot + at, io->frame + k, failed);
        else if (!failed || sim_chance(2))
            store_page(io->slot + k, io->frame + k);
    }
}

static void pool(uint32_t id)
{
    (void)id;
    for (;;) {
        sim_wait(some_io, NULL);
        uint32_t k = (uint32_t)sim_rnd(S.io_n);
        struct fm_io *io = S.io[k];
        S.io[k] = S.io[--S.io_n];
        S.completing++;
        core_in();
        bool failed = S.faults_on && sim_rnd(1000000) < S.bad_ppm * (io->kind == FM_IO_FETCH ? 1 : 20);
        io->status = failed ? EIO : 0;
        if (sim_defect(EARLY_ACK) && io->kind == FM_IO_STORE && !failed) {
            struct fm_io was = *io;
            fm_core_io_done(S.core, io);
            sim_yield();
            for (uint32_t f = 0; f < was.n; f++)
                if (S.frame[was.frame + f] != PHYS_NONE)
                    store_page(was.slot + f, was.frame + f);
        } else {
            transfer(io, failed);
            sim_point();
            fm_core_io_done(S.core, io);
        }
        core_out();
        S.completing--;
    }
}

/* ---- adoption: register, look what is there, tell the core */

static uint32_t register_run(uint64_t page)
{
    struct fm_range stale;
    uint32_t n = 0;
    while (in_space(page + n) && same_vma(page, page + n) && !pte_of(page + n)->registered && pte_of(page + n)->busy == 0)
        n++;
    if (n == 0 || fm_ranges_next(&S.core->managed, page, page + n, &stale))
        return 0;                  /* an event is still to come that ends the old use of the range */
    for (uint32_t k = 0; k < n; k++)
        pte_of(page + k)->registered = true;
    fm_core_managed(S.core, page, n);
    return n;
}

static void adopt(void)
{
    uint64_t page = program_page(), first, there[FM_BLOCK_PAGES];
    if (pte_of(page)->map == 0 || pte_of(page)->registered)
        return;
    while (in_space(page - 1) && same_vma(page - 1, page))
        page--;
    world_take();
    uint32_t n = register_run(page);
    world_release();
    for (first = page; n > 0;) {
        uint32_t k = n < 64 ? n : 64;
        sim_ops.present(NULL, first, k, there);
        sim_yield();
        for (uint32_t i = 0; i < k; i++)
            if ((there[0] >> i & 1) != 0)
                fm_core_found(S.core, first + i, 1);
        first += k;
        n -= k;
    }
    if (sim_chance(40))
        fm_core_keep(S.core, page, 2);
}

/* What a mapping has grown by is registered already: here only the books learn of it. */
static void adopt_grown(void)
{
    uint64_t page = program_page(), end = page;
    struct fm_range known;
    world_take();
    while (S.changing == 0 && in_space(end) && same_vma(page, end) && pte_of(end)->registered &&
           !fm_ranges_next(&S.core->managed, end, end + 1, &known))
        end++;
    if (end > page)
        fm_core_managed(S.core, page, end - page);
    world_release();
}

static void adopter(uint32_t id)
{
    (void)id;
    for (;;) {
        core_in();
        S.adopting = true;
        adopt();
        if (sim_chance(8))
            adopt_grown();
        S.adopting = false;
        core_out();
        sim_yield();
    }
}

/* ---- chance: the kernel takes freed pages, devices write, the budget changes */

/* Within the microseconds of a free the kernel takes nothing of it: see free_page(). */
static bool about_to_be_freed(const struct pte *p)
{
    uint64_t page = AS_BASE + (uint64_t)(p - S.pte);
    const struct fm_block *b = fm_block_find(S.core, page);
    uint32_t f = b != NULL ? b->frame[page % FM_BLOCK_PAGES] : FM_FRAME_NONE;
    return f != FM_FRAME_NONE && S.core->frame[f].dropping == FM_DROP_BEGUN;
}

static void kernel_takes(void)
{
    struct pte *p = pte_of(program_page());
    uint32_t f = (uint32_t)sim_rnd(S.frames_n);
    if (p->phys != PHYS_NONE && p->phys != PHYS_ZERO && S.phys[p->phys].astray == 0 && !about_to_be_freed(p))
        kernel_page_out(AS_BASE + (uint64_t)(p - S.pte));
    if (S.frame[f] != PHYS_NONE && S.phys[S.frame[f]].lazy && S.phys[S.frame[f]].held == 0)
        S.phys[S.frame[f]].version = 0;
}

static void chance(uint32_t id)
{
    (void)id;
    for (;;) {
        kernel_takes();
        program_device_write();
        if (sim_chance(20) && S.zaps[(S.zap_gen + 1) % 2] == 0) {
            fm_core_zaps_done(S.core);
            S.zap_gen++;
        }
        if (!S.stop && sim_chance(2000))
            S.core->limit_pages = 12 + (int64_t)sim_rnd(200);
        if (S.servers_on && !S.stop && sim_chance(200))
            fm_pool_span_shut(&S.core->ledger, (uint32_t)sim_rnd(2), sim_chance(2));
        sim_yield();
    }
}

void engine_start(void)
{
    co_start(CO_READER, reader);
    co_start(CO_HANDLER, handler);
    co_start(CO_HANDLER2, handler);
    co_start(CO_EVICTOR, evictor);
    co_start(CO_POOL, pool);
    co_start(CO_POOL2, pool);
    co_start(CO_ADOPTER, adopter);
    co_start(CO_CHANCE, chance);
    for (uint32_t k = 0; k < THREADS; k++)
        co_start(CO_THREAD + k, program_thread);
}
