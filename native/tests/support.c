/* support.c - what the core asks of whoever links it, for the C tests: sleeping on a futex.
 * The simulator has its own, which lets another of its coroutines run instead. */
#include <linux/futex.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "lock.h"

__attribute__((weak)) void fm_futex_wait(uint32_t *word, uint32_t seen, int64_t timeout_ns)
{
    struct timespec t = { .tv_sec = timeout_ns / 1000000000, .tv_nsec = timeout_ns % 1000000000 };
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, seen, timeout_ns < 0 ? NULL : &t, NULL, 0);
}

__attribute__((weak)) void fm_futex_wake(uint32_t *word, int n)
{
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, n, NULL, NULL, 0);
}
