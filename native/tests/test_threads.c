/* test_threads.c - the core under real threads: several that fault at once, one that evicts, discards in between.
 *
 * The simulator tries interleavings on one thread; this is what the thread sanitizer needs to see that locks
 * and atomics are enough.  The kernel is a table of pages with a mutex each.  Every thread owns each fourth page, so that it
 * knows what must be in it.
 */
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

#include "core/core.h"
#include "fm_assert.h"

#define PAGES 2048u
#define THREADS 4u
#define FRAMES 128u
#define LIMIT 600
#define STEPS 40000u
#define POOL_BYTES (64ull << 20)
#define BASE 0x400000ull             /* page number, at the start of a block */

struct cell {
    pthread_mutex_t lock;
    bool present;
    uint64_t value;
};

static struct cell program[PAGES];
static struct { bool filled; uint64_t value; } frame[FRAMES];
static uint64_t pool[POOL_BYTES / FM_PAGE_BYTES];
static struct fm_core core;
static struct fm_counters count;
static fm_world world;
static atomic_bool stop;

static struct cell *cell_of(uint64_t page) { return &program[page - BASE]; }

static void op_enter(void *ctx) { (void)ctx, fm_world_share(&world); }
static void op_leave(void *ctx) { (void)ctx, fm_world_unshare(&world); }

/* Put n pages there, from frames (moved or copied) or as zeros. */
static enum fm_res put(uint64_t page, uint32_t f, uint32_t n, bool move, uint32_t *done)
{
    for (*done = 0; *done < n; ++*done) {
        struct cell *c = cell_of(page + *done);
        pthread_mutex_lock(&c->lock);
        bool there = c->present;
        if (!there) {
            c->present = true;
            c->value = f == FM_FRAME_NONE ? 0 : frame[f + *done].value;
        }
        pthread_mutex_unlock(&c->lock);
        if (there)
            return FM_EXIST;
        if (move)
            frame[f + *done].filled = false;
    }
    return FM_OK;
}

static enum fm_res op_zero(void *ctx, uint64_t page, uint32_t n, uint32_t *done)
{
    (void)ctx;
    return put(page, FM_FRAME_NONE, n, false, done);
}

static enum fm_res op_move_in(void *ctx, uint64_t page, uint32_t f, uint32_t n, uint32_t *done)
{
    (void)ctx;
    return put(page, f, n, true, done);
}

static enum fm_res op_copy_in(void *ctx, uint64_t page, uint32_t f, uint32_t n, uint32_t *done)
{
    (void)ctx;
    return put(page, f, n, false, done);
}

static enum fm_res op_move_out(void *ctx, uint64_t page, uint32_t f, uint32_t n, uint32_t *done)
{
    (void)ctx;
    for (*done = 0; *done < n; ++*done) {
        struct cell *c = cell_of(page + *done);
        fm_assert(!frame[f + *done].filled);
        pthread_mutex_lock(&c->lock);
        bool there = c->present;
        if (there) {
            frame[f + *done].filled = true;
            frame[f + *done].value = c->value;
            c->present = false;
        }
        pthread_mutex_unlock(&c->lock);
        if (!there)
            return FM_GONE;
    }
    return FM_OK;
}

static enum fm_res op_protect(void *ctx, uint64_t page, uint32_t n, bool on)
{
    (void)ctx, (void)page, (void)n, (void)on;
    return FM_OK;
}

static enum fm_res op_poison(void *ctx, uint64_t page) { (void)ctx, (void)page, fm_panic("a page was lost", __FILE__, __LINE__); }
static void op_wake(void *ctx, uint64_t page, uint32_t n) { (void)ctx, (void)page, (void)n; }
static void op_later(void *ctx, uint64_t page) { (void)ctx, (void)page; }

static void op_present(void *ctx, uint64_t page, uint32_t n, uint64_t *bits)
{
    (void)ctx;
    for (uint32_t k = 0; k < n; k++) {
        bits[k / 64] = k % 64 == 0 ? 0 : bits[k / 64];
        pthread_mutex_lock(&cell_of(page + k)->lock);
        bits[k / 64] |= (uint64_t)cell_of(page + k)->present << (k % 64);
        pthread_mutex_unlock(&cell_of(page + k)->lock);
    }
}

static enum fm_res op_fill_frames(void *ctx, uint32_t f, uint32_t n, uint32_t *done)
{
    (void)ctx;
    for (*done = 0; *done < n; ++*done)
        frame[f + *done].filled = true;
    return FM_OK;
}

static void op_clear(void *ctx, uint32_t f, uint32_t n)
{
    (void)ctx;
    for (uint32_t k = 0; k < n; k++)
        frame[f + k].value = 0;
}

static bool op_hash(void *ctx, uint32_t f, uint64_t hash[2])
{
    (void)ctx;
    fm_assert(frame[f].filled);
    hash[0] = hash[1] = frame[f].value;
    return frame[f].value == 0;
}

static bool op_read_page(void *ctx, uint64_t page, uint32_t f) { return (void)ctx, (void)page, (void)f, false; }
static enum fm_res op_free_lazily(void *ctx, uint64_t page, uint32_t n) { return (void)ctx, (void)page, (void)n, FM_FAIL; }
static void op_settle(void *ctx) { (void)ctx; }
static void op_page_out(void *ctx, uint64_t page, uint32_t n) { (void)ctx, (void)page, (void)n; }
static enum fm_res op_unshare(void *ctx, uint64_t page, uint32_t n) { return (void)ctx, (void)page, (void)n, FM_OK; }

static void op_drop_frames(void *ctx, uint32_t f, uint32_t n)
{
    (void)ctx;
    for (uint32_t k = 0; k < n; k++)
        frame[f + k].filled = false;
}

