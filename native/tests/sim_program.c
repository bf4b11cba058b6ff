/* sim_program.c - the model program: threads that use their memory in every way, and the truth about its bytes.
 *
 * The program is allowed whatever a correct program may do: reads and writes race discards, ranges
 * are reused the moment the kernel has them free.  It does not touch what it is just unmapping.
 */
#include <stddef.h>
#include <string.h>

#include "sim.h"

/* Pages around the borders of the blocks, so that things meet. */
uint64_t program_page(void)
{
    return AS_BASE + FM_BLOCK_PAGES * (1 + sim_rnd(AS_BLOCKS - 1)) - 48 + sim_rnd(96);
}

static void wrote(struct pte *p, uint64_t version)
{
    sim_trace("write", AS_BASE + (uint64_t)(p - S.pte), 1, version);
    p->truth.now = version;
    p->truth.mode = p->truth.window ? LAZY : EXACT;
    p->truth.wrote = p->truth.window;
}

/* The program saw version where it looked. */
static void saw(uint64_t page, uint64_t version)
{
    struct truth *t = &pte_of(page)->truth;
    sim_trace("saw", page, 1, version);
    if (version == t->now) {
        t->mode = t->mode == EITHER ? EXACT : t->mode;
        return;
    }
    sim_expect((t->mode == EITHER && version == t->alt) || (t->mode == LAZY && version == 0),
               "wrong bytes: page %llu reads %#llx and must read %#llx (mode %d, alt %#llx)",
               (unsigned long long)(page - AS_BASE), (unsigned long long)version, (unsigned long long)t->now, t->mode,
               (unsigned long long)t->alt);
    t->now = version;
    t->mode = EXACT;
}

static void sigbus(uint64_t page)
{
    sim_expect(bad_count(pte_of(page)->truth.now) >= 2, "SIGBUS on page %llu, whose bytes %#llx were never spoilt",
               (unsigned long long)(page - AS_BASE), (unsigned long long)pte_of(page)->truth.now);
}

void program_read(uint64_t page)
{
    struct pte *p = pte_of(page);
    p->users++;
    while (!p->poison && p->phys == PHYS_NONE) {
        if (p->registered)
            kernel_fault(page, 0);
        else
            p->phys = PHYS_ZERO;
    }
    if (p->poison)
        sigbus(page);
    else
        saw(page, phys_version(p->phys));
    p->users--;
}

static void program_write(uint64_t page)
{
    struct pte *p = pte_of(page);
    p->users++;
    if (kernel_make_writable(page)) {
        saw(page, phys_version(p->phys));
        S.phys[p->phys].version = S.version_base | ++S.version_next;
        wrote(p, S.phys[p->phys].version);
    } else {
        sigbus(page);
    }
    p->users--;
}

/* Mapped, and not about to change under our feet. */
bool program_touchable(uint64_t page)
{
    return in_space(page) && pte_of(page)->map != 0 && pte_of(page)->prot != PROT_NO;
}

static void access_pages(void)
{
    uint64_t page = program_page();
    uint32_t n = sim_chance(3) ? 1 + (uint32_t)sim_rnd(60) : 1;
    bool write = sim_chance(2);
    for (; n > 0 && program_touchable(page) && !S.stop; n--, page++) {
        if (write && pte_of(page)->prot == PROT_RW)
            program_write(page);
        else
            program_read(page);
        sim_yield();
    }
}

/* A range within one mapping for an operation that must not meet another: its pages, or 0. */
static uint32_t pick_range(uint64_t *page, uint32_t most, bool ends_use)
{
    uint32_t n = 0, want = 1 + (uint32_t)sim_rnd(most);
    *page = program_page();
    while (n < want && in_space(*page + n) && same_vma(*page, *page + n)) {
        const struct pte *p = pte_of(*page + n);
        if (p->busy > 0 || p->pend > 0 || (ends_use && p->users > 0))
            break;
        n++;
    }
    return n;
}

/* ---- discard: the event comes first, the zap some time later */

