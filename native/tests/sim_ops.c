/* sim_ops.c - struct fm_ops over the model kernel: what the engine's shell is to the real one. */
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include "sim.h"

static bool may_enter(void *arg)
{
    (void)arg;
    return !S.exclusive && !S.wanted;
}

static void op_enter(void *ctx)
{
    (void)ctx;
    sim_point();
    if (!may_enter(NULL))
        sim_wait(may_enter, NULL);
    S.shared++;
}

static void op_leave(void *ctx)
{
    (void)ctx;
    sim_expect(S.shared > 0, "leave() without enter()");
    S.shared--;
    sim_point();
}

static bool gate_open(void *arg)
{
    (void)arg;
    return !S.gate;
}

void core_in(void)
{
    if (S.gate)
        sim_wait(gate_open, NULL);
    S.in_core++;
}

void core_out(void) { S.in_core--; }

/* May the page ioctls go on here?  Looked at before each page: the world can change in the middle of one. */
static enum fm_res usable(uint64_t first, uint64_t page)
{
    if (sim_chance(S.calm * 4))
        sim_yield();
    if (S.changing > 0 && !sim_defect(BLIND))
        return FM_AGAIN;
    if (!in_space(page) || !pte_of(page)->registered)
        return FM_GONE;
    return same_vma(first, page) ? FM_OK : FM_GONE;
}

/* A call that would cross the end of a mapping is refused as a whole, or stops there. */
static bool crosses(uint64_t page, uint32_t n)
{
    for (uint32_t k = 0; k < n; k++)
        if (!in_space(page + k) || !same_vma(page, page + k))
            return sim_chance(2);
    return false;
}

enum way { WAY_ZERO, WAY_MOVE, WAY_COPY };

static enum fm_res put_page(struct pte *p, uint32_t frame, enum way way)
{
    if (p->poison || p->phys != PHYS_NONE)
        return FM_EXIST;
    if (way == WAY_MOVE && p->prot != PROT_RW)
        return FM_REFUSED;
    if (way == WAY_MOVE && S.pins_on && sim_chance(20))
        return FM_BUSY;            /* of a transfer that has ended, as far as was told */
    if (way == WAY_ZERO) {
        p->phys = PHYS_ZERO;
    } else if (frame == FM_FRAME_NONE) {
        p->phys = phys_new(0);
    } else {
        sim_expect(S.frame[frame] != PHYS_NONE, "a page is installed from a frame without memory");
        p->phys = way == WAY_MOVE ? S.frame[frame] : phys_new(phys_version(S.frame[frame]));
        if (way == WAY_MOVE)
            S.frame[frame] = PHYS_NONE;
    }
    p->wp = p->shared = false;
    return FM_OK;
}

static enum fm_res put_pages(uint64_t page, uint32_t frame, uint32_t n, uint32_t *done, enum way way)
{
    enum fm_res r = FM_OK;
    *done = 0;
    sim_point();
    if (n > 1 && crosses(page, n))
        r = FM_GONE;
    while (r == FM_OK && *done < n) {
        r = usable(page, page + *done);
        if (r == FM_OK)
            r = put_page(pte_of(page + *done), frame == FM_FRAME_NONE ? frame : frame + *done, way);
        *done += r == FM_OK;
    }
    sim_trace("in", page, n, (uint64_t)r << 32 | (uint64_t)way << 16 | *done);
    kernel_wake(page, *done);
    sim_point();
    return r;
}

static enum fm_res op_zero(void *ctx, uint64_t page, uint32_t n, uint32_t *done)
{
    (void)ctx;
    return put_pages(page, FM_FRAME_NONE, n, done, WAY_ZERO);
}

static enum fm_res op_move_in(void *ctx, uint64_t page, uint32_t frame, uint32_t n, uint32_t *done)
{
    (void)ctx;
    return put_pages(page, frame, n, done, WAY_MOVE);
}

static enum fm_res op_copy_in(void *ctx, uint64_t page, uint32_t frame, uint32_t n, uint32_t *done)
{
    (void)ctx;
    return put_pages(page, frame, n, done, WAY_COPY);
}

static enum fm_res take_page(struct pte *p, uint32_t frame)
{
    sim_expect(S.frame[frame] == PHYS_NONE, "a page is moved onto a frame that has memory");
    if (p->prot != PROT_RW)
        return FM_REFUSED;
    if (p->poison || p->phys == PHYS_NONE)
        return FM_GONE;
    if (p->shared || (p->phys != PHYS_ZERO && S.phys[p->phys].pins > 0))
        return FM_BUSY;
    S.frame[frame] = p->phys == PHYS_ZERO ? phys_new(0) : p->phys;
    p->phys = PHYS_NONE;
    p->wp = false;
    return FM_OK;
}

