/* blocked_end exit|exec|wait: threads that wait for pages which are far away when the end
 * comes: by exit_group, by exec, or (wait) from outside: it says "ready" and goes on. No
 * thread that sleeps in a fault may keep the process, or the engine, from ending. */
#include "safety.h"

#define BYTES (48 * MIB)
#define THREADS 12

static char *memory;
static _Atomic size_t touched;

static void *toucher(void *argument)
{
    uint64_t state = 5 + (uintptr_t)argument;
    for (;;) {
        size_t page = random_next(&state) % (BYTES / PAGE);
        verify_from(memory + page * PAGE, PAGE, 1, page * PAGE_WORDS, "before the end");
        atomic_fetch_add(&touched, 1);
    }
    return NULL;
}

int main(int argc, char **argv)
{
    CHECK(argc > 1);
    pthread_t id;
    memory = map(BYTES);
    fill(memory, BYTES, 1);
    for (size_t i = 0; i < THREADS; i++)
        CHECK(pthread_create(&id, NULL, toucher, (void *)i) == 0);
    alarm(60);
    while (atomic_load(&touched) < 4 * THREADS)
        pause_us(1000);
    puts("ready");
    fflush(stdout);
    if (strcmp(argv[1], "exec") == 0) {
        execl("/bin/echo", "echo", "ok", (char *)NULL);
        die("exec: %s", strerror(errno));
    }
    if (strcmp(argv[1], "exit") == 0) {
        puts("ok");
        fflush(stdout);
        syscall(SYS_exit_group, 0);
    }
    for (;;)
        pause();
}