static void window_ends(uint64_t page, bool freed)
{
    struct pte *p = pte_of(page);
    struct truth *t = &p->truth;
    bool raced = t->wrote;
    t->window = t->wrote = false;
    p->busy--;
    if (freed) {
        t->mode = LAZY;
        if (p->phys != PHYS_NONE && p->phys != PHYS_ZERO && !p->shared && S.phys[p->phys].pins == 0)
            S.phys[p->phys].lazy = true;
        return;
    }
    kernel_zap(p);
    t->alt = 0;
    t->mode = raced ? EITHER : EXACT;
    t->now = raced ? t->now : 0;
}

static bool any_pins(uint64_t page, uint32_t n)
{
    for (uint32_t k = 0; k < n; k++) {
        const struct pte *p = pte_of(page + k);
        if (p->phys != PHYS_NONE && p->phys != PHYS_ZERO && S.phys[p->phys].pins > 0)
            return true;
    }
    return false;
}

static void discard(void)
{
    uint64_t page;
    uint32_t n = pick_range(&page, 40, false);
    bool freed = S.free_on && sim_chance(3);
    if (n == 0 || any_pins(page, n))
        return;
    bool registered = pte_of(page)->registered;
    for (uint32_t k = 0; k < n; k++) {
        struct pte *p = pte_of(page + k);
        p->busy++;
        p->truth.window = true;
        p->truth.wrote = p->truth.mode == EITHER;
        p->truth.mode = LAZY;
    }
    uint32_t gen = S.zap_gen % 2;
    S.zaps[gen]++;
    if (registered) {
        S.changing++;
        kernel_event(EV_REMOVE, page, 0, n);
        S.changing--;
    }
    for (uint64_t k = sim_rnd(8) * sim_rnd(12); k > 0; k--)
        sim_yield();
    for (uint32_t k = 0; k < n; k++)
        window_ends(page + k, freed);
    S.zaps[gen]--;
}

/* ---- unmap, move, map */

static void drop_pins(uint64_t page)
{
    for (uint32_t k = 0; k < PINS_MAX; k++)
        if (S.pin[k].phys != PHYS_NONE && S.pin[k].page == page) {
            S.phys[S.pin[k].phys].pins--;
            phys_put(S.pin[k].phys);
            S.pin[k].phys = PHYS_NONE;
        }
}

static void clear_pte(struct pte *p)
{
    struct pte was = *p;
    *p = (struct pte){ .phys = PHYS_NONE, .pend = was.pend, .busy = was.busy, .users = was.users, .hole = was.hole };
}

static void pend(uint64_t page, uint64_t n, int by)
{
    for (uint64_t k = 0; k < n; k++)
        pte_of(page + k)->pend = (uint8_t)(pte_of(page + k)->pend + by);
}

/* Nothing is put there as long as the event is on its way. */
static void keep_empty(uint64_t page, uint64_t n, const bool *which, int by)
{
    for (uint64_t k = 0; k < n; k++)
        if (which[k])
            pte_of(page + k)->hole = (uint8_t)(pte_of(page + k)->hole + by);
}

/* Does the engine know nothing of a page though the kernel will tell it of its end?  So it is with what a mapping has grown
 * by in place, until it is touched or seen in the maps: see limits.md. */
static bool unknown(uint64_t page)
{
    struct fm_range known;
    const struct fm_block *b = fm_block_find(S.core, page);
    return pte_of(page)->registered && !fm_ranges_next(&S.core->managed, page, page + 1, &known) &&
           (b == NULL || b->state[page % FM_BLOCK_PAGES] == FM_FRESH);
}

static void unmap_now(uint64_t page, uint64_t n)
{
    bool registered = false, hole[FM_BLOCK_PAGES];
    for (uint64_t k = 0; k < n; k++) {
        struct pte *p = pte_of(page + k);
        hole[k] = !p->registered || unknown(page + k);
        registered = registered || p->registered;
        drop_pins(page + k);
        phys_put(p->phys);
        clear_pte(p);
    }
    if (!registered)
        return;
    pend(page, n, 1);
    keep_empty(page, n, hole, 1);
    S.changing++;
    for (uint64_t k = sim_rnd(6) * sim_rnd(6); k > 0; k--)
        sim_yield();
    kernel_event(EV_UNMAP, page, 0, n);
    S.changing--;
    pend(page, n, -1);
    keep_empty(page, n, hole, -1);
}

