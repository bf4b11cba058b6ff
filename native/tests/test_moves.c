/* test_moves.c - the engine's move_out and move_in on this kernel, while page table entries change under them.
 *
 * What an operation says it did must be what was done: a page that left without being counted is a page lost.
 * Linux 6.18's UFFDIO_MOVE miscounts when an entry changes at the wrong moment, so one thread keeps changing them
 * (madvise(MADV_COLD) takes the accessed bits away).  With `believe_move` the count is not confirmed; it shows whether
 * this kernel has that defect, and that the test sees it.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "engine/engine.h"
#include "engine/uffd_api.h"
#include "engine_stubs.h"

#define PAGES 1024u
#define RUN_MAX 8u
#define SECONDS 6
#ifndef MADV_COLD
#define MADV_COLD 20
#endif

static char *memory;
static uint64_t ids, in_page[PAGES], in_frame[FM_FRAMES];     /* what is there; 0: nothing */
static atomic_bool stop;

static char *page_at(uint32_t p) { return memory + (size_t)p * FM_PAGE_BYTES; }
static char *frame_at(uint32_t f) { return fm.frames + (size_t)f * FM_PAGE_BYTES; }

static bool set_up(uint64_t defects)
{
    static struct fm_control control;
    control.defects = defects;
    control.userfaultfd_way = FM_UFFD_SYSCALL;
    fm.control = &control;
    memory = mmap(NULL, (size_t)PAGES * FM_PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    fm.frames = mmap(NULL, (size_t)FM_FRAMES * FM_PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    fm.pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (!fm_uffd_open() || (fm.features & FM_FEATURE_MOVE) == 0)
        return false;
    for (uint32_t p = 0; p < PAGES; p++)
        *(uint64_t *)page_at(p) = in_page[p] = ++ids;
    return fm_uffd_register((uint64_t)memory, (uint64_t)page_at(PAGES)) &&
           fm_uffd_register((uint64_t)fm.frames, (uint64_t)frame_at(FM_FRAMES));
}

static void *disturb(void *arg)
{
    (void)arg;
    while (!atomic_load(&stop)) {
        madvise(memory, (size_t)PAGES * FM_PAGE_BYTES, MADV_COLD);
        madvise(fm.frames, (size_t)FM_FRAMES * FM_PAGE_BYTES, MADV_COLD);
    }
    return NULL;
}

static uint32_t run(const uint64_t *from, const uint64_t *to, uint32_t want)
{
    uint32_t n = 0;
    while (n < want && from[n] != 0 && to[n] == 0)
        n++;
    return n;
}

/* Is each place filled, with what it should hold, or empty, as the books say? */
static bool as_booked(const char *what, const char *at, const uint64_t *book, uint32_t n)
{
    uint64_t bits[1];
    fm_engine_ops.present(NULL, (uint64_t)at / FM_PAGE_BYTES, n, bits);
    for (uint32_t k = 0; k < n; k++) {
        bool there = (bits[0] >> k & 1) != 0;
        uint64_t holds = there ? *(const volatile uint64_t *)(at + (size_t)k * FM_PAGE_BYTES) : 0;
        if (holds != book[k]) {
            printf("%s %u of %u holds %lu instead of %lu\n", what, k, n, (unsigned long)holds, (unsigned long)book[k]);
            return false;
        }
    }
    return true;
}

static bool one_move(uint32_t p, uint32_t f, uint32_t want, bool out)
{
    uint64_t *from = out ? &in_page[p] : &in_frame[f], *to = out ? &in_frame[f] : &in_page[p];
    uint32_t n = run(from, to, want), done = 0;
    if (n == 0)
        return true;
    uint64_t page = (uint64_t)page_at(p) / FM_PAGE_BYTES;
    /* Fresh accessed bits, for the other thread to take away. */
    for (uint32_t k = 0; k < n; k++)
        *(uint64_t *)(out ? page_at(p + k) : frame_at(f + k)) = from[k];
    enum fm_res r = out ? fm_engine_ops.move_out(NULL, page, f, n, &done) : fm_engine_ops.move_in(NULL, page, f, n, &done);
    for (uint32_t k = 0; k < done; k++) {
        to[k] = from[k];
        from[k] = 0;
    }
    if (done < n && r != FM_BUSY && r != FM_AGAIN) {
        printf("%s: %u of %u, then %d\n", out ? "out" : "in", done, n, (int)r);
        return false;
    }
    return as_booked("page", page_at(p), &in_page[p], n) && as_booked("frame", frame_at(f), &in_frame[f], n);
}

int main(int argc, char **argv)
{
    bool believe = argc > 1 && strcmp(argv[1], "believe_move") == 0;
    if (!set_up(believe ? FM_DEFECT_BELIEVE_MOVE : 0)) {
        printf("no UFFDIO_MOVE to be had here: %s\n", strerror(errno));
        return EXIT_UNSUPPORTED;
    }
    pthread_t thread;
    if (pthread_create(&thread, NULL, disturb, NULL) != 0)
        return 1;
    uint64_t until = fm_now_ns() + SECONDS * 1000000000ull, x = 88172645463325252ull, moves = 0;
    bool good = true;
    for (; good && (moves % 256 != 0 || fm_now_ns() < until); moves++) {
        x ^= x << 13, x ^= x >> 7, x ^= x << 17;      /* Marsaglia's xorshift64 */
        uint32_t want = 1 + (uint32_t)(x >> 50) % RUN_MAX;
        good = one_move((uint32_t)(x >> 8) % (PAGES - want), (uint32_t)(x >> 24) % (FM_FRAMES - want), want, (x >> 60 & 1) != 0);
    }
    atomic_store(&stop, true);
    pthread_join(thread, NULL);
    printf("%s after %lu moves\n", good ? "right" : "WRONG", (unsigned long)moves);
    fflush(stdout);
    _exit(good ? 0 : 1);
}
