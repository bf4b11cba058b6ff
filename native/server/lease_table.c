/* lease_table.c - leases that the control plane grants and the data plane looks at; see lease_table.h.
 *
 * Runs in nbdkit (many threads) and, through cffi, in `farmem serve`.  No locks: each side must be able to die at any
 * instruction without holding the other up.
 */
#include "lease_table.h"

#include <string.h>

#include "fm_assert.h"

#define TOKEN_WORDS (FM_LEASE_TOKEN_BYTES / 8)

void fm_lease_table_init(struct fm_lease_table *t, uint64_t flags, uint64_t defects)
{
    t->magic = FM_LEASE_TABLE_MAGIC;
    t->version = FM_LEASE_TABLE_VERSION;
    t->bytes = sizeof *t;
    t->flags = flags;
    t->defects = defects;
}

bool fm_lease_table_fits(const struct fm_lease_table *t, uint64_t bytes)
{
    return bytes >= sizeof *t && t->magic == FM_LEASE_TABLE_MAGIC && t->version == FM_LEASE_TABLE_VERSION &&
           t->bytes == sizeof *t;
}

static bool lives(uint64_t generation) { return (generation & 1) != 0; }

/* A place that is free has had its last visitor counted out, and its token wiped: offset and bytes are 0. */
static bool is_free(const struct fm_lease *l)
{
    return !lives(__atomic_load_n(&l->generation, __ATOMIC_SEQ_CST)) && __atomic_load_n(&l->bytes, __ATOMIC_RELAXED) == 0;
}

uint32_t fm_lease_grant(struct fm_lease_table *t, const char *token, uint64_t offset, uint64_t bytes)
{
    fm_assert(strlen(token) == FM_LEASE_TOKEN_BYTES && bytes > 0);
    for (uint32_t i = 0; i < FM_LEASES_MAX; i++) {
        struct fm_lease *l = &t->leases[i];
        if (!is_free(l))
            continue;
        memset(&l->counters, 0, sizeof l->counters);
        __atomic_store_n(&l->pinned, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&l->offset, offset, __ATOMIC_RELAXED);
        __atomic_store_n(&l->bytes, bytes, __ATOMIC_RELAXED);
        for (uint32_t w = 0; w < TOKEN_WORDS; w++) {
            uint64_t word;
            memcpy(&word, token + 8 * w, 8);
            __atomic_store_n(&l->token[w], word, __ATOMIC_RELAXED);
        }
        __atomic_add_fetch(&l->generation, 1, __ATOMIC_SEQ_CST);
        return i;
    }
    return FM_LEASE_NONE;
}

void fm_lease_end(struct fm_lease_table *t, uint32_t place)
{
    fm_assert(place < FM_LEASES_MAX && lives(t->leases[place].generation));
    __atomic_add_fetch(&t->leases[place].generation, 1, __ATOMIC_SEQ_CST);
}

void fm_lease_pin(struct fm_lease_table *t, uint32_t place)
{
    fm_assert(place < FM_LEASES_MAX && lives(t->leases[place].generation));
    __atomic_store_n(&t->leases[place].pinned, 1, __ATOMIC_SEQ_CST);
}

uint64_t fm_lease_in_flight(const struct fm_lease_table *t, uint32_t place)
{
    uint64_t n = 0;
    fm_assert(place < FM_LEASES_MAX);
    for (uint32_t door = 0; door < FM_LEASE_DOORS_MAX; door++)
        n += __atomic_load_n(&t->leases[place].in_flight[door], __ATOMIC_SEQ_CST);
    return n;
}

void fm_lease_free(struct fm_lease_table *t, uint32_t place)
{
    fm_assert(place < FM_LEASES_MAX);
    struct fm_lease *l = &t->leases[place];
    fm_assert(!lives(l->generation) && l->bytes != 0);
    for (uint32_t w = 0; w < TOKEN_WORDS; w++)
        __atomic_store_n(&l->token[w], 0, __ATOMIC_RELAXED);
    __atomic_store_n(&l->offset, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&l->bytes, 0, __ATOMIC_RELEASE);
}

