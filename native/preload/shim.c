/* shim.c - how the engine gets into a program: the constructor of the preloaded library, and a few calls that it watches.
 *
 * No allocator is interposed.  pthread_create is, to learn where a new thread's control block lies; the
 * calls after which others may read a page behind our back are, to see their first use; children that are made past
 * fork() are in raw_fork.c.
 */
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "engine/engine.h"
#include "fm_assert.h"
#include "preload/preload.h"

#define STARTS_MAX 1024u
#ifndef SO_ZEROCOPY
#define SO_ZEROCOPY 60
#endif
#define PTHREAD_BYTES 4096u       /* more than glibc's struct pthread */

struct fm_engine fm;

extern char __ehdr_start[] __attribute__((visibility("hidden")));

/* ---- joining the job ------------------------------------------------------------------------------------ */

static bool parse_token(const char *hex)
{
    for (uint32_t k = 0; k < FM_TOKEN_BYTES; k++) {
        uint8_t byte = 0;
        for (uint32_t j = 0; j < 2; j++) {
            const char *at = strchr("0123456789abcdef", hex[2 * k + j]);
            if (at == NULL || *at == 0)
                return false;
            byte = (uint8_t)(byte << 4 | (at - "0123456789abcdef"));
        }
        fm.token[k] = byte;
    }
    return hex[2 * FM_TOKEN_BYTES] == 0;
}

/* "NAME:TOKEN" */
static bool parse_job(const char *job)
{
    const char *colon = job != NULL ? strchr(job, ':') : NULL;
    if (colon == NULL || (size_t)(colon - job) >= sizeof fm.job_name || strlen(colon + 1) != 2 * FM_TOKEN_BYTES)
        return false;
    memcpy(fm.job_name, job, (size_t)(colon - job));
    return parse_token(colon + 1);
}

static const char *word_of(char **environment, const char *name)
{
    size_t n = strlen(name);
    for (char **e = environment; e != NULL && *e != NULL; e++)
        if (strncmp(*e, name, n) == 0 && (*e)[n] == '=')
            return *e + n + 1;
    return NULL;
}

/* Those defects of the tests that must be known before the control segment is there. */
static uint64_t early_defects(const char *names)
{
    uint64_t bits = 0;
    if (names == NULL)
        return 0;
    bits |= strstr(names, "share_descriptors") != NULL ? FM_DEFECT_SHARE_DESCRIPTORS : 0;
    bits |= strstr(names, "log_to_stderr") != NULL ? FM_DEFECT_LOG_TO_STDERR : 0;
    bits |= strstr(names, "open_signals") != NULL ? FM_DEFECT_OPEN_SIGNALS : 0;
    bits |= strstr(names, "ignore_fork") != NULL ? FM_DEFECT_IGNORE_FORK : 0;
    return bits;
}

static uint64_t static_tls_bytes(void)
{
    void (*info)(size_t *, size_t *) = (void (*)(size_t *, size_t *))(uintptr_t)dlsym(RTLD_DEFAULT, "_dl_get_tls_static_info");
    size_t bytes = 16 * FM_PAGE_BYTES, align;
    if (info != NULL)
        info(&bytes, &align);
    return bytes;
}

bool fm_join(const char *job, const char *defects)
{
    static bool has_handlers;
    if (!parse_job(job))
        return false;
    ssize_t n = readlink("/proc/self/exe", fm.exe, sizeof fm.exe - 1);
    fm.exe[n > 0 ? n : 0] = 0;
    fm.early_defects = early_defects(defects);
    fm.tls_bytes = static_tls_bytes();
    fm.state = FM_ENGINE_WATCHING;
    has_handlers = has_handlers || pthread_atfork(fm_fork_prepare_libc, fm_fork_parent, fm_fork_child) == 0;
    if (!has_handlers || !fm_thread_start(fm_watch_main, NULL))
        fm.state = FM_ENGINE_NONE;
    return fm.state != FM_ENGINE_NONE;
}

/* Are we in front of libc?  When the Python API has loaded us for its regions we are not, and the program's calls don't
 * come by here. */
static bool is_preloaded(void)
{
    Dl_info info;
    void *seen = dlsym(RTLD_DEFAULT, "pthread_create");
    return seen != NULL && dladdr(seen, &info) != 0 && info.dli_fbase == (void *)__ehdr_start;
}