static enum fm_res op_move_out(void *ctx, uint64_t page, uint32_t frame, uint32_t n, uint32_t *done)
{
    (void)ctx;
    enum fm_res r = FM_OK;
    *done = 0;
    const uint16_t *flags = fm_block_find(S.core, page)->flags + page % FM_BLOCK_PAGES;
    for (uint32_t k = 0; k < n; k++)
        sim_expect((flags[k] & FM_PINNED) == 0, "a pinned page leaves");
    sim_point();
    if (n > 1 && crosses(page, n))
        r = FM_REFUSED;
    while (r == FM_OK && *done < n) {
        r = usable(page, page + *done);
        if (r == FM_OK)
            r = take_page(pte_of(page + *done), frame + *done);
        *done += r == FM_OK;
    }
    sim_trace("out", page, n, (uint64_t)r << 32 | *done);
    sim_point();
    return r;
}

/* Protecting what is missing succeeds, and does nothing. */
static enum fm_res op_protect(void *ctx, uint64_t page, uint32_t n, bool on)
{
    (void)ctx;
    enum fm_res r = FM_OK;
    sim_point();
    for (uint32_t k = 0; k < n && r == FM_OK; k++) {
        r = usable(page, page + k);
        if (r == FM_OK && pte_of(page + k)->phys != PHYS_NONE)
            pte_of(page + k)->wp = on;
    }
    sim_trace(on ? "protect" : "unprotect", page, n, r);
    if (r == FM_OK && !on)
        kernel_wake(page, n);
    sim_point();
    return r;
}

static enum fm_res op_poison(void *ctx, uint64_t page)
{
    (void)ctx;
    sim_point();
    enum fm_res r = usable(page, page);
    if (r == FM_OK && (pte_of(page)->phys != PHYS_NONE || pte_of(page)->poison))
        r = FM_EXIST;
    if (r == FM_OK) {
        pte_of(page)->poison = true;
        kernel_wake(page, 1);
    }
    return r;
}

static void op_wake(void *ctx, uint64_t page, uint32_t n)
{
    (void)ctx;
    sim_point();
    sim_trace("wake", page, n, 0);
    if (!sim_defect(FORGET_WAKE) || !sim_chance(4))
        kernel_wake(page, n);
}

/* The kernel of the simulator hands faults and events out in any order, so the thread may as well fault again. */
static void op_later(void *ctx, uint64_t page) { op_wake(ctx, page, 1); }

static void op_present(void *ctx, uint64_t page, uint32_t n, uint64_t *bits)
{
    (void)ctx;
    sim_point();
    memset(bits, 0, (n + 63) / 64 * sizeof *bits);
    for (uint32_t k = 0; k < n; k++)
        if (in_space(page + k) && pte_of(page + k)->phys != PHYS_NONE && (!sim_defect(STALE_PRESENT) || !sim_chance(32)))
            bits[k / 64] |= 1ull << (k % 64);
    sim_point();
}

static enum fm_res op_fill_frames(void *ctx, uint32_t frame, uint32_t n, uint32_t *done)
{
    (void)ctx;
    sim_point();
    for (*done = 0; *done < n; ++*done) {
        sim_point();
        if (S.changing > 0 && !sim_defect(BLIND))
            return FM_AGAIN;
        sim_expect(S.frame[frame + *done] == PHYS_NONE, "memory is put behind a frame that has some");
        S.frame[frame + *done] = phys_new(0);
    }
    return FM_OK;
}

static void op_clear(void *ctx, uint32_t frame, uint32_t n)
{
    (void)ctx;
    sim_point();
    for (uint32_t f = frame; f < frame + n; f++) {
        sim_expect(S.frame[f] != PHYS_NONE, "a frame without memory is cleared");
        phys_engine_writes(S.frame[f], 0);
    }
}

/* Looking at the bytes settles a page that the kernel could still take (MADV_FREE): the engine rewrites a word. */
static bool op_hash(void *ctx, uint32_t frame, uint64_t hash[2])
{
    (void)ctx;
    sim_point();
    sim_expect(S.frame[frame] != PHYS_NONE, "a frame without memory is hashed");
    struct phys *p = &S.phys[S.frame[frame]];
    if (!sim_defect(LAZY_FRAMES))
        p->lazy = false;
    hash[0] = sim_defect(WEAK_HASH) ? 1 : p->version * 0x9e3779b97f4a7c15ull;
    hash[1] = sim_defect(WEAK_HASH) ? 1 : ~p->version;
    bool zero = p->version == 0;
    sim_point();
    return zero;
}

static bool op_read_page(void *ctx, uint64_t page, uint32_t frame)
{
    (void)ctx;
    sim_point();
    if (!in_space(page) || pte_of(page)->phys == PHYS_NONE || sim_chance(200))
        return false;
    sim_expect(S.frame[frame] != PHYS_NONE, "a page is read into a frame without memory");
    phys_engine_writes(S.frame[frame], phys_version(pte_of(page)->phys));
    sim_point();
    return true;
}