void fm_lease_door_gone(struct fm_lease_table *t, uint32_t door)
{
    fm_assert(door < FM_LEASE_DOORS_MAX);
    for (uint32_t i = 0; i < FM_LEASES_MAX; i++)
        __atomic_store_n(&t->leases[i].in_flight[door], 0, __ATOMIC_SEQ_CST);
    __atomic_store_n(&t->doors[door].connections, 0, __ATOMIC_SEQ_CST);
    __atomic_store_n(&t->doors[door].pid, 0, __ATOMIC_SEQ_CST);
}

/* Every entry is compared to its end, and the one that fits is taken without a branch. */
static uint32_t place_of(const struct fm_lease_table *t, const char *name)
{
    uint64_t wanted[TOKEN_WORDS];
    uint32_t found = FM_LEASE_NONE;
    memcpy(wanted, name, sizeof wanted);
    for (uint32_t i = 0; i < FM_LEASES_MAX; i++) {
        const struct fm_lease *l = &t->leases[i];
        uint64_t differs = ~__atomic_load_n(&l->generation, __ATOMIC_ACQUIRE) & 1;
        for (uint32_t w = 0; w < TOKEN_WORDS; w++)
            differs |= wanted[w] ^ __atomic_load_n(&l->token[w], __ATOMIC_RELAXED);
        uint32_t mask = (uint32_t)(((differs | (0 - differs)) >> 63) - 1);    /* all ones if nothing differs */
        found = (found & ~mask) | (i & mask);
    }
    return found;
}

bool fm_lease_find(struct fm_lease_table *t, uint32_t door, const char *name, struct fm_lease_view *view)
{
    uint32_t place = strlen(name) == FM_LEASE_TOKEN_BYTES ? place_of(t, name) : FM_LEASE_NONE;
    if (place == FM_LEASE_NONE)
        return false;
    struct fm_lease *l = &t->leases[place];
    *view = (struct fm_lease_view){.place = place, .door = door};
    view->generation = __atomic_load_n(&l->generation, __ATOMIC_SEQ_CST);
    if (!lives(view->generation) || !fm_lease_enter(t, view))
        return false;
    /* Inside, nothing changes.  But between the search and here the place could have been given to another lease. */
    uint64_t differs = 0;
    for (uint32_t w = 0; w < TOKEN_WORDS; w++) {
        uint64_t word;
        memcpy(&word, name + 8 * w, 8);
        differs |= word ^ __atomic_load_n(&l->token[w], __ATOMIC_RELAXED);
    }
    view->offset = __atomic_load_n(&l->offset, __ATOMIC_RELAXED);
    view->bytes = __atomic_load_n(&l->bytes, __ATOMIC_RELAXED);
    fm_lease_leave(t, view);
    return differs == 0;
}

/* First counted, then looked: the control plane first ends the lease, then looks at the count.  One of both sees the other. */
bool fm_lease_enter(struct fm_lease_table *t, const struct fm_lease_view *view)
{
    struct fm_lease *l = &t->leases[view->place];
    __atomic_add_fetch(&l->in_flight[view->door], 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&l->generation, __ATOMIC_SEQ_CST) == view->generation ||
        (t->defects & FM_LEASE_DEFECT_NO_GENERATION) != 0)
        return true;
    fm_lease_leave(t, view);
    return false;
}

void fm_lease_leave(struct fm_lease_table *t, const struct fm_lease_view *view)
{
    uint64_t left = __atomic_sub_fetch(&t->leases[view->place].in_flight[view->door], 1, __ATOMIC_SEQ_CST);
    fm_assert(left != UINT64_MAX);
}

/* As with the end of a lease: the door counts itself in, then looks here; the control plane pins, then looks at the count. */
bool fm_lease_is_pinned(const struct fm_lease_table *t, const struct fm_lease_view *view)
{
    return __atomic_load_n(&t->leases[view->place].pinned, __ATOMIC_SEQ_CST) != 0 &&
           (t->defects & FM_LEASE_DEFECT_PUNCH_PINNED) == 0;
}
