/* discards dontneed|free [ROUNDS [evict]]: pages are thrown away by their owners while
 * other threads read them.  Each page has one owner, which writes a new generation,
 * lets it be evicted or not, and discards it.  What may be seen is exact:
 *  - not being changed: the last generation written, or zeros if discarded since
 *    (after MADV_FREE: the old generation or zeros, until written);
 *  - while being changed: zeros or a generation not yet known to be gone;
 *  - once MADV_DONTNEED has returned: zeros, never an old generation;
 *  - a page written after MADV_FREE keeps, for ever, what it had at that moment.
 * With "evict", most pages that were written after MADV_FREE must get evicted again: a page
 * that is taken for an empty one stays for ever, beyond the budget. */
#include "safety.h"

#define PAGES (4096ul / SHRINK)
#define OWNERS 2
#define READERS 2
#define RUN_MAX 64ul

static uint64_t *words;
static bool lazily;     /* MADV_FREE */
static bool must_evict;
static long rounds;
static atomic_int done;
static _Atomic size_t away_total, away_after_free, freed;
static struct {
    _Atomic uint32_t version; /* odd while the owner is changing the page */
    _Atomic uint32_t now;     /* the generation in it, 0: zeros */
    _Atomic uint32_t oldest;  /* no older generation may be seen any more */
    _Atomic uint32_t newest;  /* being written, or written last */
    atomic_bool quiet;        /* its owner wants it evicted: readers leave it alone */
} book[PAGES];

static bool plausible(size_t page, uint64_t got, size_t index, uint32_t oldest)
{
    for (uint32_t g = oldest; g <= atomic_load(&book[page].newest); g++)
        if (g != 0 && got == word_at(g, index))
            return true;
    return got == 0;
}

static void look(size_t page, uint64_t *state)
{
    uint32_t version = atomic_load(&book[page].version);
    uint32_t oldest = atomic_load(&book[page].oldest), now = atomic_load(&book[page].now);
    for (int i = 0; i < 16; i++) {
        size_t index = page * PAGE_WORDS + random_next(state) % PAGE_WORDS;
        uint64_t got = ((volatile uint64_t *)words)[index];
        uint64_t want = now == 0 ? 0 : word_at(now, index);
        if (!plausible(page, got, index, oldest))
            wrong("discarded page, seen by a reader", &words[index], want, got);
        if (version % 2 == 0 && version == atomic_load(&book[page].version) && got != want)
            wrong("page at rest", &words[index], want, got);
    }
}

static void *reader(void *argument)
{
    uint64_t state = 31337 + (uintptr_t)argument;
    while (!atomic_load(&done)) {
        for (int i = 0; i < 16; i++) {
            size_t page = random_next(&state) % PAGES;
            if (!atomic_load(&book[page].quiet))
                look(page, &state);
        }
        pause_us(100);
    }
    return NULL;
}

static size_t rest(size_t first, size_t count, unsigned sweeps)
{
    for (size_t p = first; p < first + count; p++)
        atomic_store(&book[p].quiet, true);
    size_t away = pressure_until_away(words + first * PAGE_WORDS, count * PAGE, sweeps);
    for (size_t p = first; p < first + count; p++)
        atomic_store(&book[p].quiet, false);
    return away;
}

static void begin(size_t first, size_t count)
{
    for (size_t p = first; p < first + count; p++)
        atomic_fetch_add(&book[p].version, 1);
}

static void finish(size_t first, size_t count, uint32_t now, uint32_t oldest)
{
    for (size_t p = first; p < first + count; p++) {
        atomic_store(&book[p].now, now);
        atomic_store(&book[p].oldest, oldest);
        atomic_fetch_add(&book[p].version, 1);
    }
}

static void write_generation(size_t first, size_t count, uint32_t generation)
{
    begin(first, count);
    for (size_t p = first; p < first + count; p++) {
        atomic_store(&book[p].newest, generation);
        fill_from(words + p * PAGE_WORDS, PAGE, generation, p * PAGE_WORDS);
    }
    finish(first, count, generation, generation);
}

static void drop_now(size_t first, size_t count, uint32_t generation)
{
    uint64_t *at = words + first * PAGE_WORDS;
    begin(first, count);
    CHECK(madvise(at, count * PAGE, MADV_DONTNEED) == 0);
    verify_zero(at, count * PAGE, "after MADV_DONTNEED");
    finish(first, count, 0, generation + 1);
}