static void op_submit(void *ctx, struct fm_io *io)
{
    (void)ctx;
    for (uint32_t k = 0; k < io->n; k++) {
        if (io->kind == FM_IO_FETCH)
            frame[io->frame + k].value = pool[io->slot + k];
        else
            pool[io->slot + k] = frame[io->frame + k].value;
    }
    io->status = 0;
    fm_core_io_done(&core, io);
}

static bool op_grant(void *ctx, uint32_t extent) { return (void)ctx, (void)extent, true; }
static struct fm_block *op_block_memory(void *ctx) { return (void)ctx, calloc(1, sizeof(struct fm_block)); }

static void *op_memory(void *ctx, void *old, uint64_t old_bytes, uint64_t bytes)
{
    (void)ctx, (void)old_bytes;
    free(old);
    return bytes > 0 ? calloc(1, bytes) : NULL;
}

static void op_message(void *ctx, int level, const char *text, uint64_t number)
{
    (void)ctx, (void)level;
    fprintf(stderr, "%s %llu\n", text, (unsigned long long)number);
}

static void op_frames_freed(void *ctx) { (void)ctx; }

static const struct fm_ops ops = {
    .enter = op_enter, .leave = op_leave, .zero = op_zero, .move_in = op_move_in, .copy_in = op_copy_in,
    .move_out = op_move_out, .protect = op_protect, .poison = op_poison, .wake = op_wake, .later = op_later,
    .present = op_present,
    .fill_frames = op_fill_frames, .clear = op_clear, .hash = op_hash, .read_page = op_read_page,
    .free_lazily = op_free_lazily, .page_out = op_page_out, .settle = op_settle, .undo_free = op_unshare, .unshare = op_unshare,
    .drop_frames = op_drop_frames, .submit = op_submit, .grant = op_grant,
    .block_memory = op_block_memory, .memory = op_memory, .message = op_message, .frames_freed = op_frames_freed,
};

/* Read the page, and write it unless is is 0.  Faults until it is there. */
static uint64_t touch(uint64_t page, uint64_t is)
{
    for (;;) {
        struct cell *c = cell_of(page);
        pthread_mutex_lock(&c->lock);
        bool there = c->present;
        uint64_t was = c->value;
        if (there && is != 0)
            c->value = is;
        pthread_mutex_unlock(&c->lock);
        if (there)
            return was;
        if (fm_core_fault(&core, page, is != 0 ? FM_FAULT_WRITE : 0) != FM_FAULT_DONE)
            sched_yield();
    }
}

static void discard(uint64_t page)
{
    fm_world_take(&world);
    fm_core_removed(&core, page, 1);
    fm_world_release(&world);
    sched_yield();
    pthread_mutex_lock(&cell_of(page)->lock);
    cell_of(page)->present = false;
    pthread_mutex_unlock(&cell_of(page)->lock);
}

static void *run(void *argument)
{
    uint64_t me = (uint64_t)(uintptr_t)argument, x = me + 1;
    uint64_t *want = calloc(PAGES, sizeof *want);
    for (uint32_t step = 0; step < STEPS; step++) {
        x ^= x << 13, x ^= x >> 7, x ^= x << 17;
        uint64_t k = step % 3 == 0 ? step / 3 % PAGES : x % PAGES;
        k = k - k % THREADS + me;
        uint64_t is = x % 3 == 0 ? x | 1 : 0, was = touch(BASE + k, is);
        if (was != want[k]) {
            fprintf(stderr, "page %llu: want %llx, got %llx\n", (unsigned long long)k, (unsigned long long)want[k],
                    (unsigned long long)was);
            abort();
        }
        want[k] = is != 0 ? is : want[k];
        if (x % 61 == 0) {
            discard(BASE + k);
            want[k] = 0;
        }
    }
    free(want);
    return NULL;
}

static void *evict(void *unused)
{
    (void)unused;
    while (!atomic_load(&stop)) {
        int64_t over = __atomic_load_n(&core.local_pages, __ATOMIC_RELAXED) - LIMIT;
        fm_core_evict(&core, 32);
        if (over > 0)
            fm_core_shrink(&core, (uint32_t)over);
        fm_core_recount(&core, BASE, PAGES);
        sched_yield();
    }
    return NULL;
}

int main(void)
{
    void *ledger = calloc(1, fm_pool_ledger_bytes(POOL_BYTES));
    pthread_t thread[THREADS], evictor;
    fm_assert(ledger != NULL && fm_pool_ledger_init(ledger, POOL_BYTES) == 0);
    for (uint32_t k = 0; k < PAGES; k++)
        pthread_mutex_init(&program[k].lock, NULL);
    core.ops = &ops;
    core.count = &count;
    core.can_move = core.can_poison = true;
    core.limit_pages = LIMIT;
    fm_pool_ledger_view(&core.ledger, ledger, 0);
    fm_core_init(&core, FRAMES);
    fm_core_managed(&core, BASE, PAGES);
    pthread_create(&evictor, NULL, evict, NULL);
    for (uintptr_t k = 0; k < THREADS; k++)
        pthread_create(&thread[k], NULL, run, (void *)k);
    for (uint32_t k = 0; k < THREADS; k++)
        pthread_join(thread[k], NULL);
    atomic_store(&stop, true);
    pthread_join(evictor, NULL);
    fm_assert(count.pages_fetched > 1000 && count.pages_evicted > 1000);
    printf("ok: %llu evicted, %llu fetched\n", (unsigned long long)count.pages_evicted, (unsigned long long)count.pages_fetched);
    free(ledger);
    return 0;
}
