/* tls_connection.c - one connection of an engine, and ours to the server that belongs to it.
 *
 * Ours begins as any NBD client's: greeting, NBD_OPT_STARTTLS, handshake. Only then is the engine shown the greeting, which
 * we have kept; its answer to it must be the one that we gave, and is not passed on. What follows is passed on as it is.
 *
 * An engine that hangs up counts on nothing of it being under way any more (native/backends/nbd_connection.c). So before
 * anything is sent it is looked whether the client is there, and a connection that still holds something of it is reset: as
 * long as it lives its socket is set so that every end of ours, a death too, resets it. Ours ends before the client's.
 */
#include <endian.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

#include <openssl/err.h>

#include "fm_assert.h"
#include "tls.h"

#define MAGIC_SERVER 0x4e42444d41474943ull     /* "NBDMAGIC" */
#define MAGIC_OPTION 0x49484156454f5054ull     /* "IHAVEOPT" */
#define MAGIC_REPLY 0x0003e889045565a9ull
#define FIXED_NEWSTYLE 1u
#define NO_ZEROES 2u
#define OPT_STARTTLS 5u
#define REP_ACK 1u
#define GREETING_BYTES 18u
#define REPLY_BYTES 20u
#define BEGIN_NS 5000000000ull
#define ROUNDS_MAX 8              /* then it is another connection's turn */
#define CLIENT_BUFFER_BYTES (1 << 20)

_Static_assert(TLS_BUFFER_BYTES >= GREETING_BYTES, "the greeting is handed on through a buffer");

uint64_t tls_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

static bool is_empty(const struct tls_buffer *b) { return b->start == b->end; }

/* How many bytes there is room for behind what is in it. */
static size_t make_room(struct tls_buffer *b)
{
    if (b->end == TLS_BUFFER_BYTES && b->start > 0) {
        memmove(b->bytes, b->bytes + b->start, b->end - b->start);
        b->end -= b->start;
        b->start = 0;
    }
    return TLS_BUFFER_BYTES - b->end;
}

static bool has_room(const struct tls_buffer *b) { return b->end < TLS_BUFFER_BYTES || b->start > 0; }

static void take_out(struct tls_buffer *b, size_t bytes)
{
    b->start += bytes;
    fm_assert(b->start <= b->end);
    if (is_empty(b))
        b->start = b->end = 0;
}

/* ---- the end ------------------------------------------------------------------------------------------- */

static void set_linger(int fd, int on)
{
    const struct linger none = { .l_onoff = on, .l_linger = 0 };
    (void)setsockopt(fd, SOL_SOCKET, SO_LINGER, &none, sizeof none);
}

static void end(struct tls_connection *c)
{
    if (c->server.fd >= 0)
        close(c->server.fd);
    close(c->client.fd);
    c->server.fd = c->client.fd = -1;
    c->state = TLS_OVER;
    c->busy = false;
}

/* Nothing is on its way to the server: it is told that this is the end. */
static void end_politely(struct tls_connection *c)
{
    if (!c->told_server)
        (void)SSL_shutdown(c->ssl);
    set_linger(c->server.fd, 0);
    end(c);
}

static void client_has_gone(struct tls_connection *c)
{
    unsigned char more;
    if (c->state == TLS_RELAY && !c->broken && is_empty(&c->up) && recv(c->client.fd, &more, 1, MSG_DONTWAIT) <= 0)
        end_politely(c);
    else
        end(c);
}

static bool is_there(const struct tls_connection *c)
{
    struct pollfd p = { .fd = c->client.fd };
    return poll(&p, 1, 0) == 0 || (p.revents & (POLLHUP | POLLERR)) == 0;
}

static void fail(struct tls_connection *c, const char *what, const char *hint)
{
    char line[TLS_REASON_BYTES];
    snprintf(line, sizeof line, "%s %s", c->to->name, what);
    tls_failed(line, hint);
    end(c);
}

