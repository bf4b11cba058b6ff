/* grid.c - the program that `make bench` measures: it touches memory a page at a
 * time, in one pattern, and says how long an access took.
 *
 *     grid PATTERN MIB [PASSES]
 *
 * First every page is written once (the fill phase), so that the timed phase
 * meets pages that exist and, where memory is short, have been evicted.  Then the
 * pattern runs PASSES times over all pages with the clock on, and the result is
 * verified with the clock off.  One line of JSON goes to stdout.
 *
 * What a page holds matters to a pager that compresses.  All zeros would cost
 * nothing and pure noise can't be compressed at all, so each page draws its words
 * from a vocabulary of 64 pseudo-random words of its own: lz4 packs such a page to
 * less than half (ratio 2.2 page by page, as zram's mm_stat tells it), about what
 * the heaps of real programs give.  No two pages are alike.
 *
 * It knows nothing of farmem and must not: it is the unmodified program.
 */
#define _GNU_SOURCE
#include <inttypes.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define PAGE_BYTES 4096u
#define PAGE_WORDS (PAGE_BYTES / sizeof(uint64_t))
#define VOCABULARY_WORDS 64u
#define MIB_MAX (1u << 20)
#define PASSES_MAX 100000u
#define STRIDE_PAGES 7u

enum order { ORDER_SEQUENTIAL, ORDER_RANDOM, ORDER_STRIDE };

struct pattern {
    const char *name;
    enum order order;
    bool writes;
};

static const struct pattern patterns[] = {
    {"sequential-read", ORDER_SEQUENTIAL, false}, {"sequential-write", ORDER_SEQUENTIAL, true},
    {"random-read", ORDER_RANDOM, false},         {"random-write", ORDER_RANDOM, true},
    {"stride-read", ORDER_STRIDE, false},
};

/* A bijective mixer: cheap enough to stand in the timed loop. */
static inline uint64_t mix(uint64_t x)
{
    x = (x ^ (x >> 32)) * UINT64_C(0xd6e8feb86659fd93);
    x = (x ^ (x >> 32)) * UINT64_C(0xd6e8feb86659fd93);
    return x ^ (x >> 32);
}

static inline uint64_t read_word(uint64_t page)
{
    return mix(page + 1);
}

static inline uint64_t written_word(uint64_t page)
{
    return mix(page + 1) * 3 + 1;
}

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * UINT64_C(1000000000) + (uint64_t)t.tv_nsec;
}

static inline uint64_t next_page(enum order order, uint64_t i, uint64_t pages)
{
    if (order == ORDER_SEQUENTIAL)
        return i % pages;
    if (order == ORDER_STRIDE)
        return (i * STRIDE_PAGES) % pages;
    /* The high half of a product instead of a division: uniform, and fast. */
    return (uint64_t)(((unsigned __int128)mix(i * 2 + UINT64_C(0x9e3779b97f4a7c15)) * pages) >> 64);
}

/* Word 0 is what reads look at, word 1 what writes change. */
static void fill(uint64_t *memory, uint64_t pages)
{
    for (uint64_t page = 0; page < pages; page++) {
        uint64_t *word = memory + page * PAGE_WORDS;
        uint64_t vocabulary[VOCABULARY_WORDS];
        for (unsigned i = 0; i < VOCABULARY_WORDS; i++)
            vocabulary[i] = mix(page * VOCABULARY_WORDS + i + UINT64_C(0x5851f42d4c957f2d));
        uint64_t dice = mix(~page);
        for (unsigned i = 0; i < PAGE_WORDS; i++) {
            dice = dice * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
            word[i] = vocabulary[dice >> 58];
        }
        word[0] = read_word(page);
        word[1] = 0;
    }
}

static uint64_t run_reads(const volatile uint64_t *memory, uint64_t pages, enum order order,
                          uint64_t accesses)
{
    uint64_t sum = 0;
    for (uint64_t i = 0; i < accesses; i++)
        sum += memory[next_page(order, i, pages) * PAGE_WORDS];
    return sum;
}

