/* raw_fork.c - children that are made past fork(): _Fork(), clone() and syscall().
 *
 * libc runs no fork handlers there, so we run ours: the child gets its memory as after fork().  Only a system call
 * instruction of the program's own is beyond us; its child has MADV_DONTFORK for managed memory and ends with SIGSEGV.
 * Here is also libc's syscall(), because it is one function for all of that.
 */
#include <dlfcn.h>
#include <sched.h>
#include <stdarg.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "engine/engine.h"
#include "preload/preload.h"

/* With the parent's memory, or while the parent waits, there is nothing to be given. */
static bool copies_memory(uint64_t flags) { return (flags & (CLONE_VM | CLONE_VFORK)) == 0; }

/* fork() of some libc may come by here with its handlers, ours among them, already run. */
static bool in_fork(void) { return fm.freeze != 0 && fm.fork_tid == (uint32_t)fm_sys(SYS_gettid); }

static bool watched(void) { return fm.state != FM_ENGINE_NONE && !in_fork(); }

/* Both sides of a child that was made by hand; r is the system call's result. */
static long made(long r)
{
    if (r == 0) {
        fm_fork_child();
        return 0;
    }
    if (r < 0)
        errno = (int)-r;       /* fm_fork_parent() tells from it that there is no child */
    fm_fork_parent();
    return fm_libc_result(r);
}

EXPORT pid_t _Fork(void)
{
    static pid_t (*real)(void);
    if (real == NULL)
        *(void **)&real = dlsym(RTLD_NEXT, "_Fork");
    if (!watched())
        return real != NULL ? real() : (pid_t)fm_libc_result(fm_sys(SYS_fork));
    fm_fork_prepare();
    pid_t pid = real != NULL ? real() : (pid_t)fm_libc_result(fm_sys(SYS_fork));
    return (pid_t)made(pid < 0 ? -errno : pid);
}

struct clone_start {
    int (*run)(void *);
    void *arg;
};

static int cloned(void *at)
{
    struct clone_start mine = *(struct clone_start *)at;    /* on the parent's stack, of which this is a copy */
    fm_fork_child();
    return mine.run(mine.arg);
}

EXPORT int clone(int (*run)(void *), void *stack, int flags, void *arg, ...)
{
    static int (*real)(int (*)(void *), void *, int, void *, ...);
    va_list rest;
    va_start(rest, arg);
    pid_t *parent_tid = va_arg(rest, pid_t *);
    void *tls = va_arg(rest, void *);
    pid_t *child_tid = va_arg(rest, pid_t *);
    va_end(rest);
    if (real == NULL)
        *(void **)&real = dlsym(RTLD_NEXT, "clone");
    if (run == NULL || !watched() || !copies_memory((uint64_t)flags))
        return real(run, stack, flags, arg, parent_tid, tls, child_tid);
    struct clone_start start = { run, arg };
    fm_fork_prepare();
    int pid = real(cloned, stack, flags, &start, parent_tid, tls, child_tid);
    return (int)made(pid < 0 ? -errno : pid);
}

/* ---- syscall() ------------------------------------------------------------------------------------------------ */

/* It must be libc's to the last instruction: a program may start a thread on a new stack through it, or share its
 * memory with a child, and then it returns without a frame of ours, or twice.  So: no frame, unless it is one of the
 * calls that matter, and then only after a look at what is asked for.  True: fm_syscall_forks() is to do it. */
__attribute__((used)) static bool fm_syscall_look(long number, uint64_t a, uint64_t b)
{
    const uint64_t *args = (const uint64_t *)a;       /* clone3: flags, ..., stack */
    switch (number) {
    case SYS_vmsplice:
    case SYS_io_uring_setup:
        fm_frames_are_shared();
        return false;
    case SYS_fork:
        return watched();
    case SYS_clone:
        return b == 0 && copies_memory(a) && watched();
    case SYS_clone3:
        return args != NULL && args[5] == 0 && copies_memory(args[0]) && watched();
    default:
        return false;
    }
}

__attribute__((used)) static long fm_syscall_forks(long number, long a, long b, long c, long d, long e, long f)
{
    fm_fork_prepare();
    return made(fm_sys(number, a, b, c, d, e, f));
}

__attribute__((used)) static long fm_syscall_failed(long r) { return fm_libc_result(r); }

#define KEEP(register) "pushq %" #register "\n.cfi_adjust_cfa_offset 8\n"
#define BACK(register) "popq %" #register "\n.cfi_adjust_cfa_offset -8\n"

__asm__(".text\n"
        ".globl syscall\n"
        ".type syscall, @function\n"
        "syscall:\n"
        ".cfi_startproc\n"
        "endbr64\n"
        "cmpq $56, %rdi\n"                    /* SYS_clone */
        "je 2f\n"
        "cmpq $57, %rdi\n"                    /* SYS_fork */
        "je 2f\n"
        "cmpq $278, %rdi\n"                   /* SYS_vmsplice */
        "je 2f\n"
        "cmpq $425, %rdi\n"                   /* SYS_io_uring_setup */
        "je 2f\n"
        "cmpq $435, %rdi\n"                   /* SYS_clone3 */
        "je 2f\n"
        "1: movq %rdi, %rax\n"
        "movq %rsi, %rdi\n"
        "movq %rdx, %rsi\n"
        "movq %rcx, %rdx\n"
        "movq %r8, %r10\n"
        "movq %r9, %r8\n"
        "movq 8(%rsp), %r9\n"
        "syscall\n"
        "cmpq $-4095, %rax\n"
        "jae 3f\n"
        "ret\n"
        "3: movq %rax, %rdi\n"
        "jmp fm_syscall_failed\n"
        "2: " KEEP(rdi) KEEP(rsi) KEEP(rdx) KEEP(rcx) KEEP(r8) KEEP(r9)
        "subq $8, %rsp\n"
        ".cfi_adjust_cfa_offset 8\n"
        "call fm_syscall_look\n"
        "addq $8, %rsp\n"
        ".cfi_adjust_cfa_offset -8\n"
        BACK(r9) BACK(r8) BACK(rcx) BACK(rdx) BACK(rsi) BACK(rdi)
        "testb %al, %al\n"
        "jz 1b\n"
        "jmp fm_syscall_forks\n"
        ".cfi_endproc\n"
        ".size syscall, .-syscall\n");
_Static_assert(SYS_clone == 56 && SYS_fork == 57 && SYS_vmsplice == 278 && SYS_io_uring_setup == 425 && SYS_clone3 == 435,
               "the numbers in syscall()");