/* munmap() of a whole block, whatever is there. */
static void unmap_block(void)
{
    uint64_t page = AS_BASE + FM_BLOCK_PAGES * sim_rnd(AS_BLOCKS);
    for (uint32_t k = 0; k < FM_BLOCK_PAGES; k++) {
        const struct pte *p = pte_of(page + k);
        if (p->busy > 0 || p->pend > 0 || p->users > 0)
            return;
    }
    unmap_now(page, FM_BLOCK_PAGES);
}

static void unmap(void)
{
    uint64_t page;
    uint32_t n = pick_range(&page, 60, true);
    if (n > 0)
        unmap_now(page, n);
}

static bool free_range(uint64_t page, uint32_t n)
{
    for (uint32_t k = 0; k < n; k++)
        if (!in_space(page + k) || pte_of(page + k)->map != 0 || pte_of(page + k)->users > 0 ||
            pte_of(page + k)->hole > 0)
            return false;
    return true;
}

static void map_new(void)
{
    uint64_t page = program_page();
    uint32_t n = 1 + (uint32_t)sim_rnd(64), map = S.map_next;
    if (!free_range(page, n))
        return;
    S.map_next++;
    sim_trace("map", page, n, map);
    for (uint32_t k = 0; k < n; k++)
        pte_of(page + k)->map = map;
}

/* mremap() in place: nobody is told, and what is new is registered if the mapping is. */
static void grow(void)
{
    uint64_t last = program_page();
    uint32_t n = 1 + (uint32_t)sim_rnd(40);
    while (in_space(last + 1) && same_vma(last, last + 1))
        last++;
    const struct pte was = *pte_of(last);
    if (was.map == 0 || was.busy > 0 || was.pend > 0 || !free_range(last + 1, n))
        return;
    sim_trace("grow", last + 1, n, was.map);
    for (uint32_t k = 1; k <= n; k++) {
        struct pte *p = pte_of(last + k);
        p->map = was.map;
        p->registered = was.registered;
        p->prot = was.prot;
    }
}

static void move_page(uint64_t from, uint64_t to, uint32_t map, bool keep)
{
    struct pte *p = pte_of(from), *q = pte_of(to), was = *p;
    for (uint32_t k = 0; k < PINS_MAX; k++)
        if (S.pin[k].phys != PHYS_NONE && S.pin[k].page == from)
            S.pin[k].page = to;
    sim_trace("moved from", from, 1, to);
    if (!was.registered && was.phys != PHYS_NONE && was.phys != PHYS_ZERO && S.phys[was.phys].astray != 0)
        S.phys[was.phys].astray = ASTRAY_FOR_GOOD;
    clear_pte(p);
    if (keep) {
        p->map = was.map;
        p->registered = was.registered;
        p->prot = was.prot;
    }
    q->phys = was.phys;
    q->map = map;
    q->registered = was.registered;
    q->wp = was.wp;
    q->shared = was.shared;
    q->poison = was.poison;
    q->prot = was.prot;
    q->truth = was.truth;
}

/* To a place that may have been freed a moment ago, by a thread whose event has not been queued yet. */
static uint64_t pick_place(uint32_t n)
{
    for (uint32_t tries = 0; tries < 8; tries++) {
        uint64_t to = program_page();
        for (uint32_t k = 0; tries < 4 && k < 40 && (!in_space(to) || pte_of(to)->pend == 0); k++)
            to = program_page();
        while (tries < 4 && in_space(to - 1) && pte_of(to - 1)->pend > 0 && pte_of(to - 1)->map == 0)
            to--;
        if (free_range(to, n))
            return to;
    }
    return 0;
}

