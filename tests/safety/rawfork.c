/* rawfork WAY [ROUNDS]: a child made past fork(), with no fork handlers of libc's. By a function
 * of libc's (`_Fork`, `clone`, `syscall` with fork, clone or clone3) it must read its parent's
 * memory. By the program's own system call instruction (`inline`) what it reads must be right,
 * or it must die by a signal; it must never read zeros. Its parent's memory must not care. */
#include <linux/sched.h>
#include <sched.h>

#include "safety.h"

#define BYTES (32 * MIB / SHRINK)
#define STACK_BYTES (256 * 1024)

static char *memory;
static uint64_t seed;

static int look(void *arg)
{
    (void)arg;
    syscall(SYS_setitimer, 0, &(struct { long v[4]; }){{0, 0, 30, 0}}, NULL);
    const volatile uint64_t *words = (const volatile uint64_t *)(void *)memory;
    for (size_t i = 0; i < BYTES / 8; i++)
        if (words[i] != word_at(seed, i))
            syscall(SYS_exit_group, words[i] == 0 ? 3 : 4);
    syscall(SYS_exit_group, 0);
    return 0;
}

static long inline_clone(void)
{
    long pid;
    register long r10 __asm__("r10") = 0;
    register long r8 __asm__("r8") = 0;
    __asm__ volatile("syscall"
                     : "=a"(pid)
                     : "a"(SYS_clone), "D"(SIGCHLD), "S"(0l), "d"(0l), "r"(r10), "r"(r8)
                     : "rcx", "r11", "memory");
    return pid;
}

extern pid_t _Fork(void);

static long make_child(const char *way)
{
    static char stack[STACK_BYTES] __attribute__((aligned(16)));
    struct clone_args args = {.exit_signal = SIGCHLD};
    if (strcmp(way, "_Fork") == 0)
        return _Fork();
    if (strcmp(way, "clone") == 0)
        return clone(look, stack + STACK_BYTES, SIGCHLD, NULL);
    if (strcmp(way, "syscall-fork") == 0)
        return syscall(SYS_fork);
    if (strcmp(way, "syscall-clone") == 0)
        return syscall(SYS_clone, (unsigned long)SIGCHLD, NULL, NULL, NULL, 0ul);
    if (strcmp(way, "syscall-clone3") == 0)
        return syscall(SYS_clone3, &args, sizeof args);
    return inline_clone();
}

int main(int argc, char **argv)
{
    const char *way = argc > 1 ? argv[1] : "inline";
    bool may_die = strcmp(way, "inline") == 0;
    size_t away = 0;
    long died = 0, rounds = number(argc, argv, 2, 4);
    memory = map(BYTES);
    pressure_start(BALLAST_BYTES);
    for (long round = 0; round < rounds; round++) {
        seed = (uint64_t)round + 1;
        fill(memory, BYTES, seed);
        away += pressure_until_away(memory, BYTES / 2, 3);
        long pid = make_child(way);
        CHECK(pid >= 0);
        if (pid == 0)
            look(NULL);
        int status;
        CHECK(waitpid((pid_t)pid, &status, 0) == pid);
        if (WIFEXITED(status) && WEXITSTATUS(status) != 0)
            die("child by %s: wrong byte (%s)", way, WEXITSTATUS(status) == 3 ? "zeros" : "others");
        if (WIFSIGNALED(status) && (!may_die || WTERMSIG(status) == SIGALRM))
            die("child by %s: signal %d", way, WTERMSIG(status));
        died += WIFSIGNALED(status);
        verify(memory, BYTES, seed, "parent");
    }
    pressure_stop();
    printf("ok away=%zu died=%ld\n", away, died);
    return 0;
}
