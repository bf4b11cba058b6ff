/* test_lease_table.c - leases: found by their token alone, and nobody is inside when their memory is lent again.
 *
 * One mapping plays the memfd that the control plane and the doors share.  The race that matters (a lease ends while
 * connections use it) is played with threads that write their lease's mark into its memory.
 */
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>

#include "check.h"
#include "lease_table.h"

#define MIB (1ull << 20)
#define ROUNDS 300
#define WRITERS 3

static struct fm_lease_table *new_table(uint64_t defects)
{
    struct fm_lease_table *t = mmap(NULL, sizeof *t, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(t != MAP_FAILED);
    fm_lease_table_init(t, 0, defects);
    return t;
}

static const char *token_of(unsigned number)
{
    static _Thread_local char text[FM_LEASE_TOKEN_BYTES + 1];
    snprintf(text, sizeof text, "%064x", number);
    return text;
}

static void test_only_its_own_layout_fits(void)
{
    struct fm_lease_table *t = new_table(0);
    CHECK(fm_lease_table_fits(t, sizeof *t));
    CHECK(!fm_lease_table_fits(t, sizeof *t - 1));
    t->version++;
    CHECK(!fm_lease_table_fits(t, sizeof *t));
    munmap(t, sizeof *t);
}

static void test_a_lease_is_found_by_its_token_alone(void)
{
    struct fm_lease_table *t = new_table(0);
    struct fm_lease_view v;
    for (unsigned i = 0; i < 10; i++)
        CHECK(fm_lease_grant(t, token_of(i), i * MIB, MIB + i) == i);
    for (unsigned i = 0; i < 10; i++) {
        CHECK(fm_lease_find(t, 1, token_of(i), &v));
        CHECK(v.place == i && v.offset == i * MIB && v.bytes == MIB + i && v.door == 1);
        CHECK(fm_lease_in_flight(t, i) == 0);
    }
    CHECK(!fm_lease_find(t, 0, token_of(10), &v));
    CHECK(!fm_lease_find(t, 0, "", &v));
    CHECK(!fm_lease_find(t, 0, "00", &v));
    char zeros[FM_LEASE_TOKEN_BYTES + 2];
    snprintf(zeros, sizeof zeros, "%s0", token_of(3));
    CHECK(!fm_lease_find(t, 0, zeros, &v));
    munmap(t, sizeof *t);
}

static void test_an_ended_lease_lets_nobody_in(void)
{
    struct fm_lease_table *t = new_table(0);
    struct fm_lease_view old, fresh;
    uint32_t place = fm_lease_grant(t, token_of(1), 0, MIB);
    CHECK(fm_lease_find(t, 2, token_of(1), &old) && fm_lease_enter(t, &old));
    fm_lease_end(t, place);
    CHECK(!fm_lease_enter(t, &old) && !fm_lease_find(t, 2, token_of(1), &fresh));
    CHECK(fm_lease_in_flight(t, place) == 1);
    fm_lease_leave(t, &old);
    CHECK(fm_lease_in_flight(t, place) == 0);
    /* The place is nobody's until it is freed. */
    CHECK(fm_lease_grant(t, token_of(2), MIB, MIB) == place + 1);
    fm_lease_free(t, place);
    CHECK(fm_lease_grant(t, token_of(3), 0, MIB) == place);
    CHECK(!fm_lease_enter(t, &old));
    CHECK(!fm_lease_find(t, 2, token_of(1), &fresh) && fm_lease_find(t, 2, token_of(3), &fresh));
    munmap(t, sizeof *t);
}

static void test_a_freed_place_has_no_token(void)
{
    struct fm_lease_table *t = new_table(0);
    struct fm_lease_view v;
    char empty[FM_LEASE_TOKEN_BYTES + 1] = {0};
    uint32_t place = fm_lease_grant(t, token_of(1), 0, MIB);
    fm_lease_end(t, place);
    fm_lease_free(t, place);
    CHECK(!fm_lease_find(t, 0, token_of(1), &v) && !fm_lease_find(t, 0, empty, &v));
    for (uint32_t w = 0; w < FM_LEASE_TOKEN_BYTES / 8; w++)
        CHECK(t->leases[place].token[w] == 0);
    munmap(t, sizeof *t);
}

static void test_the_table_fills_up_and_empties(void)
{
    struct fm_lease_table *t = new_table(0);
    for (unsigned i = 0; i < FM_LEASES_MAX; i++)
        CHECK(fm_lease_grant(t, token_of(i), i, 1) == i);
    CHECK(fm_lease_grant(t, token_of(1u << 20), 0, 1) == FM_LEASE_NONE);
    fm_lease_end(t, 77);
    fm_lease_free(t, 77);
    CHECK(fm_lease_grant(t, token_of(1u << 20), 0, 1) == 77);
    munmap(t, sizeof *t);
}

/* A door that dies in the middle of accesses must not hold the memory for ever; another door's accesses still count. */
static void test_a_dead_door_is_struck_out(void)
{
    struct fm_lease_table *t = new_table(0);
    struct fm_lease_view a, b;
    uint32_t place = fm_lease_grant(t, token_of(1), 0, MIB);
    CHECK(fm_lease_find(t, 0, token_of(1), &a) && fm_lease_find(t, 1, token_of(1), &b));
    CHECK(fm_lease_enter(t, &a) && fm_lease_enter(t, &a) && fm_lease_enter(t, &b));
    fm_lease_door_gone(t, 0);
    CHECK(fm_lease_in_flight(t, place) == 1);
    fm_lease_leave(t, &b);
    CHECK(fm_lease_in_flight(t, place) == 0);
    munmap(t, sizeof *t);
}

/* Memory of one lease at a time; whoever holds it writes its number, which nobody else's may be seen under. */
struct play {
    struct fm_lease_table *table;
    unsigned now;         /* the lease that lives */
    unsigned memory;      /* what was written last */
    unsigned stop;
    unsigned written;
};

static void *write_marks(void *arg)
{
    struct play *p = arg;
    struct fm_lease_view v;
    while (!__atomic_load_n(&p->stop, __ATOMIC_ACQUIRE)) {
        unsigned number = __atomic_load_n(&p->now, __ATOMIC_ACQUIRE);
        if (!fm_lease_find(p->table, 0, token_of(number), &v))
            continue;
        while (!__atomic_load_n(&p->stop, __ATOMIC_ACQUIRE) && fm_lease_enter(p->table, &v)) {
            __atomic_store_n(&p->memory, number, __ATOMIC_RELAXED);
            __atomic_add_fetch(&p->written, 1, __ATOMIC_RELAXED);
            fm_lease_leave(p->table, &v);
        }
    }
    return NULL;
}

/* Returns how often a lease found another's mark in its memory after that had been cleared. */
static unsigned play(uint64_t defects, unsigned rounds)
{
    struct play p = {.table = new_table(defects)};
    pthread_t threads[WRITERS];
    unsigned wrong = 0;
    for (int i = 0; i < WRITERS; i++)
        CHECK(pthread_create(&threads[i], NULL, write_marks, &p) == 0);
    for (unsigned round = 1; round <= rounds; round++) {
        uint32_t place = fm_lease_grant(p.table, token_of(round), 0, MIB);
        CHECK(place != FM_LEASE_NONE);
        unsigned before = __atomic_load_n(&p.written, __ATOMIC_RELAXED);
        __atomic_store_n(&p.now, round, __ATOMIC_RELEASE);
        while (__atomic_load_n(&p.written, __ATOMIC_RELAXED) == before)
            sched_yield();
        fm_lease_end(p.table, place);
        while (fm_lease_in_flight(p.table, place) != 0)
            sched_yield();
        __atomic_store_n(&p.memory, 0, __ATOMIC_SEQ_CST);
        fm_lease_free(p.table, place);
        for (int i = 0; i < 20; i++) {
            wrong += __atomic_load_n(&p.memory, __ATOMIC_SEQ_CST) != 0;
            sched_yield();
        }
    }
    __atomic_store_n(&p.stop, 1, __ATOMIC_RELEASE);
    for (int i = 0; i < WRITERS; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    munmap(p.table, sizeof *p.table);
    return wrong;
}

static void test_nobody_writes_to_memory_that_is_lent_again(void)
{
    CHECK(play(0, ROUNDS) == 0);
    CHECK(play(FM_LEASE_DEFECT_NO_GENERATION, 10) > 0);
}

/* Whoever comes inside takes a page away, unless the lease is pinned. */
struct holes {
    struct fm_lease_table *table;
    struct fm_lease_view view;
    unsigned made;
    unsigned looks;
    unsigned stop;
};

static void *make_holes(void *arg)
{
    struct holes *h = arg;
    while (!__atomic_load_n(&h->stop, __ATOMIC_ACQUIRE)) {
        CHECK(fm_lease_enter(h->table, &h->view));
        if (!fm_lease_is_pinned(h->table, &h->view))
            __atomic_add_fetch(&h->made, 1, __ATOMIC_SEQ_CST);
        __atomic_add_fetch(&h->looks, 1, __ATOMIC_SEQ_CST);
        fm_lease_leave(h->table, &h->view);
        sched_yield();
    }
    return NULL;
}

static void wait_for_looks(struct holes *h, unsigned n)
{
    unsigned before = __atomic_load_n(&h->looks, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&h->looks, __ATOMIC_SEQ_CST) - before < n)
        sched_yield();
}

/* How many holes were made after a lease was pinned and nobody was inside any more. */
static unsigned holes_behind_the_pin(uint64_t defects)
{
    struct holes h = {.table = new_table(defects)};
    pthread_t threads[WRITERS];
    uint32_t place = fm_lease_grant(h.table, token_of(1), 0, MIB);
    CHECK(fm_lease_find(h.table, 0, token_of(1), &h.view));
    for (int i = 0; i < WRITERS; i++)
        CHECK(pthread_create(&threads[i], NULL, make_holes, &h) == 0);
    wait_for_looks(&h, 10);
    CHECK(__atomic_load_n(&h.made, __ATOMIC_SEQ_CST) > 0);
    fm_lease_pin(h.table, place);
    while (fm_lease_in_flight(h.table, place) != 0)
        sched_yield();
    unsigned before = __atomic_load_n(&h.made, __ATOMIC_SEQ_CST);
    wait_for_looks(&h, 200);
    unsigned behind = __atomic_load_n(&h.made, __ATOMIC_SEQ_CST) - before;
    __atomic_store_n(&h.stop, 1, __ATOMIC_RELEASE);
    for (int i = 0; i < WRITERS; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    munmap(h.table, sizeof *h.table);
    return behind;
}

static void test_nobody_makes_holes_in_a_pinned_lease(void)
{
    struct fm_lease_view v;
    for (int i = 0; i < 5; i++)
        CHECK(holes_behind_the_pin(0) == 0);
    CHECK(holes_behind_the_pin(FM_LEASE_DEFECT_PUNCH_PINNED) > 0);
    /* The next lease at the place is not pinned. */
    struct fm_lease_table *t = new_table(0);
    uint32_t place = fm_lease_grant(t, token_of(1), 0, MIB);
    fm_lease_pin(t, place);
    fm_lease_end(t, place);
    fm_lease_free(t, place);
    CHECK(fm_lease_grant(t, token_of(2), 0, MIB) == place && fm_lease_find(t, 0, token_of(2), &v));
    CHECK(!fm_lease_is_pinned(t, &v));
    munmap(t, sizeof *t);
}

int main(void)
{
    test_only_its_own_layout_fits();
    test_a_lease_is_found_by_its_token_alone();
    test_an_ended_lease_lets_nobody_in();
    test_a_freed_place_has_no_token();
    test_the_table_fills_up_and_empties();
    test_a_dead_door_is_struck_out();
    test_nobody_writes_to_memory_that_is_lent_again();
    test_nobody_makes_holes_in_a_pinned_lease();
    puts("test_lease_table: all well");
    return 0;
}