/* What a page has after MADV_FREE and a write to its first word, it keeps. */
static void keep_after_free(size_t page, uint32_t generation, bool *old)
{
    volatile uint64_t *at = words + page * PAGE_WORDS;
    at[0] = word_at(generation, page * PAGE_WORDS);
    *old = at[1] != 0;
    for (size_t i = 1; i < PAGE_WORDS; i++) {
        uint64_t want = *old ? word_at(generation, page * PAGE_WORDS + i) : 0;
        if (at[i] != want)
            wrong("page written after MADV_FREE", (const void *)&at[i], want, at[i]);
    }
}

static void drop_lazily(size_t first, size_t count, uint32_t generation)
{
    uint64_t *at = words + first * PAGE_WORDS;
    bool old[RUN_MAX], again;
    begin(first, count); /* a page that may turn to zeros at any time is being changed */
    CHECK(madvise(at, count * PAGE, MADV_FREE) == 0);
    for (size_t i = 0; i < count; i++)
        keep_after_free(first + i, generation, &old[i]);
    atomic_fetch_add(&freed, count);
    if (must_evict)
        pause_us(2500000);    /* the engine lets a freed page leave only when its zap, if one is due, must be over */
    atomic_fetch_add(&away_after_free, rest(first, count, must_evict ? 4 : 1));
    for (size_t i = 0; i < count; i++) {
        keep_after_free(first + i, generation, &again);
        if (again != old[i])
            die("page %zu written after MADV_FREE had %s, now has %s: wrong byte", first + i,
                old[i] ? "old words" : "zeros", again ? "old words" : "zeros");
    }
    for (size_t i = 0; i < count; i++)
        fill_from(at + i * PAGE_WORDS, PAGE, generation, (first + i) * PAGE_WORDS);
    finish(first, count, generation, generation);
}

static void *owner(void *argument)
{
    size_t me = (size_t)argument, share = PAGES / OWNERS;
    uint64_t state = 4711 + me;
    for (long round = 0; round < rounds; round++) {
        size_t count = 1 + random_next(&state) % RUN_MAX;
        size_t first = me * share + random_next(&state) % (share - count);
        uint32_t generation = (uint32_t)(2 * (round * OWNERS + (long)me) + 1); /* only ever grows */
        write_generation(first, count, generation);
        if (round % 4 == 0)
            atomic_fetch_add(&away_total, rest(first, count, 2));
        for (size_t p = first; round % 4 < 2 && p < first + count; p++)
            verify_from(words + p * PAGE_WORDS, PAGE, generation, p * PAGE_WORDS, "own page");
        if (lazily)
            drop_lazily(first, count, generation);
        else
            drop_now(first, count, generation);
        if (round % 3 == 0)
            write_generation(first, count, generation + 1);
    }
    return NULL;
}

int main(int argc, char **argv)
{
    CHECK(argc > 1);
    lazily = strcmp(argv[1], "free") == 0;
    rounds = number(argc, argv, 2, lazily ? 16 : 60);
    must_evict = argc > 3;
    words = map(PAGES * PAGE);
    pressure_start(BALLAST_BYTES);
    pressure_wait(1);
    pthread_t owners[OWNERS], readers[READERS];
    for (size_t i = 0; i < READERS; i++)
        CHECK(pthread_create(&readers[i], NULL, reader, (void *)i) == 0);
    for (size_t i = 0; i < OWNERS; i++)
        CHECK(pthread_create(&owners[i], NULL, owner, (void *)i) == 0);
    for (size_t i = 0; i < OWNERS; i++)
        CHECK(pthread_join(owners[i], NULL) == 0);
    atomic_store(&done, 1);
    for (size_t i = 0; i < READERS; i++)
        CHECK(pthread_join(readers[i], NULL) == 0);
    pressure_stop();
    for (size_t p = 0; p < PAGES; p++) {
        uint32_t now = atomic_load(&book[p].now);
        if (now == 0)
            verify_zero(words + p * PAGE_WORDS, PAGE, "at the end");
        else
            verify_from(words + p * PAGE_WORDS, PAGE, now, p * PAGE_WORDS, "at the end");
    }
    if (must_evict && lazily && atomic_load(&away_after_free) < atomic_load(&freed) / 2)
        die("of %zu pages written after MADV_FREE only %zu were evicted", freed, away_after_free);
    printf("ok away=%zu away_after_free=%zu\n", away_total, away_after_free);
    return 0;
}
