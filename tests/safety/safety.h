/* safety.h - what the small programs of the safety tests share.
 *
 * Every word of memory has one right value, a function of a seed and its place, and
 * it is never zero: so zeros, old bytes and another page's bytes all show.  Memory is
 * made short by a ballast bigger than the budget, which a thread of its own keeps
 * sweeping.  Nothing here knows that it is being paged: by itself each program simply
 * succeeds.  Only bounded waits: a program that hangs is itself a finding.
 */
#ifndef SAFETY_H
#define SAFETY_H

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096ul
#define PAGE_WORDS (PAGE / 8)
#define MIB (1024ul * 1024)
#define UNSUPPORTED 77

/* Smaller sizes, for a machine that is many times slower (tests/guest); the budget is smaller then, too. */
#ifndef SHRINK
#define SHRINK 1
#endif
#ifndef BALLAST_MIB
#define BALLAST_MIB 64
#endif
#define BALLAST_BYTES (BALLAST_MIB * MIB)

/* Ends the process at once and says why; async-signal-safe enough for its use here. */
__attribute__((format(printf, 1, 2), noreturn)) static inline void die(const char *format, ...)
{
    char text[400];
    va_list arguments;
    va_start(arguments, format);
    int used = vsnprintf(text, sizeof text - 1, format, arguments);
    va_end(arguments);
    if (used < 0 || used > (int)sizeof text - 2)
        used = sizeof text - 2;
    text[used++] = '\n';
    if (write(2, text, (size_t)used) < 0)
        _exit(2);
    _exit(1);
}

/* The kernel can't do here what the test needs: a skip, with its reason. */
__attribute__((noreturn)) static inline void unsupported(const char *why)
{
    printf("not possible here: %s (%s)\n", why, strerror(errno));
    fflush(stdout);
    _exit(UNSUPPORTED);
}

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition))                                                                          \
            die("%s:%d: %s: %s", __FILE__, __LINE__, #condition, strerror(errno));                 \
    } while (0)

/* The right value of word `index` under `seed`; never zero. */
static inline uint64_t word_at(uint64_t seed, uint64_t index)
{
    uint64_t x = (index + 1) * 0x9e3779b97f4a7c15ull + seed * 0xbf58476d1ce4e5b9ull;
    x ^= x >> 31;
    return x | 1;
}

static inline uint64_t random_next(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static inline void *map(size_t bytes)
{
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED)
        die("mmap of %zu bytes: %s", bytes, strerror(errno));
    return p;
}

static inline void fill_from(void *memory, size_t bytes, uint64_t seed, uint64_t first)
{
    uint64_t *words = memory;
    for (size_t i = 0; i < bytes / 8; i++)
        words[i] = word_at(seed, first + i);
}

static inline void fill(void *memory, size_t bytes, uint64_t seed)
{
    fill_from(memory, bytes, seed, 0);
}

__attribute__((noreturn)) static inline void wrong(const char *what, const void *at, uint64_t want, uint64_t got)
{
    die("%s: wrong byte at %p, want %016" PRIx64 ", got %016" PRIx64, what, at, want, got);
}

static inline void verify_from(const void *memory, size_t bytes, uint64_t seed, uint64_t first, const char *what)
{
    const volatile uint64_t *words = memory;
    for (size_t i = 0; i < bytes / 8; i++) {
        uint64_t got = words[i];
        if (got != word_at(seed, first + i))
            wrong(what, (const void *)&words[i], word_at(seed, first + i), got);
    }
}

static inline void verify(const void *memory, size_t bytes, uint64_t seed, const char *what)
{
    verify_from(memory, bytes, seed, 0, what);
}

static inline void verify_zero(const void *memory, size_t bytes, const char *what)
{
    const volatile uint64_t *words = memory;
    for (size_t i = 0; i < bytes / 8; i++) {
        uint64_t got = words[i];
        if (got != 0)
            wrong(what, (const void *)&words[i], 0, got);
    }
}

static inline void pause_us(long us)
{
    struct timespec t = {us / 1000000, us % 1000000 * 1000};
    nanosleep(&t, NULL);
}

/* ---- making memory short -------------------------------------------------------- */

#define BALLAST_PAGES_MAX 65536

static struct {
    uint64_t *ballast;
    size_t pages;
    _Atomic uint64_t sweeps;
    atomic_int stop;
    pthread_t thread;
    uint32_t written[BALLAST_PAGES_MAX]; /* which sweep wrote the page last */
} pressure __attribute__((unused));

