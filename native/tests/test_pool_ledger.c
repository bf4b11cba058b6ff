/* test_pool_ledger.c - reference counts of the pool: what is taken comes back, whoever dies.
 *
 * One mapping plays the memfd that all processes share; a "process" is a view with its
 * own number, and a death is fm_pool_ledger_reap().
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "pool_ledger.h"

#define EXTENT_BYTES (FM_EXTENT_SLOTS * 4096ull)
#define EXTENTS 4u
#define ROUNDS 200

#define CHECK(x) \
    do { \
        if (!(x)) { \
            fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #x); \
            exit(1); \
        } \
    } while (0)

static void *new_ledger(void)
{
    uint64_t bytes = fm_pool_ledger_bytes(EXTENTS * EXTENT_BYTES);
    void *base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(base != MAP_FAILED);
    CHECK(fm_pool_ledger_init(base, EXTENTS * EXTENT_BYTES) == 0);
    return base;
}

static void end_ledger(void *base)
{
    CHECK(fm_pool_ledger_used(base) == 0);
    CHECK(munmap(base, fm_pool_ledger_bytes(EXTENTS * EXTENT_BYTES)) == 0);
}

static struct fm_pool_ledger view_of(void *base, uint32_t proc)
{
    struct fm_pool_ledger l;
    fm_pool_ledger_view(&l, base, proc);
    return l;
}

static void test_bad_sizes_are_refused(void)
{
    uint64_t head[512] = {0};
    CHECK(fm_pool_ledger_init(head, 0) == -1);
    CHECK(fm_pool_ledger_init(head, EXTENT_BYTES + 4096) == -1);
    CHECK(fm_pool_ledger_init(head, 1ull << 45) == -1);
}

static void test_extents_run_out_and_come_back(void)
{
    void *base = new_ledger();
    struct fm_pool_ledger l = view_of(base, 3);
    uint32_t taken[EXTENTS], seen = 0;
    for (uint32_t i = 0; i < EXTENTS; i++) {
        taken[i] = fm_extent_take(&l, FM_EXTENT_NONE);
        CHECK(taken[i] < EXTENTS);
        seen |= 1u << taken[i];
    }
    CHECK(seen == (1u << EXTENTS) - 1);
    CHECK(fm_extent_take(&l, FM_EXTENT_NONE) == FM_EXTENT_NONE);
    fm_extent_release(&l, taken[2]);
    CHECK(fm_extent_take(&l, 0) == taken[2]);
    fm_pool_ledger_reap(base, 3, 0);
    CHECK(fm_extent_take(&l, 1) == 1);
    fm_pool_ledger_reap(base, 3, 0);
    end_ledger(base);
}

static void test_a_slot_has_one_taker(void)
{
    void *base = new_ledger();
    struct fm_pool_ledger a = view_of(base, 0), b = view_of(base, 1);
    uint32_t slot = fm_extent_take(&a, 0) * FM_EXTENT_SLOTS + 7;
    CHECK(fm_slot_take(&a, slot));
    CHECK(!fm_slot_take(&b, slot));
    CHECK(fm_pool_ledger_used(base) == 1);
    fm_slot_release(&a, slot);
    CHECK(fm_slot_take(&a, slot));
    CHECK(fm_pool_ledger_peak(base) == 1);
    fm_pool_ledger_reap(base, 0, 0);
    end_ledger(base);
}

/* The parent dies first: the child's pages stay, and go with the child. */
static void test_a_child_keeps_what_its_dead_parent_shared(void)
{
    void *base = new_ledger();
    struct fm_pool_ledger parent = view_of(base, 0), child = view_of(base, 1);
    uint32_t extent = fm_extent_take(&parent, 0), first = extent * FM_EXTENT_SLOTS;
    for (uint32_t i = 0; i < 100; i++)
        CHECK(fm_slot_take(&parent, first + i));
    fm_pool_ledger_fork(&parent, 1);
    CHECK(fm_slot_shared(&parent, first) && fm_slot_shared(&child, first + 99));
    CHECK(!fm_slot_shared(&parent, first + 100));
    fm_pool_ledger_reap(base, 0, 0);
    CHECK(fm_pool_ledger_used(base) == 100);
    CHECK(!fm_slot_shared(&child, first));
    CHECK(!fm_slot_take(&child, first));
    CHECK(fm_extent_take(&parent, first) != extent);
    fm_pool_ledger_reap(base, 0, 0);
    fm_pool_ledger_reap(base, 1, 0);
    CHECK(fm_extent_take(&parent, extent) == extent);
    fm_pool_ledger_reap(base, 0, 0);
    end_ledger(base);
}

