/* tls_loop.c - epoll, who may connect, and when all is over. */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "fm_assert.h"
#include "tls.h"

#define EVENTS 64
#define TICK_MS 250               /* while a connection begins, or none could be accepted */
#define CONNECTIONS_MAX 8192u     /* four for each of a job's processes, and as many that are about to end */

static struct {
    const struct tls_server *server;
    int epoll, listener;
    bool leash_is_held;
    bool accepts;
    uint64_t accepts_again_ns;
    uint32_t connections;
    struct tls_connection *all;   /* those that are over last until the events that may name them have been seen to */
    struct tls_end listening, leash;
} loop;

/* ---- what is told ------------------------------------------------------------------------------------------ */

static char told[2 * TLS_REASON_BYTES];

/* To whoever holds the leash; by hand that is a terminal. Nobody is waited for. */
static void say(const char *line)
{
    size_t bytes = strlen(line);
    if (send(STDERR_FILENO, line, bytes, MSG_DONTWAIT | MSG_NOSIGNAL) < 0 && errno == ENOTSOCK)
        (void)!write(STDERR_FILENO, line, bytes);
}

void tls_failed(const char *what, const char *hint)
{
    char line[sizeof told];
    snprintf(line, sizeof line, "failed\t%s\t%s\n", what, hint);
    if (strcmp(line, told) != 0)
        say(line);
    memcpy(told, line, sizeof told);
}

void tls_went_well(void) { told[0] = 0; }

/* ---- watching ---------------------------------------------------------------------------------------------- */

static void watch(struct tls_end *e, uint32_t wanted, bool was_in, bool stays_in)
{
    struct epoll_event event = { .events = wanted, .data.ptr = e };
    if (was_in && stays_in && e->watched == wanted)
        return;
    e->watched = wanted;
    if (was_in || stays_in)
        fm_assert(epoll_ctl(loop.epoll, !was_in ? EPOLL_CTL_ADD : stays_in ? EPOLL_CTL_MOD : EPOLL_CTL_DEL, e->fd, &event) == 0);
}

/* The client's end stays watched: that it has hung up must be seen at any time. The server's is not while nothing is wanted
 * of it: epoll would tell of its end over and over. */
static void watch_both(struct tls_connection *c)
{
    if (c->state == TLS_OVER)
        return;                              /* closed: epoll has forgotten them */
    uint32_t of_server = tls_wanted_of_server(c);
    watch(&c->client, tls_wanted_of_client(c), true, true);
    watch(&c->server, of_server, c->server.watched != 0, of_server != 0);
}

/* Where there is no room for another connection they wait in the listening socket, and are tried again in a while. */
static void set_accepts(bool accepts)
{
    loop.accepts = accepts;
    loop.accepts_again_ns = tls_now_ns() + TICK_MS * 1000000ull;
    watch(&loop.listening, accepts ? EPOLLIN : 0, true, true);
}

/* ---- connections -------------------------------------------------------------------------------------------- */

static bool is_ours(int fd)
{
    struct ucred peer;
    socklen_t bytes = sizeof peer;
    return getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &bytes) == 0 && peer.uid == geteuid();
}

static void begin(int fd)
{
    struct tls_connection *c = tls_accept(loop.server, fd);
    if (c == NULL) {
        close(fd);
        set_accepts(false);
        return;
    }
    c->next = loop.all;
    c->at = &loop.all;
    if (c->next != NULL)
        c->next->at = &c->next;
    loop.all = c;
    loop.connections++;
    watch(&c->client, 0, false, true);
    tls_step(c, false);
    watch_both(c);
}

static void accept_all(void)
{
    while (loop.accepts && loop.connections < CONNECTIONS_MAX) {
        int fd = accept4(loop.listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
        if (fd < 0 && (errno == EINTR || errno == ECONNABORTED))
            continue;
        if (fd < 0 && errno == EAGAIN)
            return;
        if (fd < 0)
            break;
        if (is_ours(fd))
            begin(fd);
        else
            close(fd);
    }
    set_accepts(false);
}

static void forget(struct tls_connection *c)
{
    *c->at = c->next;
    if (c->next != NULL)
        c->next->at = c->at;
    loop.connections--;
    tls_free(c);
}

/* After the events: those that are busy go on, those that began too long ago or are over are seen to. Whether one is busy, or
 * one begins: how long may be slept. */
static int look_at_all(void)
{
    uint64_t now_ns = tls_now_ns();
    if (!loop.accepts && now_ns > loop.accepts_again_ns)
        set_accepts(true);
    int wait_ms = loop.accepts ? -1 : TICK_MS;
    for (struct tls_connection *c = loop.all, *next; c != NULL; c = next) {
        next = c->next;
        if (c->busy) {
            tls_step(c, false);
            watch_both(c);
        }
        if (c->state < TLS_RELAY && now_ns > c->give_up_ns)
            tls_give_up(c);
        if (c->state < TLS_RELAY && wait_ms < 0)
            wait_ms = TICK_MS;
        if (c->busy)
            wait_ms = 0;
        if (c->state == TLS_OVER)
            forget(c);
    }
    return wait_ms;
}

static void hear_leash(void)
{
    char order[256];
    ssize_t n = recv(loop.leash.fd, order, sizeof order, MSG_DONTWAIT);
    if (n > 0 || (n < 0 && (errno == EAGAIN || errno == EINTR)))
        return;
    loop.leash_is_held = false;
    watch(&loop.leash, 0, true, false);
}

static void serve_event(const struct epoll_event *event)
{
    struct tls_end *e = event->data.ptr;
    if (e == &loop.leash) {
        hear_leash();
    } else if (e == &loop.listening) {
        accept_all();
    } else if (e->of->state != TLS_OVER) {
        tls_step(e->of, e == &e->of->client && (event->events & (EPOLLHUP | EPOLLERR)) != 0);
        watch_both(e->of);
    }
}

int tls_serve(const struct tls_server *server, int listener, int leash)
{
    struct epoll_event events[EVENTS];
    memset(&loop, 0, sizeof loop);
    loop.server = server;
    loop.epoll = epoll_create1(EPOLL_CLOEXEC);
    loop.listener = loop.listening.fd = listener;
    loop.leash.fd = leash;
    loop.leash_is_held = loop.accepts = true;
    fm_assert(loop.epoll >= 0);
    watch(&loop.leash, EPOLLIN, false, true);
    watch(&loop.listening, EPOLLIN, false, true);
    while (loop.leash_is_held || loop.connections > 0) {
        int wait_ms = look_at_all();
        if (!loop.leash_is_held && loop.connections == 0)
            break;
        int n = epoll_wait(loop.epoll, events, EVENTS, wait_ms);
        fm_assert(n >= 0 || errno == EINTR);
        for (int k = 0; k < n; k++)
            serve_event(&events[k]);
    }
    close(loop.epoll);
    return 0;
}