/* While the operation waits the core's books are in order: a check may look at them. */
static void pause_core(void)
{
    core_out();
    sim_point();
}

/* Are the bytes of what is there those that the books would bring back?  The kernel may take it then. */
static bool can_be_had(uint64_t page)
{
    const struct fm_block *b = fm_block_find(S.core, page);
    uint32_t i = (uint32_t)(page % FM_BLOCK_PAGES);
    if (b == NULL || b->state[i] != FM_LEAVING || pte_of(page)->phys == PHYS_NONE || pte_of(page)->phys == PHYS_ZERO)
        return false;
    uint64_t is = S.phys[pte_of(page)->phys].version;
    return is == (b->slot[i] == FM_SLOT_NONE ? 0 : S.family->slot[b->slot[i]]);
}

/* Whatever is there is made clean, and what is not ours must be written to before the kernel takes it: that it takes
 * nothing within these microseconds is all that is taken for granted.  (And for good if the program moves such a page
 * within them, in a mapping that is not registered: nobody is told where it went.) */
static void free_page(uint64_t page)
{
    struct pte *p = pte_of(page);
    sim_trace("free", page, 1, p->phys);
    if (fm_defect(S.core, DROP_BY_ADDRESS)) {
        kernel_zap(p);
        return;
    }
    if (p->phys == PHYS_NONE || p->phys == PHYS_ZERO || p->shared)
        return;
    struct phys *is = &S.phys[p->phys];
    is->astray = is->astray == 0 ? ASTRAY_NOW : is->astray;
    S.astray_n++;
    is->lazy = true;
}

void sim_free_ends(void)
{
    for (uint32_t k = 0; S.astray_n > 0 && k < PHYS_MAX; k++)
        S.phys[k].astray = S.phys[k].astray == ASTRAY_NOW ? 0 : S.phys[k].astray;
    S.astray_n = 0;
}

static void events_read(void)
{
    while (S.changing > 0)
        sim_yield();
}

static void op_settle(void *ctx)
{
    (void)ctx;
    pause_core();
    events_read();
    core_in();
}

/* Linux tells of a range mapping by mapping; what is no longer there by then ends the call. */
static enum fm_res op_free_lazily(void *ctx, uint64_t page, uint32_t n)
{
    (void)ctx;
    enum fm_res r = FM_OK;
    sim_free_ends();
    pause_core();
    for (uint32_t k = 0, run; k < n && r == FM_OK; k += run) {
        for (run = 1; k + run < n && in_space(page + k + run) && same_vma(page + k, page + k + run);)
            run++;
        if (!in_space(page + k) || pte_of(page + k)->map == 0 || sim_chance(100)) {
            r = FM_FAIL;
            break;
        }
        if (pte_of(page + k)->registered) {
            S.changing++;
            kernel_event(EV_REMOVE, page + k, 0, run);
            S.changing--;
        }
        sim_point();
        for (uint32_t j = k; j < k + run && r == FM_OK; j++) {
            r = pte_of(page + j)->map != 0 ? FM_OK : FM_FAIL;
            if (r == FM_OK)
                free_page(page + j);
        }
    }
    events_read();
    core_in();
    return r;
}

static void op_page_out(void *ctx, uint64_t page, uint32_t n)
{
    (void)ctx;
    for (uint64_t p = page; p < page + n; p++)
        if (in_space(p) && can_be_had(p))
            S.phys[pte_of(p)->phys].astray = 0;
    pause_core();
    for (uint64_t p = page; p < page + n; p++)
        if (!sim_chance(8)) {         /* another processor may have it in hand */
            sim_point();
            if (in_space(p) && !pte_of(p)->shared)
                kernel_page_out(p);
        }
    core_in();
}

static enum fm_res op_unshare(void *ctx, uint64_t page, uint32_t n)
{
    (void)ctx;
    enum fm_res r = FM_OK;
    pause_core();
    for (uint64_t p = page; p < page + n && r == FM_OK; p++) {
        if (!in_space(p) || pte_of(p)->map == 0)
            r = FM_GONE;
        else if (pte_of(p)->prot != PROT_RW)
            r = FM_REFUSED;
        else if (!kernel_make_writable(p))
            r = FM_FAIL;
    }
    core_in();
    return r;
}

static enum fm_res op_undo_free(void *ctx, uint64_t page, uint32_t n)
{
    enum fm_res r = op_unshare(ctx, page, n);
    if (r == FM_REFUSED && n == 1 && in_space(page) && pte_of(page)->phys != PHYS_NONE && pte_of(page)->phys != PHYS_ZERO)
        S.phys[pte_of(page)->phys].lazy = false;
    return r;
}

