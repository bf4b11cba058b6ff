/* words.c - several threads fill memory with words, change them, hand the parts
 * on to each other, and verify every word.  It looks at all bytes that farmem could
 * have got wrong, where other programs look at most of them.
 *
 *     words MIB THREADS ROUNDS
 *
 * Each word is a function of its place and of how often it was changed.  In each
 * round a thread takes over the part of its neighbour, half of the rounds backwards
 * and a page at a time, verifies it and changes it.  One part is a heap of small
 * blocks from malloc, because that is where most programs keep their memory.
 */
#include <inttypes.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#define THREADS_MAX 16u
#define PAGE_WORDS 512u
#define BLOCK_WORDS 40u
#define HEAP_SHARE 4u /* one part in so many is a heap of small blocks */

struct worker {
    pthread_t thread;
    unsigned index;
    uint64_t bad, sum;
};

static unsigned threads, rounds;
static size_t part_words, heap_blocks;
static uint64_t *memory;
static uint64_t **heaps[THREADS_MAX];
static struct worker workers[THREADS_MAX];
static pthread_barrier_t barrier;

static inline uint64_t word_at(uint64_t place, uint64_t round)
{
    uint64_t x = place * UINT64_C(0x9e3779b97f4a7c15) + round * UINT64_C(0xbf58476d1ce4e5b9);
    return (x ^ (x >> 29)) * UINT64_C(0x94d049bb133111eb) + 1;
}

/* Verify one run of words against the last round, and write this round's. */
static void turn(struct worker *w, uint64_t *words, size_t count, uint64_t place, unsigned round)
{
    for (size_t i = 0; i < count; i++) {
        uint64_t want = round == 0 ? 0 : word_at(place + i, round - 1);
        w->bad += words[i] != want;
        words[i] = word_at(place + i, round);
        w->sum += words[i];
    }
}

static void turn_part(struct worker *w, unsigned part, unsigned round)
{
    uint64_t place = (uint64_t)part * part_words;
    size_t pages = part_words / PAGE_WORDS;
    for (size_t i = 0; i < pages; i++) {
        size_t page = round % 2 ? pages - 1 - i : i;
        turn(w, memory + place + page * PAGE_WORDS, PAGE_WORDS, place + page * PAGE_WORDS, round);
    }
}

static void turn_heap(struct worker *w, unsigned part, unsigned round)
{
    uint64_t base = UINT64_C(1) << (40 + part);
    for (size_t i = 0; i < heap_blocks; i++) {
        if (round == 0)
            heaps[part][i] = calloc(BLOCK_WORDS, sizeof(uint64_t));
        if (!heaps[part][i]) {
            w->bad++;
            return;
        }
        turn(w, heaps[part][i], BLOCK_WORDS, base + i * BLOCK_WORDS, round);
    }
}

static void *work(void *argument)
{
    struct worker *w = argument;
    for (unsigned round = 0; round < rounds; round++) {
        unsigned part = (w->index + round) % threads;
        turn_part(w, part, round);
        turn_heap(w, part, round);
        pthread_barrier_wait(&barrier);
    }
    return NULL;
}

static int run(uint64_t mib)
{
    uint64_t heap_bytes = mib * (1u << 20) / HEAP_SHARE, flat_bytes = mib * (1u << 20) - heap_bytes;
    part_words = flat_bytes / 8 / threads / PAGE_WORDS * PAGE_WORDS;
    heap_blocks = heap_bytes / 8 / threads / BLOCK_WORDS;
    memory = mmap(NULL, flat_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || pthread_barrier_init(&barrier, NULL, threads) != 0)
        return 2;
    for (unsigned i = 0; i < threads; i++) {
        heaps[i] = calloc(heap_blocks, sizeof(uint64_t *));
        if (!heaps[i])
            return 2;
    }
    for (unsigned i = 0; i < threads; i++) {
        workers[i].index = i;
        if (pthread_create(&workers[i].thread, NULL, work, &workers[i]) != 0)
            return 2;
    }
    uint64_t bad = 0, sum = 0;
    for (unsigned i = 0; i < threads; i++) {
        pthread_join(workers[i].thread, NULL);
        bad += workers[i].bad;
        sum += workers[i].sum;
    }
    printf("%s bad=%" PRIu64 " sum=%016" PRIx64 "\n", bad ? "WRONG" : "ok", bad, sum);
    return bad ? 1 : 0;
}

int main(int argc, char **argv)
{
    uint64_t mib = argc == 4 ? strtoull(argv[1], NULL, 10) : 0;
    threads = argc == 4 ? (unsigned)strtoul(argv[2], NULL, 10) : 0;
    rounds = argc == 4 ? (unsigned)strtoul(argv[3], NULL, 10) : 0;
    if (mib == 0 || threads == 0 || threads > THREADS_MAX || rounds == 0) {
        fprintf(stderr, "usage: words MIB THREADS ROUNDS (at most %u threads)\n", THREADS_MAX);
        return 2;
    }
    return run(mib);
}
