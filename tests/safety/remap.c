/* remap grow|move|fixed|dontunmap|storm [ROUNDS]: memory that mremap takes elsewhere.
 * What was in it must be at the new address, what is new must be zeros, and where it was
 * nothing of it may be left (with MREMAP_DONTUNMAP: zeros).  Pages are evicted before
 * they are moved, so that the engine has to take its own book-keeping along. */
#include "safety.h"

#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4
#endif
#define BYTES (6 * MIB)

static _Atomic size_t away_total;
static long rounds;

static void *remap(void *old, size_t old_bytes, size_t new_bytes, int flags, void *target)
{
    void *p = mremap(old, old_bytes, new_bytes, flags, target);
    if (p == MAP_FAILED)
        die("mremap of %p to %zu bytes, flags %d: %s", old, new_bytes, flags, strerror(errno));
    return p;
}

static char *filled(uint64_t seed)
{
    char *p = map(BYTES);
    fill(p, BYTES, seed);
    atomic_fetch_add(&away_total, pressure_until_away(p, BYTES, 2));
    return p;
}

/* Growing where it is: the kernel tells nobody of it. */
static void grow(uint64_t seed)
{
    char *p = map(2 * BYTES);
    CHECK(munmap(p + BYTES, BYTES) == 0);
    fill(p, BYTES, seed);
    atomic_fetch_add(&away_total, pressure_until_away(p, BYTES, 2));
    CHECK(mremap(p, BYTES, 2 * BYTES, 0) == p);
    verify_zero(p + BYTES, BYTES, "grown part");
    verify(p, BYTES, seed, "part that was there");
    fill_from(p + BYTES, BYTES, seed, BYTES / 8);
    atomic_fetch_add(&away_total, pressure_until_away(p, 2 * BYTES, 2));
    verify(p, 2 * BYTES, seed, "grown");
    CHECK(mremap(p, 2 * BYTES, BYTES / 2, 0) == p);
    verify(p, BYTES / 2, seed, "shrunk");
    CHECK(mremap(p, BYTES / 2, BYTES, 0) == p);
    verify_zero(p + BYTES / 2, BYTES / 2, "grown again after shrinking");
    verify(p, BYTES / 2, seed, "after growing again");
    CHECK(munmap(p, BYTES) == 0);
}

static void move(uint64_t seed)
{
    char *p = filled(seed);
    char *wall = mmap(p + BYTES, PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    char *q = remap(p, BYTES, 2 * BYTES, MREMAP_MAYMOVE, NULL);
    verify(q, BYTES, seed, "moved");
    verify_zero(q + BYTES, BYTES, "grown while moved");
    fill(q, 2 * BYTES, seed + 1);
    /* Where it was there may be something new: zeros. */
    char *r = mmap(p, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    if (r == p) {
        verify_zero(r, BYTES, "mapped where it was");
        fill(r, BYTES, seed + 2);
    }
    atomic_fetch_add(&away_total, pressure_until_away(q, 2 * BYTES, 2));
    verify(q, 2 * BYTES, seed + 1, "moved, then rewritten");
    if (r == p)
        verify(r, BYTES, seed + 2, "new, where it was");
    if (r != MAP_FAILED)
        munmap(r, BYTES);
    if (wall != MAP_FAILED)
        munmap(wall, PAGE);
    CHECK(munmap(q, 2 * BYTES) == 0);
}

/* To a place of our choice, over other memory, evicted too. */
static void fixed(uint64_t seed)
{
    char *p = filled(seed), *target = filled(seed + 1);
    char *q = remap(p, BYTES, BYTES, MREMAP_MAYMOVE | MREMAP_FIXED, target);
    CHECK(q == target);
    verify(q, BYTES, seed, "moved over other memory");
    atomic_fetch_add(&away_total, pressure_until_away(q, BYTES, 2));
    verify(q, BYTES, seed, "moved over other memory, later");
    /* A part from the middle, to the middle of something else. */
    char *other = filled(seed + 2);
    remap(q + MIB, MIB, MIB, MREMAP_MAYMOVE | MREMAP_FIXED, other + 2 * MIB);
    verify_from(other + 2 * MIB, MIB, seed, MIB / 8, "part moved");
    verify(other, 2 * MIB, seed + 2, "below the part");
    verify_from(other + 3 * MIB, BYTES - 3 * MIB, seed + 2, 3 * MIB / 8, "above the part");
    verify(q, MIB, seed, "below the hole");
    verify_from(q + 2 * MIB, BYTES - 2 * MIB, seed, 2 * MIB / 8, "above the hole");
    CHECK(munmap(q, BYTES) == 0 && munmap(other, BYTES) == 0);
}

static void dontunmap(uint64_t seed)
{
    char *p = filled(seed);
    char *q = mremap(p, BYTES, BYTES, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL);
    if (q == MAP_FAILED)
        unsupported("MREMAP_DONTUNMAP");
    verify(q, BYTES, seed, "moved, old mapping kept");
    verify_zero(p, BYTES, "old mapping, kept");
    fill(p, BYTES, seed + 1);
    atomic_fetch_add(&away_total, pressure_until_away(p, BYTES, 2));
    atomic_fetch_add(&away_total, pressure_until_away(q, BYTES, 1));
    verify(q, BYTES, seed, "moved, old mapping kept, later");
    verify(p, BYTES, seed + 1, "old mapping, rewritten");
    CHECK(munmap(p, BYTES) == 0 && munmap(q, BYTES) == 0);
}

/* What programs do: growing and shrinking big blocks by realloc, several threads at once. */
static void *storm(void *argument)
{
    size_t me = (size_t)argument, bytes = 0;
    uint64_t state = 555 + me;
    char *p = NULL;
    for (long round = 0; round < rounds * 8; round++) {
        size_t wanted = MIB + random_next(&state) % 1024 * PAGE;
        size_t kept = bytes < wanted ? bytes : wanted;
        p = realloc(p, wanted);
        CHECK(p != NULL);
        verify(p, kept, 1000 + me, "reallocated");
        fill_from(p + kept, wanted - kept, 1000 + me, kept / 8);
        bytes = wanted;
        if (round % 8 == 7)
            pressure_wait(1);
    }
    verify(p, bytes, 1000 + me, "reallocated, at the end");
    free(p);
    return NULL;
}

static void storms(uint64_t seed)
{
    pthread_t ids[4];
    (void)seed;
    for (size_t i = 0; i < 4; i++)
        CHECK(pthread_create(&ids[i], NULL, storm, (void *)i) == 0);
    for (size_t i = 0; i < 4; i++)
        CHECK(pthread_join(ids[i], NULL) == 0);
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*run)(uint64_t seed);
    } modes[] = {{"grow", grow}, {"move", move}, {"fixed", fixed}, {"dontunmap", dontunmap}, {"storm", storms}};
    CHECK(argc > 1);
    rounds = number(argc, argv, 2, 3);
    for (size_t i = 0; i < sizeof modes / sizeof *modes; i++) {
        if (strcmp(modes[i].name, argv[1]) != 0)
            continue;
        pressure_start(BALLAST_BYTES);
        pressure_wait(2);
        for (long round = 0; round < (modes[i].run == storms ? 1 : rounds); round++)
            modes[i].run(10 * (uint64_t)round + 1);
        pressure_stop();
        printf("ok away=%zu\n", away_total);
        return 0;
    }
    die("no such mode: %s", argv[1]);
}
