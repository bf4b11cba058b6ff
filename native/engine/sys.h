/* sys.h - system calls without libc: no errno, no TLS, no cancellation points.
 *
 * The engine's threads have no thread control block of libc's, so nothing of libc that keeps state may be
 * called on them.  Results are the kernel's own: negative errno on failure.
 */
#ifndef FM_SYS_H
#define FM_SYS_H

#include <stdint.h>
#include <sys/syscall.h>

#ifndef __x86_64__
#error "farmem's engine knows the system call convention of x86-64 only"
#endif

static inline long fm_sys6(long n, long a, long b, long c, long d, long e, long f)
{
    long r;
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    register long r9 __asm__("r9") = f;
    __asm__ volatile("syscall" : "=a"(r) : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9) : "rcx", "r11", "memory");
    return r;
}

#define FM_SYS_PICK(_0, _1, _2, _3, _4, _5, _6, name, ...) name
#define fm_sys(...) FM_SYS_PICK(__VA_ARGS__, FM_SYS_6, FM_SYS_5, FM_SYS_4, FM_SYS_3, FM_SYS_2, FM_SYS_1, FM_SYS_0)(__VA_ARGS__)
#define FM_SYS_0(n) fm_sys6(n, 0, 0, 0, 0, 0, 0)
#define FM_SYS_1(n, a) fm_sys6(n, (long)(a), 0, 0, 0, 0, 0)
#define FM_SYS_2(n, a, b) fm_sys6(n, (long)(a), (long)(b), 0, 0, 0, 0)
#define FM_SYS_3(n, a, b, c) fm_sys6(n, (long)(a), (long)(b), (long)(c), 0, 0, 0)
#define FM_SYS_4(n, a, b, c, d) fm_sys6(n, (long)(a), (long)(b), (long)(c), (long)(d), 0, 0)
#define FM_SYS_5(n, a, b, c, d, e) fm_sys6(n, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), 0)
#define FM_SYS_6(n, a, b, c, d, e, f) fm_sys6(n, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), (long)(f))

#ifndef SYS_close_range
#define SYS_close_range 436
#endif
#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif

uint64_t fm_now_ns(void);
void fm_sleep_ns(uint64_t ns);

#endif
