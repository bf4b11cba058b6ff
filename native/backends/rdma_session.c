/* rdma_session.c - a session with the agent of the job: its socket, the memory that both share, and the thread that sees to it.
 *
 * The thread connects, takes what has ended, looks at deadlines, and connects again.  It spins for a moment while something is
 * under way, then it sleeps until the agent rings.
 */
#include <errno.h>
#include <poll.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/socket.h>

#include "engine/sys.h"
#include "fm_assert.h"
#include "rdma.h"

#define SPIN_NS 20000ull
#define TICK_NS 250000000ull
#define AGAIN_MIN_NS 50000000ull
#define AGAIN_MAX_NS 1000000000ull

static uint64_t tick_ns(void)
{
    uint64_t quarter = fm_rdma.server->timeout_ns / 4;
    return quarter < TICK_NS ? quarter : TICK_NS;
}

void fm_rdma_bell(void)
{
    const char bell = 1;
    if (fm_rdma_load(&fm_rdma.ring->agent_sleeps) != 0)
        fm_sys(SYS_sendto, fm_rdma.sock, &bell, 1, MSG_DONTWAIT | MSG_NOSIGNAL, NULL, 0);
}

/* ---- joining ------------------------------------------------------------------------------------------- */

static bool say_hello(int sock)
{
    const struct fm_pool_server *s = fm_rdma.server;
    struct fm_rdma_hello h = { .magic = FM_RDMA_MAGIC, .version = FM_RDMA_VERSION, .slot = fm_rdma.b->chain->ledger->proc };
    fm_assert(s->export_bytes == sizeof h.token);
    __builtin_memcpy(h.token, s->export_name, sizeof h.token);
    return fm_sys(SYS_sendto, sock, &h, sizeof h, MSG_DONTWAIT | MSG_NOSIGNAL, NULL, 0) == (long)sizeof h;
}

static struct fm_rdma_ring *map_shared(int fd)
{
    long r = fm_sys(SYS_mmap, NULL, FM_RDMA_SHARED_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (r < 0 && r > -4096)
        return NULL;
    fm_sys(SYS_madvise, r, FM_RDMA_SHARED_BYTES, MADV_DONTFORK);
    fm_add(fm_rdma.b->chain->count->engine_bytes, FM_RDMA_SHARED_BYTES);
    return (struct fm_rdma_ring *)r;
}

static struct fm_rdma_ring *read_welcome(int sock)
{
    struct fm_rdma_welcome w;
    char control[CMSG_SPACE(sizeof(int))] __attribute__((aligned(8)));
    struct iovec iov = { &w, sizeof w };
    struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control };
    long r = fm_sys(SYS_recvmsg, sock, &m, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
    struct cmsghdr *c = (struct cmsghdr *)control;
    if (r <= 0 || m.msg_controllen < sizeof *c || c->cmsg_type != SCM_RIGHTS || c->cmsg_len != CMSG_LEN(sizeof(int)))
        return NULL;
    int fd = *(int *)CMSG_DATA(c);
    bool right = r == (long)sizeof w && w.magic == FM_RDMA_MAGIC && w.version == FM_RDMA_VERSION &&
                 w.bytes == FM_RDMA_SHARED_BYTES;
    struct fm_rdma_ring *ring = right ? map_shared(fd) : NULL;
    fm_sys(SYS_close, fd);
    return ring;
}

/* The agent first asks the server, which can take long: until then deadlines pass as ever. */
static bool await_welcome(int sock)
{
    struct pollfd p = { .fd = sock, .events = POLLIN };
    while (fm_sys(SYS_poll, &p, 1, tick_ns() / 1000000 + 1) <= 0) {
        (void)fm_rdma_look();
        if (fm_rdma_load(&fm_rdma.gone) != 0)
            return false;
    }
    fm_rdma.ring = read_welcome(sock);
    return fm_rdma.ring != NULL;
}

static bool join(void)
{
    const struct fm_pool_server *s = fm_rdma.server;
    int sock = (int)fm_sys(SYS_socket, AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (sock < 0)
        return false;
    if (fm_sys(SYS_connect, sock, s->address, s->address_bytes) != 0 || !say_hello(sock) || !await_welcome(sock)) {
        fm_sys(SYS_close, sock);
        return false;
    }
    fm_rdma.sock = sock;
    fm_rdma.reaped = 0;
    return true;
}

/* The socket last: its end tells the agent that nobody looks at the memory any more. */
static void leave(void)
{
    fm_rdma_went_down();
    fm_sys(SYS_munmap, fm_rdma.ring, FM_RDMA_SHARED_BYTES);
    __atomic_sub_fetch(&fm_rdma.b->chain->count->engine_bytes, FM_RDMA_SHARED_BYTES, __ATOMIC_RELAXED);
    fm_rdma.ring = NULL;
    fm_sys(SYS_close, fm_rdma.sock);
    fm_rdma.sock = -1;
}

/* ---- serving ------------------------------------------------------------------------------------------- */

static bool anything_new(void) { return __atomic_load_n(&fm_rdma.ring->completed, __ATOMIC_SEQ_CST) != fm_rdma.reaped; }

static void spin(void)
{
    uint64_t begin = fm_now_ns();
    while (!anything_new() && __atomic_load_n(&fm_rdma.outstanding, __ATOMIC_RELAXED) > 0 && fm_now_ns() - begin < SPIN_NS)
        __builtin_ia32_pause();
}

/* False: the agent has ended the session. */
static bool sleep_until_bell(void)
{
    struct pollfd p = { .fd = fm_rdma.sock, .events = POLLIN };
    char bells[8];
    long r = 1;
    fm_rdma_store(&fm_rdma.ring->engine_sleeps, 1);
    if (!anything_new())
        fm_sys(SYS_poll, &p, 1, tick_ns() / 1000000 + 1);
    fm_rdma_store(&fm_rdma.ring->engine_sleeps, 0);
    while (p.revents != 0 && r > 0)
        r = fm_sys(SYS_recvfrom, fm_rdma.sock, bells, sizeof bells, MSG_DONTWAIT, NULL, NULL);
    return r > 0 || r == -EAGAIN || r == -EINTR;
}

/* Until the session ends; whether anything came of it. */
static bool serve(void)
{
    uint64_t looked_ns = fm_now_ns();
    bool here = true;
    while (here) {
        spin();
        here = anything_new() || sleep_until_bell();
        if (!fm_rdma_reap())                 /* what has ended counts, also when it was the session's last */
            break;
        if (fm_now_ns() - looked_ns < tick_ns())
            continue;
        looked_ns = fm_now_ns();
        if (fm_rdma_look())
            break;
    }
    return fm_rdma.reaped != 0;
}

static void run(void *arg)
{
    uint64_t wait_ns = 0;
    (void)arg;
    while (!fm_rdma_is_over()) {
        bool served = false;
        if (fm_rdma_load(&fm_rdma.gone) == 0 && join()) {
            fm_rdma_came_up();
            served = serve();
            leave();
        }
        (void)fm_rdma_look();
        wait_ns = served ? AGAIN_MIN_NS : wait_ns * 2 + AGAIN_MIN_NS;
        wait_ns = wait_ns < AGAIN_MAX_NS ? wait_ns : AGAIN_MAX_NS;
        fm_sleep_ns(wait_ns < tick_ns() ? wait_ns : tick_ns());
    }
}

bool fm_rdma_start(void) { return fm_rdma.b->chain->thread(run, NULL); }