static inline void pressure_page(size_t page, uint32_t sweep)
{
    volatile uint64_t *words = pressure.ballast + page * PAGE_WORDS;
    uint64_t head = words[0], tail = words[PAGE_WORDS - 1];
    uint32_t last = pressure.written[page];
    uint64_t want_head = last == 0 ? 0 : word_at(last, page);
    if (head != want_head)
        wrong("ballast", (const void *)words, want_head, head);
    if (tail != want_head)
        wrong("ballast, end of page", (const void *)&words[PAGE_WORDS - 1], want_head, tail);
    words[0] = words[PAGE_WORDS - 1] = word_at(sweep, page);
    pressure.written[page] = sweep;
}

static inline void *pressure_run(void *unused)
{
    (void)unused;
    for (uint32_t sweep = 1; !atomic_load(&pressure.stop); sweep++) {
        for (size_t page = 0; page < pressure.pages && !atomic_load(&pressure.stop); page++)
            pressure_page(page, sweep);
        atomic_fetch_add(&pressure.sweeps, 1);
    }
    return NULL;
}

/* How many of the pages are here.  mincore counts page table entries, as the engine sees them. */
static inline size_t pages_here(const void *memory, size_t bytes)
{
    unsigned char seen[1024];
    size_t here = 0, pages = bytes / PAGE;
    for (size_t i = 0; i < pages; i += sizeof seen) {
        size_t n = pages - i < sizeof seen ? pages - i : sizeof seen;
        if (mincore((char *)(uintptr_t)memory + i * PAGE, n * PAGE, seen) != 0)
            return pages;
        for (size_t k = 0; k < n; k++)
            here += seen[k] & 1;
    }
    return here;
}

/* From here on everything that isn't touched again soon will have to go. */
static inline void pressure_start(size_t bytes)
{
    sigset_t all, before;
    pressure.pages = bytes / PAGE;
    CHECK(pressure.pages <= BALLAST_PAGES_MAX);
    pressure.ballast = map(bytes);
    atomic_store(&pressure.stop, 0);
    atomic_store(&pressure.sweeps, 0);
    memset(pressure.written, 0, sizeof pressure.written);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    CHECK(pthread_create(&pressure.thread, NULL, pressure_run, NULL) == 0);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    /* Nobody says how soon an engine must notice. Alone, nothing is ever away: not for long. */
    for (int i = 0; i < 250; i++) {
        if (atomic_load(&pressure.sweeps) > 0 && pages_here(pressure.ballast, bytes) < pressure.pages)
            break;
        pause_us(1000);
    }
}

static inline void pressure_stop(void)
{
    atomic_store(&pressure.stop, 1);
    CHECK(pthread_join(pressure.thread, NULL) == 0);
    munmap(pressure.ballast, pressure.pages * PAGE);
}

/* Returns when the ballast has been swept `sweeps` times more. */
static inline void pressure_wait(unsigned sweeps)
{
    uint64_t until = atomic_load(&pressure.sweeps) + sweeps;
    while (atomic_load(&pressure.sweeps) < until)
        pause_us(500);
}

/* Waits until the memory has been evicted, for `sweeps` sweeps at most (alone, nothing
 * ever is).  Returns how many pages are away. */
static inline size_t pressure_until_away(const void *memory, size_t bytes, unsigned sweeps)
{
    uint64_t until = atomic_load(&pressure.sweeps) + sweeps;
    size_t here;
    while ((here = pages_here(memory, bytes)) > 0 && atomic_load(&pressure.sweeps) < until)
        pause_us(500);
    return bytes / PAGE - here;
}

/* Waits for a child, and ends as failed if it did not end well. */
static inline void reap_ok(pid_t pid, const char *what)
{
    int status;
    while (waitpid(pid, &status, 0) < 0)
        if (errno != EINTR)
            die("%s: waitpid: %s", what, strerror(errno));
    if (WIFSIGNALED(status))
        die("%s: the child died by signal %d", what, WTERMSIG(status));
    if (WEXITSTATUS(status) != 0)
        die("%s: the child ended with %d", what, WEXITSTATUS(status));
}

static inline long number(int argc, char **argv, int position, long otherwise)
{
    return argc > position ? strtol(argv[position], NULL, 0) : otherwise;
}

#endif
