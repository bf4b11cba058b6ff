/* test_poison.c - what becomes of a touched page that can't be had where the kernel has no UFFDIO_POISON (before 6.6).
 *
 * The program is ended; but not while an event is still to be read, because that may explain the page: it was moved or
 * unmapped, and nothing is wrong.  The ioctl would have said so; without it the engine must ask in another way.
 */
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "engine/engine.h"
#include "engine/uffd_api.h"
#include "engine_stubs.h"

#define EXIT_ENDED 9
#define BYTES (64 * FM_PAGE_BYTES)

static char *map(void)
{
    void *p = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(p != MAP_FAILED);
    return p;
}

static void *discard(void *memory)
{
    CHECK(madvise(memory, BYTES, MADV_DONTNEED) == 0);
    return NULL;
}

/* Reads the one event that is to come, as the engine's reader would. */
static void read_event(void)
{
    struct uffd_msg m;
    while (read(fm.uffd, &m, sizeof m) != (ssize_t)sizeof m)
        CHECK(errno == EAGAIN);
    CHECK(m.event == UFFD_EVENT_REMOVE);
}

static int ended_only_when_nothing_explains_the_page(void)
{
    static struct fm_control control;
    pthread_t thread;
    char *memory = map();
    uint64_t page = (uint64_t)memory / FM_PAGE_BYTES;
    control.userfaultfd_way = FM_UFFD_SYSCALL;
    fm.control = &control;
    fm.frames = map();
    if (!fm_uffd_open() || !fm_uffd_register((uint64_t)fm.frames, (uint64_t)fm.frames + BYTES) ||
        !fm_uffd_register((uint64_t)memory, (uint64_t)memory + BYTES))
        return EXIT_UNSUPPORTED;
    fm.core.can_poison = false;
    CHECK(pthread_create(&thread, NULL, discard, memory) == 0);
    while (!fm_uffd_changing())
        usleep(1000);
    CHECK(fm_engine_ops.poison(NULL, page) == FM_AGAIN);
    read_event();
    CHECK(pthread_join(thread, NULL) == 0);
    status_when_ended = EXIT_ENDED;
    fm_engine_ops.poison(NULL, page);
    return 1;                        /* it came back: a thread that touched the page would wait for ever */
}

int main(void)
{
    int status;
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0)
        _exit(ended_only_when_nothing_explains_the_page());
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status));
    if (WEXITSTATUS(status) == EXIT_UNSUPPORTED) {
        printf("no userfaultfd to be had here: %s\n", strerror(errno));
        return EXIT_UNSUPPORTED;
    }
    CHECK(WEXITSTATUS(status) == EXIT_ENDED);
    return 0;
}
