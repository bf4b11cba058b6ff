/* wire.c - how a process of the job finds its supervisor: an abstract socket, and descriptors over it.
 *
 * Runs on engine threads, in their descriptor table: nothing of it is inherited or can be closed by the program.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>

#include "engine/engine.h"
#include "fm_assert.h"

#define FDS_MAX 4
#define PATIENCE_S 10

static bool refused;

static bool send_wire(uint32_t kind, uint32_t slot, int fd)
{
    struct fm_wire w = { .magic = FM_CONTROL_MAGIC, .version = FM_CONTROL_VERSION, .kind = kind, .pid = fm.pid, .slot = slot };
    char control[CMSG_SPACE(sizeof(int))] __attribute__((aligned(8)));
    struct iovec iov = { &w, sizeof w };
    struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1 };
    __builtin_memcpy(w.token, fm.token, sizeof w.token);
    if (fd >= 0) {
        struct cmsghdr *c = (struct cmsghdr *)control;
        __builtin_memset(control, 0, sizeof control);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(sizeof(int));
        *(int *)CMSG_DATA(c) = fd;
        m.msg_control = control;
        m.msg_controllen = sizeof control;
    }
    return fm_sys(SYS_sendmsg, fm.sock, &m, MSG_NOSIGNAL) == (long)sizeof w;
}

/* The answer's kind (0: none came), and how many descriptors came with it. */
static uint32_t receive_wire(struct fm_wire *w, int *fds, uint32_t *n)
{
    char control[CMSG_SPACE(sizeof(int) * FDS_MAX)] __attribute__((aligned(8)));
    struct iovec iov = { w, sizeof *w };
    struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control };
    long r;
    do {
        r = fm_sys(SYS_recvmsg, fm.sock, &m, MSG_CMSG_CLOEXEC);
    } while (r == -EINTR);
    *n = 0;
    if (r != (long)sizeof *w || w->magic != FM_CONTROL_MAGIC || w->version != FM_CONTROL_VERSION)
        return 0;
    struct cmsghdr *c = (struct cmsghdr *)control;
    if (m.msg_controllen >= sizeof *c && c->cmsg_type == SCM_RIGHTS) {
        *n = (uint32_t)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));
        __builtin_memcpy(fds, CMSG_DATA(c), *n * sizeof(int));
    }
    return w->kind;
}

static void *map_shared(int fd, uint64_t bytes)
{
    long r = fm_sys(SYS_mmap, NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
    return r < 0 && r > -4096 ? NULL : (void *)r;
}

/* In the child of a fork the parent's mappings are there already. */
static bool map_job(const int *fds)
{
    if (fm.control == NULL) {
        struct fm_control *c = map_shared(fds[0], sizeof(struct fm_control));
        if (c == NULL || c->magic != FM_CONTROL_MAGIC || c->version != FM_CONTROL_VERSION || c->bytes != sizeof *c)
            return false;
        fm.ledger_base = map_shared(fds[1], fm_pool_ledger_bytes(c->pool_bytes));
        fm.pool = c->backend == FM_BACKEND_MEM ? map_shared(fds[2], c->pool_bytes) : NULL;
        if (fm.ledger_base == NULL || (c->backend == FM_BACKEND_MEM && fm.pool == NULL)) {
            fm.control = c;                /* to say it */
            fm_say(FM_LEVEL_ERROR, "a process has no address space left for the pool (a limit on it?): not managed.", 0);
            fm.control = NULL;
            return false;
        }
        fm.control = c;
    }
    bool is_file = fm.control->backend == FM_BACKEND_FILE;
    fm.pool_fd = is_file ? fds[2] : -1;
    fm.table_tid = (uint32_t)fm_sys(SYS_gettid);
    for (int k = 0; k < (is_file ? 2 : 3); k++)
        fm_sys(SYS_close, fds[k]);
    return true;
}

/* A supervisor that does not answer (stopped, say) must hold nobody up for ever: it counts as gone. */
static void set_patience(int sock)
{
    const struct timeval t = { .tv_sec = PATIENCE_S };
    fm_sys(SYS_setsockopt, sock, SOL_SOCKET, SO_RCVTIMEO, &t, sizeof t);
    fm_sys(SYS_setsockopt, sock, SOL_SOCKET, SO_SNDTIMEO, &t, sizeof t);
}

/* Not with a descriptor of the program's table, which the child has inherited, but from the engine's, which it has not:
 * through /proc, as the same file, whether it still has a name or never had one. */
bool fm_wire_pool_of_parent(void)
{
    char path[64] = "/proc/";
    uint32_t at = 6;
    if (fm.control->backend != FM_BACKEND_FILE)
        return true;
    at = fm_put_number(path, at, fm.table_tid, 10);
    __builtin_memcpy(path + at, "/fd/", 4);
    path[fm_put_number(path, at + 4, (uint64_t)fm.pool_fd, 10)] = 0;
    int direct = (fm.control->flags & FM_FLAG_POOL_DIRECT) != 0 ? O_DIRECT : 0;
    fm.pool_fd = (int)fm_sys(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC | direct);
    fm.table_tid = (uint32_t)fm_sys(SYS_gettid);
    return fm.pool_fd >= 0;
}

bool fm_wire_join(uint32_t slot)
{
    struct sockaddr_un a = { .sun_family = AF_UNIX };
    size_t n = strlen(fm.job_name);
    struct fm_wire w;
    int fds[FDS_MAX];
    uint32_t got = 0;
    refused = false;
    __builtin_memcpy(a.sun_path + 1, fm.job_name, n);
    fm.sock = (int)fm_sys(SYS_socket, AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (fm.sock >= 0)
        set_patience(fm.sock);
    if (fm.sock < 0 || fm_sys(SYS_connect, fm.sock, &a, offsetof(struct sockaddr_un, sun_path) + 1 + n) != 0)
        return false;
    uint32_t answer = send_wire(FM_WIRE_HELLO, slot, -1) ? receive_wire(&w, fds, &got) : 0;
    refused = answer == FM_WIRE_REFUSED;
    if (answer != FM_WIRE_WELCOME || got != 3)
        return false;
    fm_assert(w.slot < FM_PROCS_MAX);
    if (!map_job(fds))
        return false;
    fm.slot = w.slot;
    fm.proc = &fm.control->procs[w.slot];
    return true;
}

bool fm_wire_refused(void) { return refused; }

/* Nothing is managed before the supervisor has a duplicate of the userfaultfd. It has when this returns, however late it
 * reads the message: what is under way to a socket is open. An answer need not be waited for, while the program grows. */
bool fm_wire_hold(void) { return send_wire(FM_WIRE_HOLD, fm.slot, fm.uffd); }

bool fm_wire_alive(void)
{
    struct pollfd p = { .fd = fm.sock, .events = POLLIN };
    return fm_sys(SYS_poll, &p, 1, 0) == 0;
}
