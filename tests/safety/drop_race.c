/* drop_race move|over [ROUNDS]: another page comes to lie where one is just being evicted.
 * A piece of memory is watched until its first page has left; at that moment, with the others on their way out, the
 * piece is replaced: by another that is moved onto it (move), or by a new mapping that a second
 * thread writes to as soon as it sees it (over).  What is there now was never evicted, and must hold what it held. */
#include "safety.h"

#define THREADS 2
#define PAGES 256
#define BYTES (PAGES * PAGE)
#define SWEEPS 3

static long rounds;
static bool over;
static _Atomic size_t away_total;

/* The old piece holds no zeros, so who reads one sees the new mapping. */
struct writer {
    uint64_t *volatile at;
    atomic_int done, stop;
    uint64_t seed;
};

static void *write_when_new(void *argument)
{
    struct writer *w = argument;
    while (!atomic_load(&w->stop)) {
        uint64_t *words = w->at;
        /* It keeps the last page here, and so sees the new mapping at once. */
        if (words == NULL) {
            pause_us(20);
            continue;
        }
        if (*(volatile uint64_t *)&words[BYTES / 8 - PAGE_WORDS] != 0)
            continue;
        for (size_t page = 0; page < PAGES; page++)
            fill_from(words + page * PAGE_WORDS, PAGE, w->seed, page * PAGE_WORDS);
        w->at = NULL;
        atomic_store(&w->done, 1);
    }
    return NULL;
}

static bool first_has_left(const char *p)
{
    uint64_t until = atomic_load(&pressure.sweeps) + SWEEPS;
    while (atomic_load(&pressure.sweeps) < until)
        if (pages_here(p, PAGE) == 0)
            return true;
    return false;
}

static void replace_by_moving(char *p, uint64_t seed)
{
    char *q = map(BYTES);
    fill(q, BYTES, seed + 1);
    if (first_has_left(p))
        atomic_fetch_add(&away_total, 1);
    CHECK(mremap(q, BYTES, BYTES, MREMAP_MAYMOVE | MREMAP_FIXED, p) == p);
    verify(p, BYTES, seed + 1, "moved to where pages were leaving");
}

static void replace_by_mapping(char *p, uint64_t seed, struct writer *w)
{
    atomic_store(&w->done, 0);
    w->seed = seed + 1;
    w->at = (uint64_t *)p;
    if (first_has_left(p))
        atomic_fetch_add(&away_total, 1);
    CHECK(mmap(p, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == p);
    while (!atomic_load(&w->done))
        pause_us(20);
    verify(p, BYTES, seed + 1, "mapped and written where pages were leaving");
}

static void *race(void *argument)
{
    struct writer w = {.at = NULL};
    pthread_t id;
    CHECK(!over || pthread_create(&id, NULL, write_when_new, &w) == 0);
    for (long round = 0; round < rounds; round++) {
        uint64_t seed = 10 * (uint64_t)round + 1000000 * (size_t)argument + 1;
        char *p = map(BYTES);
        fill(p, BYTES, seed);
        if (over)
            replace_by_mapping(p, seed, &w);
        else
            replace_by_moving(p, seed);
        /* Some time later as well: what is lost is not always lost at once. */
        if (round % 4 == 3)
            pressure_wait(1);
        verify(p, BYTES, seed + 1, "replaced, later");
        CHECK(munmap(p, BYTES) == 0);
    }
    atomic_store(&w.stop, 1);
    CHECK(!over || pthread_join(id, NULL) == 0);
    return NULL;
}

int main(int argc, char **argv)
{
    pthread_t ids[THREADS];
    CHECK(argc > 1);
    over = strcmp(argv[1], "over") == 0;
    if (!over && strcmp(argv[1], "move") != 0)
        die("no such mode: %s", argv[1]);
    rounds = number(argc, argv, 2, 10);
    pressure_start(BALLAST_BYTES);
    pressure_wait(2);
    for (size_t i = 0; i < THREADS; i++)
        CHECK(pthread_create(&ids[i], NULL, race, (void *)i) == 0);
    for (size_t i = 0; i < THREADS; i++)
        CHECK(pthread_join(ids[i], NULL) == 0);
    pressure_stop();
    printf("ok away=%zu\n", away_total);
    return 0;
}
