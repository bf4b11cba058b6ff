/* sim_kernel.c - the model kernel: physical pages, page tables, faults that block, and the queue of events.
 *
 * What it does and in which order is taken from what Linux does; see docs/architecture.md for the
 * points that matter.  It knows nothing of the core.
 */
#include <stddef.h>
#include <string.h>

#include "sim.h"

void kernel_init(uint32_t frames)
{
    S.frames_n = frames;
    for (uint32_t f = 0; f < SIM_FRAMES; f++)
        S.frame[f] = PHYS_NONE;
    for (uint32_t k = 0; k < AS_PAGES; k++)
        S.pte[k].phys = PHYS_NONE;
    S.phys_free_n = 0;
    for (uint32_t k = PHYS_MAX; k > 0; k--)
        S.phys_free[S.phys_free_n++] = k - 1;
    for (uint32_t k = 0; k < PINS_MAX; k++)
        S.pin[k].phys = PHYS_NONE;
    for (uint32_t k = 0; k < HELD_MAX; k++)
        S.held[k] = PHYS_NONE;
    S.map_next = 1;
}

uint32_t phys_new(uint64_t version)
{
    sim_expect(S.phys_free_n > 0, "the model kernel is out of memory: pages are leaked");
    uint32_t k = S.phys_free[--S.phys_free_n];
    S.phys[k] = (struct phys){ .version = version, .refs = 1 };
    return k;
}

void phys_put(uint32_t phys)
{
    if (phys == PHYS_NONE || phys == PHYS_ZERO)
        return;
    sim_expect(S.phys[phys].refs > 0, "a physical page is freed twice");
    if (--S.phys[phys].refs == 0)
        S.phys_free[S.phys_free_n++] = phys;
}

uint64_t phys_version(uint32_t phys)
{
    return phys == PHYS_ZERO ? 0 : S.phys[phys].version;
}

/* The engine puts other bytes into a physical page: nobody else may be looking at it. */
void phys_engine_writes(uint32_t phys, uint64_t version)
{
    sim_expect(S.phys[phys].held == 0, "a frame that the reader of a pipe still holds was rewritten");
    sim_expect(S.phys[phys].pins == 0, "a frame that a device still holds was rewritten");
    S.phys[phys].version = version;
    S.phys[phys].lazy = false;
    S.phys[phys].astray = 0;
}

/* Faults that nobody has read yet leave the queue with the thread that they were for. */
void kernel_wake(uint64_t page, uint64_t n)
{
    for (uint32_t k = 0; k < CO_N; k++) {
        if (!S.blocked[k] || S.blocked_page[k] < page || S.blocked_page[k] >= page + n)
            continue;
        S.blocked[k] = false;
        for (uint32_t f = 0; f < FAULTS_MAX && S.faults_n > 0; f++)
            if (S.fault[f].state == FAULT_UNREAD && S.fault[f].co == k) {
                S.fault[f].state = FAULT_NONE;
                S.faults_n--;
            }
    }
}

static bool woken(void *arg) { return !*(bool *)arg; }

void kernel_fault(uint64_t page, uint32_t bits)
{
    uint32_t f = 0;
    while (f < FAULTS_MAX && S.fault[f].state != FAULT_NONE)
        f++;
    sim_expect(f < FAULTS_MAX, "too many faults at once");
    sim_trace("fault", page, 1, bits);
    S.fault[f] = (struct fault){ .state = FAULT_UNREAD, .co = (uint8_t)S.cur, .bits = (uint8_t)bits, .page = page };
    S.faults_n++;
    S.blocked[S.cur] = true;
    S.blocked_page[S.cur] = page;
    sim_wait(woken, &S.blocked[S.cur]);
}

void kernel_zap(struct pte *p)
{
    sim_trace("zap", AS_BASE + (uint64_t)(p - S.pte), 1, 0);
    phys_put(p->phys);
    p->phys = PHYS_NONE;
    p->wp = p->shared = p->poison = false;
}

void kernel_page_out(uint64_t page)
{
    struct pte *p = in_space(page) ? pte_of(page) : NULL;
    if (p == NULL || p->phys == PHYS_NONE || p->phys == PHYS_ZERO)
        return;
    const struct phys *is = &S.phys[p->phys];
    if (!is->lazy || is->pins > 0 || is->held > 0)
        return;
    sim_trace("page out", page, 1, is->version);
    kernel_zap(p);
}

/* Pages that are not registered, and copies after a fork, the kernel makes by itself.  Of the program's pages none is unmapped
 * while it writes; one that the engine writes to may be. */
bool kernel_make_writable(uint64_t page)
{
    struct pte *p = pte_of(page);
    for (;;) {
        if (p->poison || p->map == 0)
            return false;
        if (p->phys == PHYS_NONE) {
            if (p->registered)
                kernel_fault(page, FM_FAULT_WRITE);
            else
                p->phys = phys_new(0);
            continue;
        }
        if (p->wp) {
            kernel_fault(page, FM_FAULT_WRITE | FM_FAULT_PROTECTED);
            continue;
        }
        if (p->phys == PHYS_ZERO || (p->shared && (S.phys[p->phys].refs > 1 || sim_chance(2)))) {
            uint32_t was = p->phys;
            p->phys = phys_new(phys_version(was));
            phys_put(was);
        }
        p->shared = false;
        S.phys[p->phys].lazy = false;
        S.phys[p->phys].astray = 0;
        return true;
    }
}

bool same_vma(uint64_t a, uint64_t b)
{
    const struct pte *p = pte_of(a), *q = pte_of(b);
    return p->map != 0 && p->map == q->map && p->prot == q->prot && p->registered == q->registered;
}

uint32_t event_unread(void)
{
    uint32_t n = 0;
    for (uint32_t k = 0; k < S.events_n; k++)
        n += !S.events[k]->read;
    return n;
}

static bool was_read(void *arg) { return ((struct event *)arg)->read; }

/* The caller has raised S.changing before the change, and lowers it afterwards. */
void kernel_event(enum event_kind kind, uint64_t page, uint64_t to, uint64_t n)
{
    struct event e = { .kind = (uint8_t)kind, .page = page, .to = to, .n = n };
    sim_expect(S.events_n < EVENTS_MAX, "too many events at once");
    sim_trace(kind == EV_REMAP ? "q remap" : kind == EV_REMOVE ? "q remove" : "q unmap", page, n, to);
    if (kind == EV_REMAP)
        sim_trace("q remap to", to, n, page);
    S.events[S.events_n++] = &e;
    sim_wait(was_read, &e);
}