static void remap(void)
{
    uint64_t from, to;
    uint32_t n = pick_range(&from, 40, true), map = S.map_next;
    bool keep = sim_chance(3);
    if (n == 0 || (to = pick_place(n)) == 0)
        return;
    bool registered = pte_of(from)->registered, hole[FM_BLOCK_PAGES];
    S.map_next++;
    for (uint32_t k = 0; k < n; k++) {
        hole[k] = unknown(from + k);
        move_page(from + k, to + k, map, keep);
    }
    if (!registered)
        return;
    keep_empty(from, n, hole, 1);
    pend(from, n, 1);
    for (uint32_t k = 0; k < n; k++)
        pte_of(to + k)->busy++;
    S.changing += keep ? 1 : 2;
    for (uint64_t k = sim_rnd(6) * sim_rnd(6); k > 0; k--)
        sim_yield();
    kernel_event(EV_REMAP, from, to, n);
    S.changing--;
    if (!keep) {
        sim_point();
        kernel_event(EV_UNMAP, from, 0, n);
        S.changing--;
    }
    pend(from, n, -1);
    keep_empty(from, n, hole, -1);
    for (uint32_t k = 0; k < n; k++)
        pte_of(to + k)->busy--;
}

static void protect(void)
{
    uint64_t page;
    uint32_t n = pick_range(&page, 30, true);
    enum prot to = sim_chance(2) ? PROT_RW : (enum prot)sim_rnd(4);
    if (n == 0 || any_pins(page, n))
        return;
    for (uint32_t k = 0; k < n; k++)
        pte_of(page + k)->prot = (uint8_t)to;
}

/* ---- devices and pipes */

static void pin_page(void)
{
    uint64_t page = program_page();
    uint32_t k = (uint32_t)sim_rnd(PINS_MAX);
    if (S.pin[k].phys != PHYS_NONE || !program_touchable(page) || pte_of(page)->prot != PROT_RW)
        return;
    struct pte *p = pte_of(page);
    p->users++;
    if (kernel_make_writable(page) && p->busy == 0 && S.pin[k].phys == PHYS_NONE && p->prot == PROT_RW) {
        S.pin[k].phys = p->phys;
        S.pin[k].page = page;
        S.phys[p->phys].refs++;
        S.phys[p->phys].pins++;
    }
    p->users--;
}

void program_device_write(void)
{
    uint32_t k = (uint32_t)sim_rnd(PINS_MAX);
    if (S.pin[k].phys == PHYS_NONE)
        return;
    struct pte *p = pte_of(S.pin[k].page);
    S.phys[S.pin[k].phys].version = S.version_base | ++S.version_next;
    S.phys[S.pin[k].phys].lazy = false;
    wrote(p, S.phys[S.pin[k].phys].version);
    if (sim_chance(3))
        drop_pins(S.pin[k].page);
}

static void splice_page(void)
{
    uint64_t page = program_page();
    uint32_t k = (uint32_t)sim_rnd(HELD_MAX);
    if (S.held[k] != PHYS_NONE) {
        S.phys[S.held[k]].held--;
        phys_put(S.held[k]);
        S.held[k] = PHYS_NONE;
        return;
    }
    if (!S.core->frames_shared) {
        core_in();
        fm_core_share_frames(S.core);
        core_out();
    }
    if (S.held[k] != PHYS_NONE || !in_space(page) || pte_of(page)->phys == PHYS_NONE || pte_of(page)->phys == PHYS_ZERO)
        return;
    S.held[k] = pte_of(page)->phys;
    S.phys[S.held[k]].refs++;
    S.phys[S.held[k]].held++;
}

/* ---- a thread */

static bool going_on(void *arg)
{
    (void)arg;
    return !S.stop && !S.freeze;
}

void program_thread(uint32_t id)
{
    (void)id;
    for (;;) {
        if (S.stop || S.freeze)
            sim_wait(going_on, NULL);
        uint64_t what = sim_rnd(100);
        if (what < 60)
            access_pages();
        else if (what < 68)
            discard();
        else if (what < 72)
            unmap();
        else if (what < 78)
            map_new();
        else if (what < 80)
            grow();
        else if (what < 86)
            remap();
        else if (what < 90)
            protect();
        else if (what < 94 && S.pins_on)
            pin_page();
        else if (what < 98 && S.splice_on)
            splice_page();
        else if (what == 98 && sim_chance(8))
            unmap_block();
        else if (S.forks_on && S.forks_left > 0 && sim_chance(40))
            program_fork();
        sim_yield();
    }
}
