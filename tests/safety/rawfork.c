/* rawfork: a child made by the clone system call itself, which no fork handler sees. What
 * it reads of its parent's memory must be right, or it must die by a signal; it must never
 * read zeros. Its parent's memory must not care. */
#include "safety.h"

#define BYTES (32 * MIB)

int main(int argc, char **argv)
{
    char *memory = map(BYTES);
    size_t away = 0;
    long died = 0, rounds = number(argc, argv, 1, 4);
    pressure_start(BALLAST_BYTES);
    for (long round = 0; round < rounds; round++) {
        uint64_t seed = (uint64_t)round + 1;
        fill(memory, BYTES, seed);
        away += pressure_until_away(memory, BYTES / 2, 3);
        long pid = syscall(SYS_clone, (unsigned long)SIGCHLD, NULL, NULL, NULL, 0ul);
        CHECK(pid >= 0);
        if (pid == 0) {
            syscall(SYS_setitimer, 0, &(struct { long v[4]; }){{0, 0, 30, 0}}, NULL);
            const volatile uint64_t *words = (const volatile uint64_t *)(void *)memory;
            for (size_t i = 0; i < BYTES / 8; i++)
                if (words[i] != word_at(seed, i))
                    syscall(SYS_exit_group, words[i] == 0 ? 3 : 4);
            syscall(SYS_exit_group, 0);
        }
        int status;
        CHECK(waitpid((pid_t)pid, &status, 0) == pid);
        if (WIFEXITED(status) && WEXITSTATUS(status) != 0)
            die("child of a raw clone: wrong byte (%s)", WEXITSTATUS(status) == 3 ? "zeros" : "others");
        if (WIFSIGNALED(status) && WTERMSIG(status) == SIGALRM)
            die("child of a raw clone: neither right bytes nor death, it hangs");
        died += WIFSIGNALED(status);
        verify(memory, BYTES, seed, "parent");
    }
    pressure_stop();
    printf("ok away=%zu died=%ld\n", away, died);
    return 0;
}
