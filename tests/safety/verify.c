/* verify [THREADS [MIB [ROUNDS]]]: threads read and write, in order and at random,
 * memory that they share and memory of their own, and check every word that they meet;
 * at the end every word of everything is checked.  The plainest use of memory there
 * is: whatever is wrong anywhere shows here. */
#include "safety.h"

static uint64_t *common_words; /* written once, read by all */
static uint64_t *own_words;    /* a part for each thread, rewritten a page at a time */
static size_t own_bytes, common_bytes;
static long rounds;

static void check_page(const uint64_t *page, uint64_t seed, uint64_t first, const char *what)
{
    verify_from(page, PAGE, seed, first, what);
}

/* Reads a page at random out of the memory that all share. */
static void read_common(uint64_t *state)
{
    size_t page = random_next(state) % (common_bytes / PAGE);
    check_page(common_words + page * PAGE_WORDS, 7, page * PAGE_WORDS, "shared page");
}

/* A page of our own: what we wrote last must be in it; then something new is. */
static void rewrite(uint64_t *mine, uint32_t *seeds, size_t page, bool write_it)
{
    uint64_t *words = mine + page * PAGE_WORDS;
    check_page(words, seeds[page], page * PAGE_WORDS, "own page");
    if (write_it) {
        seeds[page]++;
        fill_from(words, PAGE, seeds[page], page * PAGE_WORDS);
    }
}

static void *work(void *argument)
{
    size_t me = (size_t)argument, pages = own_bytes / PAGE;
    uint64_t *mine = own_words + me * (own_bytes / 8), state = 88172645463325252ull + me;
    uint32_t *seeds = calloc(pages, sizeof *seeds);
    CHECK(seeds != NULL);
    for (size_t page = 0; page < pages; page++) {
        seeds[page] = (uint32_t)(me * 1000 + 1);
        fill_from(mine + page * PAGE_WORDS, PAGE, seeds[page], page * PAGE_WORDS);
    }
    for (long round = 0; round < rounds; round++) {
        for (size_t page = 0; page < pages; page++)
            rewrite(mine, seeds, page, (page + (size_t)round) % 3 != 0);
        for (size_t i = 0; i < pages / 2; i++) {
            rewrite(mine, seeds, random_next(&state) % pages, i % 2 == 0);
            read_common(&state);
        }
    }
    for (size_t page = 0; page < pages; page++)
        rewrite(mine, seeds, page, false);
    free(seeds);
    return NULL;
}

int main(int argc, char **argv)
{
    long threads = number(argc, argv, 1, 4), mib = number(argc, argv, 2, 96);
    rounds = number(argc, argv, 3, 3);
    CHECK(threads >= 1 && threads <= 64 && mib >= 4 && rounds >= 0);
    common_bytes = (size_t)mib * MIB / 3;
    common_bytes -= common_bytes % PAGE;
    own_bytes = ((size_t)mib * MIB - common_bytes) / (size_t)threads;
    own_bytes -= own_bytes % PAGE;
    common_words = map(common_bytes);
    own_words = map(own_bytes * (size_t)threads);
    fill(common_words, common_bytes, 7);
    pthread_t ids[64];
    for (long i = 0; i < threads; i++)
        CHECK(pthread_create(&ids[i], NULL, work, (void *)i) == 0);
    for (long i = 0; i < threads; i++)
        CHECK(pthread_join(ids[i], NULL) == 0);
    verify(common_words, common_bytes, 7, "shared pages at the end");
    puts("ok");
    return 0;
}