static void run_writes(volatile uint64_t *memory, uint64_t pages, enum order order,
                       uint64_t accesses)
{
    for (uint64_t i = 0; i < accesses; i++) {
        uint64_t page = next_page(order, i, pages);
        memory[page * PAGE_WORDS + 1] = written_word(page);
    }
}

static uint64_t expected_sum(uint64_t pages, enum order order, uint64_t accesses)
{
    uint64_t sum = 0;
    for (uint64_t i = 0; i < accesses; i++)
        sum += read_word(next_page(order, i, pages));
    return sum;
}

/* Replays the pattern into a map of the pages that it wrote, then looks at all. */
static uint64_t count_bad_writes(const uint64_t *memory, uint64_t pages, enum order order,
                                 uint64_t accesses)
{
    uint64_t bad = 0;
    unsigned char *touched = calloc(pages, 1);
    if (!touched)
        return pages;
    for (uint64_t i = 0; i < accesses; i++)
        touched[next_page(order, i, pages)] = 1;
    for (uint64_t page = 0; page < pages; page++) {
        uint64_t want = touched[page] ? written_word(page) : 0;
        bad += memory[page * PAGE_WORDS + 1] != want || memory[page * PAGE_WORDS] != read_word(page);
    }
    free(touched);
    return bad;
}

static const struct pattern *find_pattern(const char *name)
{
    for (size_t i = 0; i < sizeof(patterns) / sizeof(patterns[0]); i++)
        if (strcmp(patterns[i].name, name) == 0)
            return &patterns[i];
    return NULL;
}

static uint64_t parse_count(const char *text, uint64_t limit)
{
    char *end;
    unsigned long long value = strtoull(text, &end, 10);
    return (*text == 0 || *end != 0 || value > limit) ? 0 : value;
}

static int measure(const struct pattern *p, uint64_t pages, uint64_t passes)
{
    uint64_t *memory = mmap(NULL, pages * PAGE_BYTES, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        perror("grid: mmap");
        return 1;
    }
    uint64_t start_ns = now_ns();
    fill(memory, pages);
    uint64_t filled_ns = now_ns();
    uint64_t accesses = pages * passes, sum = 0;
    if (p->writes)
        run_writes(memory, pages, p->order, accesses);
    else
        sum = run_reads(memory, pages, p->order, accesses);
    uint64_t done_ns = now_ns();

    uint64_t bad = p->writes ? count_bad_writes(memory, pages, p->order, accesses)
                             : sum != expected_sum(pages, p->order, accesses);
    printf("{\"pattern\": \"%s\", \"pages\": %" PRIu64 ", \"accesses\": %" PRIu64
           ", \"fill_ns\": %" PRIu64 ", \"timed_ns\": %" PRIu64 ", \"bad\": %" PRIu64 "}\n",
           p->name, pages, accesses, filled_ns - start_ns, done_ns - filled_ns, bad);
    if (bad) {
        fprintf(stderr, "grid: %s: wrong bytes\n", p->name);
        return 1;
    }
    return 0;
}

int main(int argc, char **argv)
{
    const struct pattern *p = argc >= 3 && argc <= 4 ? find_pattern(argv[1]) : NULL;
    uint64_t mib = p ? parse_count(argv[2], MIB_MAX) : 0;
    uint64_t passes = argc == 4 ? parse_count(argv[3], PASSES_MAX) : 1;
    if (!p || !mib || !passes) {
        fprintf(stderr, "usage: grid PATTERN MIB [PASSES]; PATTERN is one of:");
        for (size_t i = 0; i < sizeof(patterns) / sizeof(patterns[0]); i++)
            fprintf(stderr, " %s", patterns[i].name);
        fprintf(stderr, "\n");
        return 2;
    }
    return measure(p, mib * ((1u << 20) / PAGE_BYTES), passes);
}