/* The library is linked with -z initfirst, so this runs before any other's constructor and our fork handlers are the first
 * to be registered: the last to run before a fork, and the first in the child, where everybody else's handlers
 * would read zeros before ours.  It is so early that libc has not taken over the environment yet: no getenv(). */
__attribute__((constructor)) static void join(int argc, char **argv, char **environment)
{
    (void)argc;
    (void)argv;
    const char *job = word_of(environment, "FARMEM_JOB");
    if (job != NULL && is_preloaded())
        fm_join(job, word_of(environment, "FARMEM_TEST_DEFECTS"));
}

/* ---- threads ----------------------------------------------------------------------------------------------- */

struct thread_start {
    void *(*run)(void *);
    void *arg;
    uint32_t used;
};

/* Not from malloc: pthread_create must not allocate more in our presence than without us. */
static struct thread_start starts[STARTS_MAX];

static void *run_thread(void *at)
{
    struct thread_start *slot = at, mine = *slot;
    uint64_t tcb;
    __atomic_store_n(&slot->used, 0, __ATOMIC_RELEASE);
    __asm__("mov %%fs:0, %0" : "=r"(tcb));
    fm_keep_thread(tcb);
    return mine.run(mine.arg);
}

static struct thread_start *take_start(void)
{
    static uint32_t next;
    for (uint32_t k = 0; k < STARTS_MAX; k++) {
        struct thread_start *s = &starts[__atomic_fetch_add(&next, 1, __ATOMIC_RELAXED) % STARTS_MAX];
        uint32_t is_free = 0;
        if (__atomic_compare_exchange_n(&s->used, &is_free, 1, false, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED))
            return s;
    }
    return NULL;
}

EXPORT int pthread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*run)(void *), void *arg)
{
    static int (*real)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
    if (real == NULL)
        *(void **)&real = dlsym(RTLD_NEXT, "pthread_create");
    struct thread_start *s = fm.state != FM_ENGINE_NONE ? take_start() : NULL;
    if (s == NULL)
        return real(thread, attr, run, arg);
    s->run = run;
    s->arg = arg;
    int r = real(thread, attr, run_thread, s);
    if (r != 0)
        __atomic_store_n(&s->used, 0, __ATOMIC_RELEASE);
    return r;
}

/* ---- calls after which a page may be read by others when it has left the program --------------------------- */

/* Only the flag: this is the program's thread, which must hold no lock of the core's.  Frames that are free by now can
 * have no reader yet, and those that get free later are put aside by whoever frees them. */
void fm_frames_are_shared(void)
{
    if (fm.state != FM_ENGINE_NONE && (fm.core.defects & FM_DEFECT_REUSE_SHARED_FRAMES) == 0)
        __atomic_store_n(&fm.core.frames_shared, true, __ATOMIC_SEQ_CST);
}

EXPORT ssize_t vmsplice(int fd, const struct iovec *iov, size_t n, unsigned flags)
{
    fm_frames_are_shared();
    return fm_libc_result(fm_sys(SYS_vmsplice, fd, iov, n, flags));
}

EXPORT int setsockopt(int fd, int level, int name, const void *value, socklen_t bytes)
{
    if (level == SOL_SOCKET && name == SO_ZEROCOPY)
        fm_frames_are_shared();
    return (int)fm_libc_result(fm_sys(SYS_setsockopt, fd, level, name, value, bytes));
}

/* liburing makes its system calls itself. */
#define WATCHED(name, type, args, names)                        \
    EXPORT type name args                                       \
    {                                                           \
        static type (*real) args;                               \
        if (real == NULL)                                       \
            *(void **)&real = dlsym(RTLD_NEXT, #name);          \
        fm_frames_are_shared();                                    \
        return real != NULL ? real names : -ENOSYS;             \
    }

struct io_uring;
struct io_uring_params;
WATCHED(io_uring_queue_init, int, (unsigned entries, struct io_uring *ring, unsigned flags), (entries, ring, flags))
WATCHED(io_uring_queue_init_params, int, (unsigned entries, struct io_uring *ring, struct io_uring_params *p), (entries, ring, p))
WATCHED(io_uring_setup, int, (unsigned entries, struct io_uring_params *p), (entries, p))