static void fail_in_tls(struct tls_connection *c)
{
    char reason[TLS_REASON_BYTES];
    tls_why(c->to, c->ssl, reason);
    tls_failed(reason, "docs/pools.md says how to make certificates");
    end(c);
}

void tls_give_up(struct tls_connection *c)
{
    const char *hint = "see that the server runs there";
    fail(c, c->state == TLS_CONNECTING ? "can't be reached: it does not answer" : "does not answer", hint);
}

/* ---- the beginning ------------------------------------------------------------------------------------- */

static void connect_on(struct tls_connection *c)
{
    char what[128];
    if (connect(c->server.fd, (const struct sockaddr *)&c->to->address, c->to->address_bytes) == 0 || errno == EISCONN) {
        c->state = TLS_GREETING;
        return;
    }
    if (errno == EINPROGRESS || errno == EALREADY || errno == EINTR)
        return;
    snprintf(what, sizeof what, "can't be reached: %s", strerror(errno));
    fail(c, what, "see that the server runs there, and that nothing on the way keeps you from it");
}

/* True: the server has said so many bytes. */
static bool hear(struct tls_connection *c, size_t bytes)
{
    while (c->said_bytes < bytes) {
        ssize_t n = recv(c->server.fd, c->said + c->said_bytes, bytes - c->said_bytes, MSG_DONTWAIT);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno == EAGAIN)
            return false;
        if (n <= 0) {
            fail(c, "closed the connection before TLS", "see what the server says");
            return false;
        }
        c->said_bytes += (size_t)n;
    }
    return true;
}

static uint64_t number_at(const unsigned char *at)
{
    uint64_t number;
    memcpy(&number, at, sizeof number);
    return be64toh(number);
}

static void greet(struct tls_connection *c)
{
    struct {
        uint32_t flags;
        uint64_t magic;
        uint32_t option, bytes;
    } __attribute__((packed)) words = { 0, htobe64(MAGIC_OPTION), htobe32(OPT_STARTTLS), 0 };
    if (!hear(c, GREETING_BYTES))
        return;
    uint32_t flags = (uint32_t)c->said[16] << 8 | c->said[17];
    if (number_at(c->said) != MAGIC_SERVER || number_at(c->said + 8) != MAGIC_OPTION || (flags & FIXED_NEWSTYLE) == 0) {
        fail(c, "does not speak the NBD protocol", "see that it is a farmem server, or an NBD server of today");
        return;
    }
    words.flags = htobe32(FIXED_NEWSTYLE | (flags & NO_ZEROES));
    memcpy(c->flags, &words.flags, sizeof c->flags);
    memcpy(c->down.bytes, c->said, GREETING_BYTES);
    c->down.end = GREETING_BYTES;
    c->said_bytes = 0;
    if (send(c->server.fd, &words, sizeof words, MSG_DONTWAIT | MSG_NOSIGNAL) != sizeof words) {
        fail(c, "closed the connection before TLS", "see what the server says");
        return;
    }
    c->state = TLS_ASKING;
}

static void ask(struct tls_connection *c)
{
    if (!hear(c, REPLY_BYTES))
        return;
    uint64_t option_and_kind = number_at(c->said + 8);
    if (number_at(c->said) != MAGIC_REPLY || option_and_kind >> 32 != OPT_STARTTLS) {
        fail(c, "does not speak the NBD protocol", "see that it is a farmem server, or an NBD server of today");
        return;
    }
    if ((uint32_t)option_and_kind != REP_ACK) {
        fail(c, "offers no TLS", "start it with --tls=require; or say --tls=off here, if you trust everybody on the way");
        return;
    }
    c->ssl = tls_session(c->to);
    if (c->ssl == NULL || SSL_set_fd(c->ssl, c->server.fd) != 1) {
        fail(c, "can't be spoken to: no memory", "free some");
        return;
    }
    SSL_set_connect_state(c->ssl);
    c->state = TLS_HANDSHAKE;
}

