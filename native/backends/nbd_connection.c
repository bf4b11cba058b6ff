/* nbd_connection.c - one connection to the server: a thread that makes it and receives, and whoever has something to send.
 *
 * Sending never waits: what the kernel does not take now goes on when it has room (the tender).  Bytes go straight
 * from frames and into frames.  A reply that is not exactly what may come now ends the connection: nothing after it can be
 * believed.  Frames that were half received are the request's still, and it is made again.
 */
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stddef.h>
#include <sys/socket.h>
#include <sys/time.h>

#include "engine/sys.h"
#include "fm_assert.h"
#include "nbd.h"

#define MAGIC_REQUEST 0x25609513u
#define MAGIC_SIMPLE_REPLY 0x67446698u
#define CMD_READ 0u
#define CMD_WRITE 1u
#define CMD_TRIM 4u
#define NBD_ESHUTDOWN 108u
#define CONNECT_NS 5000000000ull
#define LOOK_US 250000                /* how often a reader that waits looks whether it should */
#define AGAIN_MIN_NS 50000000ull
#define AGAIN_MAX_NS 1000000000ull
#define HOLD_SPINS 100
#define HOLD_STEP_NS 20000

struct request {
    uint32_t magic;
    uint16_t flags, kind;
    uint64_t cookie, at;
    uint32_t bytes;
} __attribute__((packed));

struct reply {
    uint32_t magic, error;
    uint64_t cookie;
} __attribute__((packed));

/* ---- sending ------------------------------------------------------------------------------------------- */

static bool try_hold(struct fm_nbd_connection *c) { return __atomic_exchange_n(&c->sending, 1, __ATOMIC_SEQ_CST) == 0; }

void fm_nbd_hold(struct fm_nbd_connection *c)
{
    for (uint32_t k = 0; !try_hold(c); k++) {
        if (k < HOLD_SPINS)
            __builtin_ia32_pause();
        else
            fm_sleep_ns(HOLD_STEP_NS);
    }
}

void fm_nbd_release(struct fm_nbd_connection *c) { fm_nbd_store(&c->sending, 0); }

static struct request head_of(const struct fm_nbd *n, const struct fm_nbd_request *r)
{
    const struct fm_io *io = r->io;
    uint64_t place = io->slot - n->span->first * FM_EXTENT_SLOTS;
    uint16_t kind = io->kind == FM_IO_FETCH ? CMD_READ : io->kind == FM_IO_STORE ? CMD_WRITE : CMD_TRIM;
    return (struct request){ .magic = __builtin_bswap32(MAGIC_REQUEST), .kind = __builtin_bswap16(kind),
                             .cookie = __builtin_bswap64(r->cookie),
                             .at = __builtin_bswap64(place * FM_PAGE_BYTES),
                             .bytes = __builtin_bswap32(io->n * FM_PAGE_BYTES) };
}

/* The connection is no good any more: its reader is told so by the end of the stream. */
static void broken(struct fm_nbd_connection *c)
{
    c->out = NULL;
    (void)fm_nbd_closing(c);
    fm_sys(SYS_shutdown, c->fd, SHUT_RDWR);
}

/* Send what is left of c->out.  False: the kernel takes no more now. */
static bool send_out(struct fm_nbd_connection *c)
{
    struct fm_nbd_request *r = c->out;
    struct request head = head_of(c->server, r);
    uint32_t body = r->io->kind == FM_IO_STORE ? r->io->n * FM_PAGE_BYTES : 0, all = sizeof head + body;
    while (c->out_bytes < all) {
        struct iovec iov[2];
        struct msghdr m = { .msg_iov = iov };
        uint32_t at = c->out_bytes;
        if (at < sizeof head)
            iov[m.msg_iovlen++] = (struct iovec){ (char *)&head + at, sizeof head - at };
        at = at < sizeof head ? 0 : at - (uint32_t)sizeof head;
        if (body > 0)
            iov[m.msg_iovlen++] = (struct iovec){ fm_io_bytes(c->server->b, r->io) + at, body - at };
        long sent = fm_sys(SYS_sendmsg, c->fd, &m, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent == -EAGAIN)
            return false;
        if (sent <= 0 && sent != -EINTR) {
            broken(c);
            return true;
        }
        c->out_bytes += sent > 0 ? (uint32_t)sent : 0;
    }
    c->out = NULL;
    fm_nbd_store(&r->sent, 1);
    return true;
}