/* The memory of an extent goes back to the system with its last slot, and not before; until it has, nobody gets the
 * extent. */
static void test_an_empty_extent_is_returned(void)
{
    void *base = new_ledger();
    int fd = memfd_create("pool", 0);
    CHECK(fd >= 0 && ftruncate(fd, EXTENTS * EXTENT_BYTES) == 0);
    char *pool = mmap(NULL, EXTENTS * EXTENT_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    struct fm_pool_ledger parent = view_of(base, 0);
    CHECK(pool != MAP_FAILED);
    uint32_t slot = fm_extent_take(&parent, 2) * FM_EXTENT_SLOTS;
    CHECK(fm_slot_take(&parent, slot));
    pool[slot * 4096ull] = 42;
    fm_pool_ledger_fork(&parent, 1);
    fm_pool_ledger_reap(base, 0, 1);
    fm_pool_ledger_trim_reaped(base, fd);
    CHECK(pool[slot * 4096ull] == 42);
    fm_pool_ledger_reap(base, 1, 1);
    CHECK(pool[slot * 4096ull] == 42 && fm_extent_take(&parent, slot / FM_EXTENT_SLOTS) != slot / FM_EXTENT_SLOTS);
    fm_pool_ledger_trim_reaped(base, fd);
    CHECK(pool[slot * 4096ull] == 0 && fm_extent_take(&parent, slot / FM_EXTENT_SLOTS) == slot / FM_EXTENT_SLOTS);
    fm_pool_ledger_reap(base, 0, 0);
    CHECK(munmap(pool, EXTENTS * EXTENT_BYTES) == 0 && close(fd) == 0);
    end_ledger(base);
}

static bool later(void *ctx, uint32_t extent) { return (void)ctx, (void)extent, false; }

static uint32_t punched_first, punched_n;
static void punch(void *ctx, uint32_t extent, uint32_t n)
{
    struct fm_pool_ledger *l = ctx;
    punched_first = extent;
    punched_n += n;
    for (uint32_t k = 0; k < EXTENTS; k++)
        CHECK(fm_extent_take(l, k) == FM_EXTENT_NONE);    /* the last one is in use, these wait for us */
}

/* A trim that was put off is done for neighbours together, by the one that put it off or, when that has died, by the reaper. */
static void test_what_was_put_off_is_trimmed_once(void)
{
    void *base = new_ledger();
    struct fm_pool_ledger a = view_of(base, 0), b = view_of(base, 1);
    a.trim = later;
    for (uint32_t e = 0; e < EXTENTS; e++)
        CHECK(fm_extent_take(&a, e) == e);
    for (uint32_t e = 0; e + 1 < EXTENTS; e++)
        fm_extent_release(&a, e);
    fm_pool_ledger_trim(&b, 0, punch, &b);
    CHECK(punched_n == 0);
    fm_pool_ledger_trim(&a, 0, punch, &b);
    CHECK(punched_n == EXTENTS - 1 && punched_first == 0);
    CHECK(fm_extent_take(&a, 1) == 1);
    fm_extent_release(&a, 1);
    fm_pool_ledger_reap(base, 0, 1);
    a.trim = NULL;
    CHECK(fm_extent_take(&a, 1) == 2 && fm_extent_take(&a, EXTENTS - 1) == 0);   /* 1 and the last wait for the reaper */
    fm_pool_ledger_trim(&a, 0, punch, &b);
    CHECK(punched_n == EXTENTS - 1);
    fm_pool_ledger_trim_reaped(base, -1);
    CHECK(fm_extent_take(&a, 1) == 1 && fm_extent_take(&a, EXTENTS - 1) == EXTENTS - 1);
    fm_pool_ledger_reap(base, 0, 0);
    end_ledger(base);
}

static uint32_t trimmed;
static bool count_trim(void *ctx, uint32_t extent)
{
    (void)ctx;
    (void)extent;
    __atomic_add_fetch(&trimmed, 1, __ATOMIC_RELAXED);
    return true;
}

/* ---- spans: a pool on several servers */

static void *empty_ledger(void)
{
    uint64_t bytes = fm_pool_ledger_bytes(EXTENTS * EXTENT_BYTES);
    void *base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(base != MAP_FAILED && fm_pool_ledger_init_empty(base, EXTENTS * EXTENT_BYTES) == 0);
    return base;
}

static void test_spans_are_added_as_long_as_there_is_room(void)
{
    void *base = empty_ledger();
    struct fm_pool_ledger l = view_of(base, 0);
    CHECK(fm_pool_spans(&l) == 0 && fm_extent_take(&l, 0) == FM_EXTENT_NONE);
    CHECK(fm_pool_ledger_add(base, 0) == -1 && fm_pool_ledger_add(base, EXTENTS + 1) == -1);
    CHECK(fm_pool_ledger_add(base, 1) == 0);
    CHECK(fm_extent_take(&l, 3) == 0 && fm_extent_take(&l, 3) == FM_EXTENT_NONE);
    CHECK(fm_pool_ledger_add(base, EXTENTS) == -1 && fm_pool_ledger_add(base, EXTENTS - 1) == 1);
    CHECK(fm_pool_spans(&l) == 2 && fm_pool_span_of(&l, 0) == 0 && fm_pool_span_of(&l, 1) == 1);
    CHECK(fm_pool_span_of(&l, EXTENTS - 1) == 1);
    CHECK(fm_extent_take(&l, 3) == 3);
    fm_pool_ledger_reap(base, 0, 0);
    end_ledger(base);
}

static void test_a_span_is_closed_when_nothing_of_it_is_used(void)
{
    void *base = empty_ledger();
    struct fm_pool_ledger l = view_of(base, 0);
    CHECK(fm_pool_ledger_add(base, 1) == 0 && fm_pool_ledger_add(base, 3) == 1);
    CHECK(fm_pool_ledger_capacity(base) == EXTENTS * EXTENT_BYTES);
    uint32_t e = fm_extent_take(&l, 2);
    CHECK(e == 2 && fm_pool_ledger_span_free(base, 1) == 2 && fm_pool_ledger_close(base, 1) == -1);
    CHECK(fm_extent_take(&l, 3) == 3);                   /* all is as it was */
    fm_extent_release(&l, 2);
    fm_extent_release(&l, 3);
    CHECK(fm_pool_ledger_span_extents(base, 1) == 3 && fm_pool_ledger_span_free(base, 1) == 3);
    CHECK(fm_pool_ledger_close(base, 1) == 0 && fm_pool_ledger_span_extents(base, 1) == 0);
    CHECK(fm_pool_ledger_capacity(base) == EXTENT_BYTES && fm_pool_ledger_span_used(base, 1) == 0);
    CHECK(fm_extent_take(&l, 2) == 0 && fm_extent_take(&l, 2) == FM_EXTENT_NONE);
    /* Its place is another's then. */
    CHECK(fm_pool_ledger_room(base) == 3);
    CHECK(fm_pool_ledger_add(base, 4) == -1 && fm_pool_ledger_add(base, 2) == 2 && fm_pool_ledger_add(base, 1) == -1);
    CHECK(fm_pool_spans(&l) == 3 && fm_extent_take(&l, 2) == 2 && fm_pool_span_of(&l, 2) == 2);
    CHECK(fm_extent_take(&l, 2) == 1 && fm_extent_take(&l, 2) == FM_EXTENT_NONE);
    fm_pool_ledger_reap(base, 0, 0);
    CHECK(fm_pool_ledger_close(base, 2) == 0 && fm_pool_ledger_add(base, 3) == 3 && fm_extent_take(&l, 3) == 3);
    fm_pool_ledger_reap(base, 0, 0);
    end_ledger(base);
}

static void test_spans_are_finite(void)
{
    void *base = empty_ledger();
    CHECK(fm_pool_ledger_add(base, 1) == 0);
    for (uint32_t k = 1; k < FM_SPANS_MAX; k++)
        CHECK(fm_pool_ledger_add(base, 1) == (int)k && fm_pool_ledger_close(base, k) == 0);
    CHECK(fm_pool_ledger_add(base, 1) == -1 && fm_pool_ledger_room(base) == 0);
    end_ledger(base);
}

static void test_the_roomiest_span_gives_the_next_extent(void)
{
    void *base = empty_ledger();
    struct fm_pool_ledger l = view_of(base, 0);
    CHECK(fm_pool_ledger_add(base, 1) == 0 && fm_pool_ledger_add(base, 3) == 1);
    CHECK(fm_extent_take(&l, 0) == 1);          /* the hint lies elsewhere */
    CHECK(fm_extent_take(&l, 3) == 3);          /* here it does not */
    CHECK(fm_extent_take(&l, FM_EXTENT_NONE) == 0);
    CHECK(fm_extent_take(&l, 0) == 2);
    CHECK(fm_extent_take(&l, 0) == FM_EXTENT_NONE);
    fm_extent_release(&l, 3);
    fm_extent_release(&l, 2);
    fm_extent_release(&l, 0);
    CHECK(fm_extent_take(&l, 0) != 0);
    fm_pool_ledger_reap(base, 0, 0);
    end_ledger(base);
}

static void test_a_span_that_is_shut_is_the_last_resort(void)
{
    void *base = empty_ledger();
    struct fm_pool_ledger l = view_of(base, 0), other = view_of(base, 1);
    CHECK(fm_pool_ledger_add(base, 1) == 0 && fm_pool_ledger_add(base, 3) == 1);
    fm_pool_span_shut(&l, 1, true);
    CHECK(fm_slot_shut(&l, FM_EXTENT_SLOTS) && !fm_slot_shut(&l, FM_EXTENT_SLOTS - 1) && !fm_slot_shut(&other, FM_EXTENT_SLOTS));
    CHECK(fm_extent_take(&l, FM_EXTENT_NONE) == 0);
    CHECK(fm_extent_take(&l, FM_EXTENT_NONE) == 1);      /* whoever grants its space may know better */
    fm_pool_span_shut(&l, 1, false);
    CHECK(!fm_slot_shut(&l, FM_EXTENT_SLOTS));
    fm_pool_ledger_reap(base, 0, 0);
    end_ledger(base);
}

static void test_what_is_used_is_told_by_span(void)
{
    void *base = empty_ledger();
    struct fm_pool_ledger l = view_of(base, 0), child = view_of(base, 1);
    CHECK(fm_pool_ledger_add(base, 2) == 0 && fm_pool_ledger_add(base, 2) == 1);
    for (uint32_t k = 0; k < EXTENTS; k++) {
        uint32_t e = fm_extent_take(&l, FM_EXTENT_NONE);
        for (uint32_t i = 0; i < 3; i++)
            CHECK(fm_slot_take(&l, e * FM_EXTENT_SLOTS + i));
    }
    CHECK(fm_pool_ledger_span_used(base, 0) == 6 && fm_pool_ledger_span_used(base, 1) == 6);
    fm_pool_ledger_fork(&l, 1);
    fm_pool_ledger_reap(base, 0, 0);
    CHECK(fm_pool_ledger_span_used(base, 0) == 6);      /* its owner has gone, the child has it */
    fm_slot_release(&child, 0);
    CHECK(fm_pool_ledger_span_used(base, 0) == 5);
    fm_pool_ledger_reap(base, 1, 0);
    CHECK(fm_pool_ledger_span_used(base, 0) == 0 && fm_pool_ledger_span_used(base, 1) == 0);
    end_ledger(base);
}

static void count_punched(void *ctx, uint32_t extent, uint32_t n) { (void)ctx, (void)extent, punched_n += n; }

/* Neighbours are punched together, but not across: another server has the next. */
static void test_each_span_is_trimmed_by_itself(void)
{
    void *base = empty_ledger();
    struct fm_pool_ledger a = view_of(base, 0);
    CHECK(fm_pool_ledger_add(base, 2) == 0 && fm_pool_ledger_add(base, 2) == 1);
    a.trim = later;
    for (uint32_t k = 0; k < EXTENTS; k++)
        CHECK(fm_extent_take(&a, FM_EXTENT_NONE) != FM_EXTENT_NONE);
    for (uint32_t e = 0; e < EXTENTS; e++)
        fm_extent_release(&a, e);
    punched_n = 0;
    fm_pool_ledger_trim(&a, 1, count_punched, NULL);
    CHECK(punched_n == 2 && fm_extent_take(&a, 0) == 2);
    fm_pool_ledger_trim(&a, 0, count_punched, NULL);
    CHECK(punched_n == 4 && fm_extent_take(&a, 0) == 0);
    a.trim = NULL;
    fm_pool_ledger_reap(base, 0, 0);
    end_ledger(base);
}

struct worker {
    void *base;
    uint32_t proc;
};

/* Take and give back, and leave some for the reaper. */
static void *work(void *arg)
{
    struct worker *w = arg;
    struct fm_pool_ledger l = view_of(w->base, w->proc);
    l.trim = count_trim;
    for (int round = 0; round < ROUNDS; round++) {
        uint32_t extent = fm_extent_take(&l, FM_EXTENT_NONE);
        if (extent == FM_EXTENT_NONE)
            continue;
        uint32_t first = extent * FM_EXTENT_SLOTS;
        for (uint32_t i = 0; i < 16; i++)
            CHECK(fm_slot_take(&l, first + i));
        fm_pool_ledger_fork(&l, w->proc + 100);
        for (uint32_t i = 0; i < 8; i++)
            fm_slot_release(&l, first + i);
        if (round % 2 == 0) {
            for (uint32_t i = 8; i < 16; i++)
                fm_slot_release(&l, first + i);
            fm_extent_release(&l, extent);
        } else {
            fm_pool_ledger_reap(w->base, w->proc, 0);
        }
        fm_pool_ledger_reap(w->base, w->proc + 100, 0);
    }
    return NULL;
}

static void test_processes_at_once(void)
{
    void *base = new_ledger();
    pthread_t thread[4];
    struct worker worker[4];
    for (uint32_t i = 0; i < 4; i++) {
        worker[i] = (struct worker){base, i};
        CHECK(pthread_create(&thread[i], NULL, work, &worker[i]) == 0);
    }
    for (uint32_t i = 0; i < 4; i++)
        CHECK(pthread_join(thread[i], NULL) == 0);
    struct fm_pool_ledger l = view_of(base, 9);
    for (uint32_t i = 0; i < EXTENTS; i++)
        CHECK(fm_extent_take(&l, FM_EXTENT_NONE) != FM_EXTENT_NONE);
    fm_pool_ledger_reap(base, 9, 0);
    end_ledger(base);
}

int main(void)
{
    test_bad_sizes_are_refused();
    test_extents_run_out_and_come_back();
    test_a_slot_has_one_taker();
    test_a_child_keeps_what_its_dead_parent_shared();
    test_an_empty_extent_is_returned();
    test_what_was_put_off_is_trimmed_once();
    test_spans_are_added_as_long_as_there_is_room();
    test_a_span_is_closed_when_nothing_of_it_is_used();
    test_spans_are_finite();
    test_the_roomiest_span_gives_the_next_extent();
    test_a_span_that_is_shut_is_the_last_resort();
    test_what_is_used_is_told_by_span();
    test_each_span_is_trimmed_by_itself();
    test_processes_at_once();
    puts("test_pool_ledger: all well");
    return 0;
}
