/* vm_writev [ROUNDS]: another process writes into this one's memory with
 * process_vm_writev while pages go and come.  Each page has a counter that only the other
 * process raises and one that only we raise; both must end where they should, and theirs
 * must never go back.  Many pages a call, in an order that pays no heed to the evictor's. */
#include "safety.h"
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/uio.h>

#define BYTES (24 * MIB)
#define PAGES (BYTES / PAGE)
#define BATCH 256
#define PIN_US 20

/* ---- the outsider: made by fork before there is any memory to speak of ---- */

/* What it writes lies in pages that are missing each time, and that somebody fetches slowly: while the
 * kernel waits for one, the page it is to be written into is pinned. Without that a pin would be over in a
 * microsecond, and no evictor would ever meet one. */
static struct {
    char *pages;
    int uffd;
    _Atomic uint64_t value;
} source;

static void *fetch_slowly(void *unused)
{
    static uint64_t page[PAGE_WORDS] __attribute__((aligned(PAGE)));
    struct uffd_msg m;
    (void)unused;
    while (read(source.uffd, &m, sizeof m) == sizeof m) {
        usleep(PIN_US);
        page[0] = atomic_load(&source.value);
        struct uffdio_copy copy = {
            .dst = m.arg.pagefault.address & ~(uint64_t)(PAGE - 1),
            .src = (uint64_t)(uintptr_t)page,
            .len = PAGE,
        };
        ioctl(source.uffd, UFFDIO_COPY, &copy);
    }
    return NULL;
}

static int open_userfaultfd(void)
{
    long fd = syscall(SYS_userfaultfd, O_CLOEXEC);
    int device = fd < 0 ? open("/dev/userfaultfd", O_RDWR | O_CLOEXEC) : -1;
    return fd >= 0 ? (int)fd : ioctl(device, _IO(0xAA, 0x00), O_CLOEXEC);
}

static void source_open(void)
{
    pthread_t thread;
    struct uffdio_api api = {.api = UFFD_API};
    source.pages = map(BATCH * PAGE);
    source.uffd = open_userfaultfd();
    struct uffdio_register r = {
        .range = {(uint64_t)(uintptr_t)source.pages, BATCH * PAGE},
        .mode = UFFDIO_REGISTER_MODE_MISSING,
    };
    CHECK(source.uffd >= 0 && ioctl(source.uffd, UFFDIO_API, &api) == 0);
    CHECK(ioctl(source.uffd, UFFDIO_REGISTER, &r) == 0);
    CHECK(pthread_create(&thread, NULL, fetch_slowly, NULL) == 0);
}

static void outsider(pid_t target, int commands, int answers)
{
    uint64_t base, value;
    struct iovec from[BATCH], to[BATCH];
    source_open();
    if (read(commands, &base, 8) != 8)
        _exit(0);
    while (read(commands, &value, 8) == 8) {
        atomic_store(&source.value, value);
        for (size_t start = 0; start < PAGES; start += BATCH) {
            CHECK(madvise(source.pages, BATCH * PAGE, MADV_DONTNEED) == 0);
            for (size_t i = 0; i < BATCH; i++) {
                size_t page = (start + i) * 2654435761u % PAGES; /* odd: every page once */
                from[i] = (struct iovec){source.pages + i * PAGE, 8};
                to[i] = (struct iovec){(void *)(uintptr_t)(base + page * PAGE), 8};
            }
            ssize_t put = process_vm_writev(target, from, BATCH, to, BATCH, 0);
            if (put != BATCH * 8)
                die("process_vm_writev: %s", put < 0 ? strerror(errno) : "short");
        }
        CHECK(write(answers, &value, 8) == 8);
    }
    _exit(0);
}

/* Looks at every page while the outsider is at it: theirs may be this round's or the
 * last one's; ours is what we wrote. */
static void visit(volatile uint64_t *words, uint64_t round, uint64_t ours)
{
    for (size_t page = 0; page < PAGES; page++) {
        volatile uint64_t *at = words + page * PAGE_WORDS;
        uint64_t theirs = at[0];
        if (theirs != round && theirs != round - 1)
            wrong("counter written from outside", (const void *)at, round - 1, theirs);
        if (at[1] != ours)
            wrong("our own counter", (const void *)&at[1], ours, at[1]);
        at[1] = ours + 1;
    }
}

int main(int argc, char **argv)
{
    uint64_t rounds = (uint64_t)number(argc, argv, 1, 4), answer;
    int commands[2], answers[2];
    CHECK(PAGES % BATCH == 0 && pipe(commands) == 0 && pipe(answers) == 0);
    pid_t me = getpid(), child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        close(commands[1]);
        outsider(me, commands[0], answers[1]);
    }
    prctl(PR_SET_PTRACER, child, 0, 0, 0);
    close(commands[0]);
    uint64_t *words = map(BYTES);
    for (size_t page = 0; page < PAGES; page++)
        words[page * PAGE_WORDS + 2] = word_at(5, page);
    uint64_t base = (uint64_t)(uintptr_t)words, ours = 0;
    CHECK(write(commands[1], &base, 8) == 8);
    pressure_start(BALLAST_BYTES);
    pressure_wait(2);
    for (uint64_t round = 1; round <= rounds; round++) {
        CHECK(write(commands[1], &round, 8) == 8);
        visit(words, round, ours++);
        CHECK(read(answers[0], &answer, 8) == 8 && answer == round);
        for (size_t page = 0; page < PAGES; page++) {
            if (words[page * PAGE_WORDS] != round)
                wrong("counter after the round", &words[page * PAGE_WORDS], round, words[page * PAGE_WORDS]);
            if (words[page * PAGE_WORDS + 2] != word_at(5, page))
                wrong("pattern", &words[page * PAGE_WORDS + 2], word_at(5, page), words[page * PAGE_WORDS + 2]);
        }
    }
    close(commands[1]);
    reap_ok(child, "outsider");
    pressure_stop();
    puts("ok");
    return 0;
}