static void op_drop_frames(void *ctx, uint32_t frame, uint32_t n)
{
    (void)ctx;
    sim_point();
    for (uint32_t f = frame; f < frame + n; f++) {
        phys_put(S.frame[f]);
        S.frame[f] = PHYS_NONE;
    }
    sim_point();
}

static bool thawed(void *arg)
{
    (void)arg;
    return S.freeze < 2 && !S.gate;
}

/* Before a fork no new fetch starts; stores must end. */
static void op_submit(void *ctx, struct fm_io *io)
{
    (void)ctx;
    sim_point();
    if (S.freeze == 2 && io->kind == FM_IO_FETCH) {
        uint32_t pool = S.cur == CO_POOL || S.cur == CO_POOL2;
        S.in_core--;
        S.stalled_pool += pool;
        sim_wait(thawed, NULL);
        S.stalled_pool -= pool;
        S.in_core++;
    }
    sim_expect(S.io_n < SIM_FRAMES, "more transfers than frames");
    sim_expect(io->n > 0 && io->frame + io->n <= S.frames_n, "a transfer of frames that are not there");
    sim_expect(io->slot % FM_EXTENT_SLOTS + io->n <= FM_EXTENT_SLOTS, "a transfer goes beyond its extent");
    S.io[S.io_n++] = io;
}

static bool op_grant(void *ctx, uint32_t extent)
{
    (void)ctx;
    pause_core();
    sim_expect(extent < S.core->ledger.extents && S.core->ledger.extent_refs[extent] == 1, "an extent that is in use is granted");
    bool space = !S.faults_on || S.stop || !sim_chance(4);
    space &= !fm_slot_shut(&S.core->ledger, extent * FM_EXTENT_SLOTS);
    core_in();
    return space;
}

static void *op_memory(void *ctx, void *old, uint64_t old_bytes, uint64_t bytes)
{
    (void)ctx;
    (void)old_bytes;
    void *p = S.arena + S.arena_used;
    if (old != NULL)
        return NULL;
    S.arena_used += (bytes + 63) & ~63ull;
    sim_expect(S.arena_used <= ARENA_BYTES, "the engine's memory has no bound");
    return p;
}

/* While events are applied there must be memory: without it the core stops. */
static struct fm_block *op_block_memory(void *ctx)
{
    if (S.starved_on && !S.exclusive && sim_chance(3))
        return NULL;
    return op_memory(ctx, NULL, 0, sizeof(struct fm_block));
}

static void op_message(void *ctx, int level, const char *text, uint64_t number)
{
    (void)ctx;
    if (S.verbose)
        printf("  step %llu: %s %#llx\n", (unsigned long long)S.steps, text, (unsigned long long)number);
    sim_expect(level < FM_LEVEL_ERROR || strncmp(text, "bug", 3) != 0, "the core says: %s (page %llu)", text,
               (unsigned long long)(number / FM_PAGE_BYTES - AS_BASE));
}

static void op_frames_freed(void *ctx)
{
    (void)ctx;
    S.freed_seq++;
}

const struct fm_ops sim_ops = {
    .enter = op_enter, .leave = op_leave, .zero = op_zero, .move_in = op_move_in, .copy_in = op_copy_in,
    .move_out = op_move_out, .protect = op_protect, .poison = op_poison, .wake = op_wake, .later = op_later,
    .present = op_present,
    .fill_frames = op_fill_frames, .clear = op_clear, .hash = op_hash, .read_page = op_read_page,
    .free_lazily = op_free_lazily, .page_out = op_page_out, .settle = op_settle, .undo_free = op_undo_free, .unshare = op_unshare,
    .drop_frames = op_drop_frames, .submit = op_submit, .grant = op_grant,
    .block_memory = op_block_memory, .memory = op_memory, .message = op_message, .frames_freed = op_frames_freed,
};

/* ---- which bytes were spoilt on purpose */

/* Where a version stands in the table, or may be put. */
static uint32_t bad_place(uint64_t version)
{
    uint32_t k = (uint32_t)(version * 0x9e3779b9u) % BAD_SIZE;
    for (uint32_t tries = 0; S.bad[k].version != version && S.bad[k].version != 0; tries++) {
        sim_expect(tries < BAD_SIZE, "too many pages were spoilt");
        k = (k + 1) % BAD_SIZE;
    }
    return k;
}

void bad_note(uint64_t version, bool good)
{
    uint32_t k = bad_place(version);
    if (good && S.bad[k].version == 0)
        return;
    S.bad[k].version = version;
    S.bad[k].n = good ? 0 : S.bad[k].n + 1;
}

uint32_t bad_count(uint64_t version) { return S.bad[bad_place(version)].n; }