static void shake_hands(struct tls_connection *c)
{
    ERR_clear_error();
    int r = SSL_do_handshake(c->ssl), error = SSL_get_error(c->ssl, r);
    c->write_blocked = r != 1 && error == SSL_ERROR_WANT_WRITE;
    if (r == 1)
        c->state = TLS_RELAY;
    else if (error != SSL_ERROR_WANT_READ && error != SSL_ERROR_WANT_WRITE)
        fail_in_tls(c);
}

/* ---- passing on: each true if something has moved ------------------------------------------------------- */

/* What the client answers to the greeting is not passed on: the server has it. */
static bool take_flags(struct tls_connection *c)
{
    unsigned char flags[sizeof c->flags];
    ssize_t n = recv(c->client.fd, flags, sizeof flags - c->flags_bytes, MSG_DONTWAIT);
    if (n < 0)
        return false;
    c->client_ended = n == 0;
    if (memcmp(flags, c->flags + c->flags_bytes, (size_t)n) != 0) {
        end(c);
        return false;
    }
    c->flags_bytes += (size_t)n;
    return true;
}

static bool take_from_client(struct tls_connection *c)
{
    if (c->client_ended || c->broken)
        return false;
    if (c->flags_bytes < sizeof c->flags)
        return take_flags(c);
    size_t room = make_room(&c->up);
    ssize_t n = room > 0 ? recv(c->client.fd, c->up.bytes + c->up.end, room, MSG_DONTWAIT) : -1;
    if (n < 0)
        return false;                        /* nothing now; that it has gone epoll tells */
    c->client_ended = n == 0;
    c->up.end += (size_t)n;
    return true;
}

static bool tell_server(struct tls_connection *c)
{
    ERR_clear_error();
    int r = SSL_shutdown(c->ssl);
    c->write_blocked = r < 0 && SSL_get_error(c->ssl, r) == SSL_ERROR_WANT_WRITE;
    c->told_server = !c->write_blocked;
    return c->told_server;
}

static bool give_to_server(struct tls_connection *c)
{
    c->write_blocked = false;
    if (c->broken || is_empty(&c->up))
        return c->client_ended && !c->broken && !c->told_server && tell_server(c);
    if (!is_there(c)) {
        end(c);
        return false;
    }
    size_t bytes = 0;
    ERR_clear_error();
    int r = SSL_write_ex(c->ssl, c->up.bytes + c->up.start, c->up.end - c->up.start, &bytes);
    int error = SSL_get_error(c->ssl, r);
    if (r == 1) {
        take_out(&c->up, bytes);
        return true;
    }
    c->write_blocked = error == SSL_ERROR_WANT_WRITE;
    if (error != SSL_ERROR_WANT_WRITE && error != SSL_ERROR_WANT_READ) {
        c->broken = true;                    /* reading tells what has happened, and what was said before that */
        c->up.start = c->up.end = 0;
    }
    return false;
}

static bool take_from_server(struct tls_connection *c)
{
    size_t room = c->server_ended ? 0 : make_room(&c->down), bytes = 0;
    if (room == 0)
        return false;
    ERR_clear_error();
    int r = SSL_read_ex(c->ssl, c->down.bytes + c->down.end, room, &bytes), error = SSL_get_error(c->ssl, r);
    c->read_blocked_by_write = r != 1 && error == SSL_ERROR_WANT_WRITE;
    if (r == 1) {
        if (!c->answered)
            tls_went_well();
        c->answered = true;
        c->down.end += bytes;
        return true;
    }
    if (error == SSL_ERROR_WANT_READ || error == SSL_ERROR_WANT_WRITE)
        return false;
    c->server_ended = true;
    if (c->answered)
        return true;
    fail_in_tls(c);
    return false;
}

