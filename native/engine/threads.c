/* threads.c - the engine's threads and its memory, both without libc.
 *
 * A libc thread would be counted by libc (the last pthread_exit would never end the process), would have its
 * control block on the program's heap, and would take part in fork.  A raw one has a small control block
 * of ours, so that a stray access to TLS hits our memory and not the program's.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <linux/sched.h>
#include <poll.h>
#include <signal.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>

#include "engine/engine.h"
#include "engine/slice.h"
#include "fm_assert.h"

#define HEAP_STEP (2ull << 20)
#define KEEPER_GRACE_MS 2000

struct start {
    void (*run)(void *);
    void *arg;
};

static char stacks[FM_THREADS_FEW][FM_STACK_BYTES] __attribute__((aligned(4096)));
static char *more_stacks[FM_THREADS_MAX - FM_THREADS_FEW];       /* from the heap: only a pool on many servers needs them */

uint64_t fm_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);     /* the vDSO's: no state, no lock */
    return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

void fm_sleep_ns(uint64_t ns)
{
    struct timespec t = { .tv_sec = (time_t)(ns / 1000000000ull), .tv_nsec = (long)(ns % 1000000000ull) };
    fm_sys(SYS_nanosleep, &t, NULL);
}

void fm_futex_wait(uint32_t *word, uint32_t seen, int64_t timeout_ns)
{
    struct timespec t = { .tv_sec = timeout_ns / 1000000000, .tv_nsec = timeout_ns % 1000000000 };
    fm_sys(SYS_futex, word, FUTEX_WAIT_PRIVATE, seen, timeout_ns < 0 ? NULL : &t);
}

void fm_futex_wake(uint32_t *word, int n) { fm_sys(SYS_futex, word, FUTEX_WAKE_PRIVATE, n); }

static void run_thread(struct start *s)
{
    fm_sys(SYS_prctl, PR_SET_NAME, "farmem");
    fm_run_soon();
    s->run(s->arg);
    fm_sys(SYS_exit, 0);
    __builtin_unreachable();
}

/* clone() with a new stack: the child finds what to run on top of it. */
static long clone_on(unsigned long flags, char *stack_top, void *tls)
{
    long r;
    register long r10 __asm__("r10") = 0;
    register void *r8 __asm__("r8") = tls;
    __asm__ volatile("syscall\n\t"
                     "test %%rax, %%rax\n\t"
                     "jnz 1f\n\t"
                     "xor %%ebp, %%ebp\n\t"
                     "pop %%rdi\n\t"
                     "pop %%rax\n\t"
                     "call *%%rax\n\t"
                     "ud2\n"
                     "1:"
                     : "=a"(r)
                     : "a"(SYS_clone), "D"(flags), "S"(stack_top), "d"(0), "r"(r10), "r"(r8)
                     : "rcx", "r11", "memory");
    return r;
}

static long thread_on(unsigned long flags, char *stack, void (*run)(void *), void *arg)
{
    /* From the bottom: the control block (TLS lies below it), then the stack, then what to run. */
    char *tcb = stack + 4096;
    struct start *s = (struct start *)(stack + FM_STACK_BYTES - 64);
    uint64_t *top = (uint64_t *)(stack + FM_STACK_BYTES - 128);
    *(void **)tcb = tcb;
    *(void **)(tcb + 16) = tcb;
    *s = (struct start){ run, arg };
    top[0] = (uint64_t)s;
    top[1] = (uint64_t)run_thread;
    return clone_on(flags | CLONE_SETTLS, (char *)top, tcb);
}

/* Of the thread with this number, for good; NULL: there can be no more. */
static char *stack_of(uint32_t k)
{
    if (k < FM_THREADS_FEW || k >= FM_THREADS_MAX)
        return k < FM_THREADS_FEW ? stacks[k] : NULL;
    char **stack = &more_stacks[k - FM_THREADS_FEW];
    if (*stack == NULL)
        *stack = fm_heap_take(FM_STACK_BYTES);
    return *stack;
}

bool fm_thread_start(void (*run)(void *), void *arg)
{
    uint64_t all = ~0ull, old = 0;
    char *stack = stack_of(__atomic_fetch_add(&fm.threads, 1, __ATOMIC_RELAXED));
    if (stack == NULL)
        return false;
    if ((fm.early_defects & FM_DEFECT_OPEN_SIGNALS) == 0)
        fm_sys(SYS_rt_sigprocmask, SIG_BLOCK, &all, &old, 8);
    long r = thread_on(CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM, stack, run, arg);
    if ((fm.early_defects & FM_DEFECT_OPEN_SIGNALS) == 0)
        fm_sys(SYS_rt_sigprocmask, SIG_SETMASK, &old, NULL, 8);
    return r > 0;
}

/* In the child of a fork none of the parent's threads exist, and their stacks may be used again. */
void fm_threads_reset(void) { fm.threads = 0; }

