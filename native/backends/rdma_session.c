/* rdma_session.c - sessions with the agent of the job, one for each server that is used: their sockets, the memory that both
 * sides share, and the one thread that sees to all of them.
 *
 * The thread connects, takes what has ended, looks at deadlines, and connects again; it waits for none of them, so
 * one that stands still holds up no other.  It spins for a moment while something is under way, then it sleeps until the
 * agent rings.
 */
#include <errno.h>
#include <poll.h>
#include <stddef.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>

#include "engine/sys.h"
#include "fm_assert.h"
#include "rdma.h"

#define SPIN_NS 20000ull
#define ATTEND_NS 1000000ull            /* so often the sockets are looked at where nobody sleeps */
#define TICK_NS 250000000ull
#define AGAIN_MIN_NS 50000000ull
#define AGAIN_MAX_NS 1000000000ull

static struct {
    int bell_fd;
    uint32_t open;                      /* a bit for each server that is looked after */
    uint64_t tick_ns, looked_ns, attended_ns;
} tending;

_Static_assert(FM_POOL_SERVERS_MAX <= 32, "a bit for each server");

static bool is_open(const struct fm_rdma *r) { return (fm_rdma_load(&tending.open) >> (r - fm_rdma) & 1) != 0; }
static bool is_up(const struct fm_rdma *r) { return r->session.ring != NULL; }

/* The first from r on that is looked after, or NULL. */
static struct fm_rdma *open_from(struct fm_rdma *r)
{
    while (r < fm_rdma + FM_POOL_SERVERS_MAX && !is_open(r))
        r++;
    return r < fm_rdma + FM_POOL_SERVERS_MAX ? r : NULL;
}

void fm_rdma_bell(struct fm_rdma *r)
{
    const char bell = 1;
    if (fm_rdma_load(&r->session.ring->agent_sleeps) != 0)
        fm_sys(SYS_sendto, r->session.sock, &bell, 1, MSG_DONTWAIT | MSG_NOSIGNAL, NULL, 0);
}

void fm_rdma_wake(void)
{
    uint64_t one = 1;
    fm_sys(SYS_write, tending.bell_fd, &one, sizeof one);
}

/* ---- joining ------------------------------------------------------------------------------------------- */

static bool say_hello(const struct fm_rdma *r, int sock)
{
    const struct fm_pool_server *s = r->server;
    struct fm_rdma_hello h = { .magic = FM_RDMA_MAGIC, .version = FM_RDMA_VERSION, .slot = r->b->chain->ledger->proc };
    fm_assert(s->export_bytes == sizeof h.pass);
    __builtin_memcpy(&h.pass, s->export_name, sizeof h.pass);
    return fm_sys(SYS_sendto, sock, &h, sizeof h, MSG_DONTWAIT | MSG_NOSIGNAL, NULL, 0) == (long)sizeof h;
}

static struct fm_rdma_ring *map_shared(const struct fm_rdma *r, int fd)
{
    long at = fm_sys(SYS_mmap, NULL, FM_RDMA_SHARED_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at < 0 && at > -4096)
        return NULL;
    fm_sys(SYS_madvise, at, FM_RDMA_SHARED_BYTES, MADV_DONTFORK);
    fm_add(r->b->chain->count->engine_bytes, FM_RDMA_SHARED_BYTES);
    return (struct fm_rdma_ring *)at;
}

static struct fm_rdma_ring *read_welcome(const struct fm_rdma *r)
{
    struct fm_rdma_welcome w;
    char control[CMSG_SPACE(sizeof(int))] __attribute__((aligned(8)));
    struct iovec iov = { &w, sizeof w };
    struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control };
    long n = fm_sys(SYS_recvmsg, r->session.sock, &m, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
    struct cmsghdr *c = (struct cmsghdr *)control;
    if (n <= 0 || m.msg_controllen < sizeof *c || c->cmsg_type != SCM_RIGHTS || c->cmsg_len != CMSG_LEN(sizeof(int)))
        return NULL;
    int fd = *(int *)CMSG_DATA(c);
    bool right = n == (long)sizeof w && w.magic == FM_RDMA_MAGIC && w.version == FM_RDMA_VERSION &&
                 w.bytes == FM_RDMA_SHARED_BYTES;
    struct fm_rdma_ring *ring = right ? map_shared(r, fd) : NULL;
    fm_sys(SYS_close, fd);
    return ring;
}