static bool next_out(struct fm_nbd_connection *c)
{
    if (c->out == NULL) {
        c->out = fm_nbd_take(c);
        c->out_bytes = 0;
    }
    return c->out != NULL;
}

/* Whoever finds somebody else sending leaves it to them: they look once more when they have let go.  Whether the connection
 * is blocked is for the holder to say alone: the tender watches it for as long as it is. */
void fm_nbd_pump(struct fm_nbd_connection *c)
{
    bool blocked = false;
    do {
        if (!try_hold(c))
            return;
        while (!blocked && fm_nbd_load(&c->state) == FM_NBD_UP && next_out(c))
            blocked = !send_out(c);
        bool newly = __atomic_exchange_n(&c->blocked, blocked, __ATOMIC_SEQ_CST) == 0 && blocked;
        fm_nbd_release(c);
        if (newly)
            fm_nbd_ring();
    } while (!blocked && fm_nbd_has_work(c));
}

/* ---- receiving ----------------------------------------------------------------------------------------- */

static bool give_up(const struct fm_nbd_connection *c)
{
    return fm_nbd_load(&c->state) != FM_NBD_UP && fm_now_ns() > c->give_up_ns;
}

static bool receive(struct fm_nbd_connection *c, void *to, uint64_t bytes)
{
    for (uint64_t got = 0; got < bytes;) {
        long r = fm_sys(SYS_recvfrom, c->fd, (char *)to + got, bytes - got, 0, NULL, NULL);
        if (r == 0 || (r < 0 && r != -EINTR && r != -EAGAIN))
            return false;
        if (r == -EAGAIN && give_up(c))
            return false;
        got += r > 0 ? (uint64_t)r : 0;
    }
    return true;
}

/* The protocol's numbers for errors are Linux's. */
static int32_t status_of(uint32_t error)
{
    switch (error) {
    case 0:
    case EPERM:
    case EIO:
    case ENOMEM:
    case EINVAL:
    case ENOSPC:
    case EOVERFLOW:
    case EOPNOTSUPP:
        return (int32_t)error;
    default:
        return EINVAL;
    }
}

/* Until the connection ends; how many requests were answered. */
static uint64_t serve(struct fm_nbd_connection *c)
{
    for (uint64_t n = 0;; n++) {
        struct reply p;
        if (!receive(c, &p, sizeof p) || p.magic != __builtin_bswap32(MAGIC_SIMPLE_REPLY))
            return n;
        uint32_t error = __builtin_bswap32(p.error);
        struct fm_nbd_request *r = fm_nbd_claim(c, __builtin_bswap64(p.cookie));
        if (r == NULL || error == NBD_ESHUTDOWN)
            return n;
        const struct fm_io *io = r->io;
        if (error == 0 && io->kind == FM_IO_FETCH && !receive(c, fm_io_bytes(c->server->b, io), (uint64_t)io->n * FM_PAGE_BYTES))
            return n;
        fm_nbd_end(c, r, status_of(error));
    }
}

/* ---- connecting ---------------------------------------------------------------------------------------- */

static void set_option(int fd, int level, int name, int value)
{
    (void)fm_sys(SYS_setsockopt, fd, level, name, &value, sizeof value);     /* not every kind of socket has each */
}

static void set_limits(int fd, uint64_t receive_us, uint64_t send_ns)
{
    struct timeval r = { .tv_sec = (long)(receive_us / 1000000), .tv_usec = (long)(receive_us % 1000000) };
    struct timeval s = { .tv_sec = (long)(send_ns / 1000000000), .tv_usec = (long)(send_ns / 1000 % 1000000) };
    fm_sys(SYS_setsockopt, fd, SOL_SOCKET, SO_RCVTIMEO, &r, sizeof r);
    fm_sys(SYS_setsockopt, fd, SOL_SOCKET, SO_SNDTIMEO, &s, sizeof s);
}