/* ---- the keeper: holds the userfaultfd when there is no supervisor any more --------------------------- */

static struct {
    int pidfd, read_end, write_end;
} keeper;

static void keeper_main(void *arg)
{
    struct pollfd p[2] = { { .fd = keeper.pidfd, .events = POLLIN }, { .fd = keeper.read_end, .events = POLLIN } };
    (void)arg;
    fm_sys(SYS_setsid);                     /* not to be killed with the program's process group */
    fm_sys(SYS_close, keeper.write_end);
    while (fm_sys(SYS_poll, p, 2, -1) == -EINTR)
        continue;
    /* The engine's descriptors are closed when the process ends or executes something else.  It may still be writing
     * if it ends; if it lives on, we must not hold the memory of what it was. */
    while (p[0].revents == 0 && fm_sys(SYS_poll, p, 1, KEEPER_GRACE_MS) == -EINTR)
        continue;
    fm_sys(SYS_exit_group, 0);
}

/* A process that shares our memory and nothing else, and waits until ours has gone: while it holds the last copy of the
 * userfaultfd, a write that the dying program had begun still gets its bytes. */
void fm_keeper_start(void)
{
    if (fm.keeper)
        return;
    int ends[2];
    long pidfd = fm_sys(SYS_pidfd_open, fm_sys(SYS_getpid), 0);
    char *stack = stack_of(__atomic_fetch_add(&fm.threads, 1, __ATOMIC_RELAXED));
    fm.keeper = true;                       /* or it was tried, at least */
    if (pidfd < 0 || stack == NULL || fm_sys(SYS_pipe2, ends, O_CLOEXEC) != 0)
        return;
    keeper.pidfd = (int)pidfd;
    keeper.read_end = ends[0];
    keeper.write_end = ends[1];
    thread_on(CLONE_VM, stack, keeper_main, NULL);
}

/* ---- memory ---------------------------------------------------------------------------------------- */

bool fm_heap_open(void)
{
    /* Address space only: 32 bytes of it are used for each page that is managed. */
    for (uint64_t bytes = 16ull << 30; bytes >= 64ull << 20; bytes /= 4) {
        long r = fm_sys(SYS_mmap, NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (r < 0 && r > -4096)
            continue;
        fm.heap = fm.heap_next = fm.heap_ready = (char *)r;
        fm.heap_end = fm.heap + bytes;
        return true;
    }
    return false;
}

void *fm_heap_take(uint64_t bytes)
{
    void *p = NULL;
    bytes = (bytes + 4095) & ~4095ull;
    fm_lock_take(&fm.heap_lock);
    uint64_t need = fm.heap_next + bytes > fm.heap_ready ? (uint64_t)(fm.heap_next + bytes - fm.heap_ready) : 0;
    need = (need + HEAP_STEP - 1) / HEAP_STEP * HEAP_STEP;
    if (fm.heap_ready + need <= fm.heap_end &&
        (need == 0 || fm_sys(SYS_mprotect, fm.heap_ready, need, PROT_READ | PROT_WRITE) == 0)) {
        fm.heap_ready += need;
        p = fm.heap_next;
        fm.heap_next += bytes;
        if (fm.proc != NULL)
            fm_add(fm.proc->counters.engine_bytes, bytes);
    }
    fm_lock_drop(&fm.heap_lock);
    return p;
}

/* Addresses are not used again: there are plenty, and only the memory matters. */
void fm_heap_give(void *p, uint64_t bytes)
{
    bytes = (bytes + 4095) & ~4095ull;
    fm_sys(SYS_madvise, p, bytes, MADV_DONTNEED);
    if (fm.proc != NULL)
        __atomic_sub_fetch(&fm.proc->counters.engine_bytes, bytes, __ATOMIC_RELAXED);
}

/* The linker's words for where this library begins and ends in memory. */
extern char __ehdr_start[] __attribute__((visibility("hidden")));
extern char _end[] __attribute__((visibility("hidden")));

bool fm_own_span(uint32_t k, uint64_t *start, uint64_t *end)
{
    switch (k) {
    case 0:
        *start = (uint64_t)__ehdr_start & ~(uint64_t)(FM_PAGE_BYTES - 1);
        *end = ((uint64_t)_end + FM_PAGE_BYTES - 1) & ~(uint64_t)(FM_PAGE_BYTES - 1);
        return true;
    case 1:
        *start = (uint64_t)fm.heap;
        *end = (uint64_t)fm.heap_end;
        return true;
    case 2:
        *start = (uint64_t)fm.frames;
        *end = fm.frames != NULL ? *start + (uint64_t)FM_FRAMES * FM_PAGE_BYTES : 0;
        return true;
    default:
        return false;
    }
}

bool fm_own_memory(uint64_t page)
{
    uint64_t at = page * FM_PAGE_BYTES, start, end;
    for (uint32_t k = 0; fm_own_span(k, &start, &end); k++)
        if (at >= start && at < end)
            return true;
    return false;
}