/* The socket last: its end tells the agent that nobody looks at the memory any more. */
static void leave(struct fm_rdma *r)
{
    struct fm_rdma_session *s = &r->session;
    bool served = false;
    if (is_up(r)) {
        served = s->reaped != 0;
        fm_rdma_went_down(r);
        fm_sys(SYS_munmap, s->ring, FM_RDMA_SHARED_BYTES);
        __atomic_sub_fetch(&r->b->chain->count->engine_bytes, FM_RDMA_SHARED_BYTES, __ATOMIC_RELAXED);
        s->ring = NULL;
    }
    if (s->sock >= 0)
        fm_sys(SYS_close, s->sock);
    s->sock = -1;
    s->wait_ns = served ? AGAIN_MIN_NS : s->wait_ns * 2 + AGAIN_MIN_NS;
    s->wait_ns = s->wait_ns < AGAIN_MAX_NS ? s->wait_ns : AGAIN_MAX_NS;
    s->again_ns = fm_now_ns() + s->wait_ns;
}

static void join(struct fm_rdma *r)
{
    const struct fm_pool_server *to = r->server;
    struct fm_rdma_session *s = &r->session;
    s->sock = (int)fm_sys(SYS_socket, AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (s->sock < 0 || fm_sys(SYS_connect, s->sock, to->address, to->address_bytes) != 0 || !say_hello(r, s->sock))
        leave(r);
}

/* The agent asks the server first, which can take long. */
static void be_let_in(struct fm_rdma *r)
{
    r->session.ring = read_welcome(r);
    r->session.reaped = 0;
    if (is_up(r))
        fm_rdma_came_up(r);
    else
        leave(r);
}

static void join_those_that_are_used(uint64_t now)
{
    for (struct fm_rdma *r = open_from(fm_rdma); r != NULL; r = open_from(r + 1))
        if (r->session.sock < 0 && fm_rdma_load(&r->used) != 0 && !fm_rdma_gone(r) && now >= r->session.again_ns)
            join(r);
}

/* ---- serving ------------------------------------------------------------------------------------------- */

static bool has_news(const struct fm_rdma *r)
{
    return is_up(r) && __atomic_load_n(&r->session.ring->completed, __ATOMIC_SEQ_CST) != r->session.reaped;
}

/* Whether any had something. */
static bool take_all(void)
{
    bool any = false;
    for (struct fm_rdma *r = open_from(fm_rdma); r != NULL; r = open_from(r + 1)) {
        if (!has_news(r))
            continue;
        any = true;
        if (!fm_rdma_reap(r))
            leave(r);
    }
    return any;
}

static bool any_under_way(void)
{
    for (struct fm_rdma *r = open_from(fm_rdma); r != NULL; r = open_from(r + 1))
        if (is_up(r) && fm_rdma_load(&r->outstanding) > 0)
            return true;
    return false;
}

/* Says that the thread sleeps, or that it does not; whether there is news, looked at behind that. */
static bool set_sleeps(bool sleeps)
{
    bool any = false;
    for (struct fm_rdma *r = open_from(fm_rdma); r != NULL; r = open_from(r + 1)) {
        if (!is_up(r))
            continue;
        fm_rdma_store(&r->session.ring->engine_sleeps, sleeps);
        any |= has_news(r);
    }
    return any;
}

/* What has ended counts, also when it was the session's last. */
static void hear(struct fm_rdma *r)
{
    char bells[8];
    long n = 1;
    if (!is_up(r)) {
        be_let_in(r);
        return;
    }
    while (n > 0)
        n = fm_sys(SYS_recvfrom, r->session.sock, bells, sizeof bells, MSG_DONTWAIT, NULL, NULL);
    if (n == -EAGAIN || n == -EINTR)
        return;
    (void)fm_rdma_reap(r);
    leave(r);
}

static uint64_t until_next(uint64_t now)
{
    uint64_t wait_ns = tending.tick_ns;
    for (struct fm_rdma *r = open_from(fm_rdma); r != NULL; r = open_from(r + 1))
        if (r->session.sock < 0 && fm_rdma_load(&r->used) != 0 && !fm_rdma_gone(r)) {
            uint64_t left = r->session.again_ns > now ? r->session.again_ns - now : 0;
            wait_ns = left < wait_ns ? left : wait_ns;
        }
    return wait_ns;
}

/* The sockets of all; sleeps until one of them or wake() rings. */
static void attend(bool may_sleep)
{
    struct pollfd p[FM_POOL_SERVERS_MAX + 1] = { { .fd = tending.bell_fd, .events = POLLIN } };
    struct fm_rdma *of[FM_POOL_SERVERS_MAX + 1] = { NULL };
    uint32_t n = 1;
    uint64_t bells;
    bool sleeps = may_sleep && !set_sleeps(true);
    for (struct fm_rdma *r = open_from(fm_rdma); r != NULL; r = open_from(r + 1))
        if (r->session.sock >= 0) {
            of[n] = r;
            p[n++] = (struct pollfd){ .fd = r->session.sock, .events = POLLIN };
        }
    fm_sys(SYS_poll, p, n, sleeps ? until_next(fm_now_ns()) / 1000000 + 1 : 0);
    if (may_sleep)
        (void)set_sleeps(false);
    if (p[0].revents != 0)
        fm_sys(SYS_read, tending.bell_fd, &bells, sizeof bells);
    for (uint32_t k = 1; k < n; k++)
        if (p[k].revents != 0)
            hear(of[k]);
    tending.attended_ns = fm_now_ns();
}

static void look_at_all(uint64_t now)
{
    tending.looked_ns = now;
    for (struct fm_rdma *r = open_from(fm_rdma); r != NULL; r = open_from(r + 1))
        if (fm_rdma_look(r) && r->session.sock >= 0) {
            leave(r);
            (void)fm_rdma_look(r);               /* what was under way is not any more, and may be due */
        }
}

static void tend(void *arg)
{
    uint64_t busy_ns = 0;
    (void)arg;
    for (;;) {
        bool any = take_all();
        uint64_t now = fm_now_ns();
        if (any)
            busy_ns = now;
        if (now - tending.looked_ns >= tending.tick_ns)
            look_at_all(now);
        join_those_that_are_used(now);
        if (now - busy_ns >= SPIN_NS || !any_under_way())
            attend(true);
        else if (now - tending.attended_ns > ATTEND_NS)
            attend(false);
        __builtin_ia32_pause();
    }
}

bool fm_rdma_tend(struct fm_rdma *r)
{
    struct fm_chain *chain = r->b->chain;
    if (!chain->rdma_is_tended) {
        uint64_t quarter = r->server->timeout_ns / 4;
        __builtin_memset(&tending, 0, sizeof tending);      /* in the child of a fork it is the parent's */
        tending.tick_ns = quarter < TICK_NS ? quarter : TICK_NS;
        tending.bell_fd = (int)fm_sys(SYS_eventfd2, 0, EFD_CLOEXEC | EFD_NONBLOCK);
        chain->rdma_is_tended = tending.bell_fd >= 0 && chain->thread(tend, NULL);
    }
    if (chain->rdma_is_tended)
        __atomic_fetch_or(&tending.open, 1u << (r - fm_rdma), __ATOMIC_SEQ_CST);
    return chain->rdma_is_tended;
}