/* A cut wire is noticed also when nothing is sent; a server that is stopped is the deadline's business. */
static void keep_alive(int fd)
{
    set_option(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
    set_option(fd, IPPROTO_TCP, TCP_NODELAY, 1);
    set_option(fd, IPPROTO_TCP, TCP_KEEPIDLE, 10);
    set_option(fd, IPPROTO_TCP, TCP_KEEPINTVL, 5);
    set_option(fd, IPPROTO_TCP, TCP_KEEPCNT, 3);
}

/* Nothing of ours may still be under way to the server when the connection counts as gone. */
static void close_hard(int fd)
{
    const struct linger none = { .l_onoff = 1, .l_linger = 0 };
    fm_sys(SYS_setsockopt, fd, SOL_SOCKET, SO_LINGER, &none, sizeof none);
    fm_sys(SYS_close, fd);
}

static enum fm_nbd_answer connect_to_server(struct fm_nbd_connection *c, uint32_t *flags, const char **why)
{
    struct fm_nbd *n = c->server;
    const struct fm_pool_server *s = n->server;
    uint64_t bytes = (uint64_t)n->span->extents * FM_EXTENT_SLOTS * FM_PAGE_BYTES;
    uint16_t family;
    uint64_t patience_ns = s->timeout_ns < CONNECT_NS ? s->timeout_ns : CONNECT_NS;
    __builtin_memcpy(&family, s->address, sizeof family);
    int fd = (int)fm_sys(SYS_socket, family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return FM_NBD_LATER;
    set_limits(fd, patience_ns / 1000, patience_ns);
    keep_alive(fd);
    enum fm_nbd_answer a = FM_NBD_LATER;
    if (fm_sys(SYS_connect, fd, s->address, s->address_bytes) == 0)
        a = fm_nbd_handshake(fd, s, bytes, flags, why);
    bool one_is_enough = c != n->connection && a == FM_NBD_READY && (*flags & FM_NBD_FLAG_CAN_MULTI_CONN) == 0;
    if (a != FM_NBD_READY || one_is_enough) {
        close_hard(fd);
        return one_is_enough ? FM_NBD_LATER : a;
    }
    set_limits(fd, LOOK_US, 0);
    __atomic_store_n(&c->fd, fd, __ATOMIC_RELAXED);
    return a;
}

static void disconnect(struct fm_nbd_connection *c)
{
    (void)fm_nbd_closing(c);
    fm_nbd_hold(c);
    close_hard(c->fd);
    __atomic_store_n(&c->fd, -1, __ATOMIC_RELAXED);
    c->out = NULL;
    fm_nbd_release(c);
    fm_nbd_went_down(c);
}

static void run(void *arg)
{
    struct fm_nbd_connection *c = arg;
    uint64_t wait_ns = 0;
    while (!fm_nbd_gone(c->server)) {
        uint32_t flags = 0;
        uint64_t answered = 0;
        const char *why = NULL;
        enum fm_nbd_answer a = connect_to_server(c, &flags, &why);
        if (a == FM_NBD_GONE) {
            fm_nbd_is_gone(c->server, why);
            return;
        }
        if (a == FM_NBD_READY) {
            fm_nbd_came_up(c, flags);
            answered = serve(c);
            disconnect(c);
        }
        wait_ns = answered > 0 ? AGAIN_MIN_NS : wait_ns * 2 + AGAIN_MIN_NS;
        wait_ns = wait_ns < AGAIN_MAX_NS ? wait_ns : AGAIN_MAX_NS;
        fm_sleep_ns(wait_ns);
    }
}

bool fm_nbd_start(struct fm_nbd_connection *c) { return c->server->b->chain->thread(run, c); }