static bool give_to_client(struct tls_connection *c)
{
    if (is_empty(&c->down)) {
        if (c->server_ended)
            end(c);
        return false;
    }
    ssize_t n = send(c->client.fd, c->down.bytes + c->down.start, c->down.end - c->down.start, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (n > 0)
        take_out(&c->down, (size_t)n);
    else if (errno != EAGAIN && errno != EINTR)
        end(c);
    return n > 0;
}

static void pass_on(struct tls_connection *c)
{
    static bool (*const ways[])(struct tls_connection *) = { take_from_server, give_to_client, take_from_client,
                                                             give_to_server };
    bool moved = true;
    for (int round = 0; round < ROUNDS_MAX && moved; round++) {
        moved = false;
        for (size_t k = 0; k < sizeof ways / sizeof ways[0] && c->state == TLS_RELAY; k++)
            moved |= ways[k](c);
    }
    c->busy = moved && c->state == TLS_RELAY;
}

void tls_step(struct tls_connection *c, bool hung_up)
{
    static void (*const steps[])(struct tls_connection *) = {
        [TLS_CONNECTING] = connect_on, [TLS_GREETING] = greet, [TLS_ASKING] = ask, [TLS_HANDSHAKE] = shake_hands
    };
    if (hung_up) {
        client_has_gone(c);
        return;
    }
    while (c->state < TLS_RELAY) {
        enum tls_state before = c->state;
        steps[before](c);
        if (c->state == before)
            return;
    }
    if (c->state == TLS_RELAY)
        pass_on(c);
}

/* ---- what is waited for --------------------------------------------------------------------------------- */

uint32_t tls_wanted_of_client(const struct tls_connection *c)
{
    bool relays = c->state == TLS_RELAY;
    return (relays && !c->client_ended && !c->broken && has_room(&c->up) ? EPOLLIN : 0) |
           (relays && !is_empty(&c->down) ? EPOLLOUT : 0);
}

uint32_t tls_wanted_of_server(const struct tls_connection *c)
{
    if (c->state == TLS_CONNECTING)
        return EPOLLOUT;
    if (c->state < TLS_RELAY)
        return c->write_blocked ? EPOLLOUT : EPOLLIN;
    bool reads = !c->server_ended && has_room(&c->down);
    bool writes = c->write_blocked || (reads && c->read_blocked_by_write);
    return (reads ? EPOLLIN : 0) | (writes ? EPOLLOUT : 0);
}

/* ---- coming and going ----------------------------------------------------------------------------------- */

static void set_option(int fd, int level, int name, int value) { (void)setsockopt(fd, level, name, &value, sizeof value); }

/* A cut wire is noticed also when nothing is sent, as by the engine's own connections. */
static int server_socket(const struct tls_server *server)
{
    int fd = socket(server->address.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return fd;
    set_linger(fd, 1);
    set_option(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
    set_option(fd, IPPROTO_TCP, TCP_NODELAY, 1);
    set_option(fd, IPPROTO_TCP, TCP_KEEPIDLE, 10);
    set_option(fd, IPPROTO_TCP, TCP_KEEPINTVL, 5);
    set_option(fd, IPPROTO_TCP, TCP_KEEPCNT, 3);
    return fd;
}

struct tls_connection *tls_accept(const struct tls_server *server, int client_fd)
{
    struct tls_connection *c = calloc(1, sizeof *c);
    if (c == NULL)
        return NULL;
    *c = (struct tls_connection){ .to = server, .give_up_ns = tls_now_ns() + BEGIN_NS };
    c->client = (struct tls_end){ .of = c, .fd = client_fd };
    c->up.bytes = malloc(TLS_BUFFER_BYTES);
    c->down.bytes = malloc(TLS_BUFFER_BYTES);
    c->server = (struct tls_end){ .of = c, .fd = server_socket(server) };
    if (c->up.bytes != NULL && c->down.bytes != NULL && c->server.fd >= 0) {
        set_option(client_fd, SOL_SOCKET, SO_SNDBUF, CLIENT_BUFFER_BYTES);
        return c;
    }
    if (c->server.fd >= 0)
        close(c->server.fd);
    tls_free(c);
    return NULL;
}

void tls_free(struct tls_connection *c)
{
    SSL_free(c->ssl);
    free(c->up.bytes);
    free(c->down.bytes);
    free(c);
}
