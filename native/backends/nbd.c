/* nbd.c - the bytes live on a server elsewhere, spoken to in the NBD protocol: requests, deadlines, and what is said of them.
 *
 * submit() queues and sends what the kernel takes at once, on the caller's thread: a hand-over would cost more than the call.
 * A connection has a thread that receives; fetches and stores have connections of their own where the server allows
 * several, so that a fetch never stands behind a batch of stores.  A connection that ends is made again, and
 * what was in flight is sent again: reads and writes of whole pages can be repeated.  What is not answered within the
 * deadline fails for good.  Before that all connections are closed, their last replies awaited: a write that is
 * given up must not come after a later one to the same place.  (If it does, the core's hash tells.)
 */
#include "nbd.h"

#include <errno.h>
#include <poll.h>
#include <stddef.h>
#include <sys/eventfd.h>
#include <sys/socket.h>

#include "engine/sys.h"
#include "fm_assert.h"

#define LAST_REPLIES_NS 2000000000ull
#define SILENT_NS 2000000000ull         /* then it is worth a word */
#define TICK_NS 250000000ull
#define GATHER_NS 10000000ull           /* for the neighbours of an extent that has become empty */

struct fm_nbd fm_nbd;

/* ---- the queues: all of it inside the lock --------------------------------------------------------------- */

static uint32_t queue_of(const struct fm_io *io) { return io->kind == FM_IO_FETCH ? 0 : 1; }

static struct fm_nbd_request *request_of(const struct fm_io *io)
{
    uint32_t k = io->kind == FM_NBD_IO_TRIM ? FM_NBD_TRIM : io->frame;
    fm_assert(k < FM_NBD_REQUESTS);
    return &fm_nbd.request[k];
}

static uint32_t number_of(const struct fm_nbd_connection *c) { return (uint32_t)(c - fm_nbd.connection); }

static void push(struct fm_io *io)
{
    uint32_t q = queue_of(io);
    io->next = NULL;
    if (fm_nbd.head[q] == NULL)
        __atomic_store_n(&fm_nbd.head[q], io, __ATOMIC_SEQ_CST);
    else
        fm_nbd.tail[q]->next = io;
    fm_nbd.tail[q] = io;
}

static struct fm_io *pop(uint32_t q)
{
    struct fm_io *io = fm_nbd.head[q];
    if (io != NULL)
        __atomic_store_n(&fm_nbd.head[q], io->next, __ATOMIC_SEQ_CST);
    return io;
}

static bool is_up(const struct fm_nbd_connection *c) { return fm_nbd_load(&c->state) == FM_NBD_UP; }
static bool is_gone(void) { return fm_nbd_load(&fm_nbd.gone) != 0; }
static void count_in_flight(struct fm_nbd_connection *c, uint32_t n) { __atomic_add_fetch(&c->in_flight, n, __ATOMIC_RELAXED); }

/* The first half of the connections is for fetches, the second for stores; where one half is down, the other does both. */
static bool for_queue(const struct fm_nbd_connection *c, uint32_t q)
{
    uint32_t half = FM_NBD_CONNECTIONS / 2, mine = number_of(c) / half;
    bool other = false;
    for (uint32_t k = 0; k < half; k++)
        other |= is_up(&fm_nbd.connection[(1 - mine) * half + k]);
    return mine == q || !other;
}

/* now may be a moment older than since, which another thread has written. */
static bool too_long(uint64_t since_ns, uint64_t now) { return (int64_t)(now - since_ns) > (int64_t)fm_nbd.server->timeout_ns; }
static bool expired(const struct fm_nbd_request *r, uint64_t now) { return too_long(r->since_ns, now); }

/* Nothing comes from there any more, or nothing has for as long as anything is waited for. */
static bool hopeless(uint64_t now)
{
    return is_gone() || (fm_nbd.up == 0 && too_long(fm_nbd.down_since_ns, now));
}

static void forget(struct fm_nbd_request *r)
{
    r->io = NULL;
    r->cookie = 0;
    fm_nbd.outstanding--;
}

struct fm_nbd_request *fm_nbd_take(struct fm_nbd_connection *c)
{
    struct fm_io *io = NULL;
    struct fm_nbd_request *r = NULL;
    fm_lock_take(&fm_nbd.lock);
    for (uint32_t q = 0; q < 2 && io == NULL && is_up(c); q++)
        io = for_queue(c, q) ? pop(q) : NULL;
    if (io != NULL) {
        r = request_of(io);
        fm_assert(r->io == io && r->cookie == 0);
        r->cookie = ++fm_nbd.cookies << 16 | (uint64_t)(r - fm_nbd.request);
        r->connection = number_of(c);
        fm_nbd_store(&r->sent, 0);
        count_in_flight(c, 1);
    }
    fm_lock_drop(&fm_nbd.lock);
    return r;
}

bool fm_nbd_has_work(const struct fm_nbd_connection *c)
{
    for (uint32_t q = 0; q < 2; q++)
        if (__atomic_load_n(&fm_nbd.head[q], __ATOMIC_SEQ_CST) != NULL && is_up(c) && for_queue(c, q))
            return true;
    return false;
}

/* By the connection that has the least to do. */
static void pump_queue(uint32_t q)
{
    struct fm_nbd_connection *best = NULL;
    uint64_t least = UINT64_MAX;
    for (struct fm_nbd_connection *c = fm_nbd.connection; c < fm_nbd.connection + FM_NBD_CONNECTIONS; c++) {
        uint64_t load = (uint64_t)fm_nbd_load(&c->blocked) << 32 | fm_nbd_load(&c->in_flight);
        if (load >= least || !is_up(c) || !for_queue(c, q))
            continue;
        least = load;
        best = c;
    }
    if (best != NULL)
        fm_nbd_pump(best);
}

/* ---- ends ---------------------------------------------------------------------------------------------- */

static void tell(struct fm_io *io, int32_t status, bool final)
{
    struct fm_backend *b = fm_nbd.b;
    io->status = status;
    io->final = final;
    if (io->kind == FM_NBD_IO_TRIM) {
        fm_nbd_store(&fm_nbd.trim_done, 1);
        fm_futex_wake(&fm_nbd.trim_done, 1);
        return;
    }
    b->chain->gate_in();
    b->ended(b, io);
    b->chain->gate_out();
}

static void say(int level, const char *text, const char *more, uint64_t number)
{
    char line[FM_MESSAGE_BYTES];
    const char *part[] = { "the pool's server ", fm_nbd.server->name, " ", text, more };
    uint32_t at = 0;
    for (uint32_t k = 0; k < sizeof part / sizeof part[0]; k++)
        for (const char *s = part[k]; *s != 0 && at + 1 < sizeof line; s++)
            line[at++] = *s;
    line[at] = 0;
    fm_nbd.b->chain->say(level, line, number);
}

static uint64_t stored_bytes(void) { return fm_pool_ledger_used(fm_nbd.b->chain->ledger->base) * FM_PAGE_BYTES; }

static void say_lost(void)
{
    if (__atomic_exchange_n(&fm_nbd.told_lost, 1, __ATOMIC_SEQ_CST) == 0)
        say(FM_LEVEL_ERROR, "has not answered for too long:", " what is touched of its pages is lost; bytes there",
            stored_bytes());
}

/* A list of transfers that are out of the books. */
static void fail_all(struct fm_io *io)
{
    for (struct fm_io *next; io != NULL; io = next) {
        next = io->next;
        if (io->kind == FM_IO_FETCH && !is_gone())
            say_lost();
        tell(io, is_gone() ? ENODATA : ETIMEDOUT, true);
    }
}

void fm_nbd_end(struct fm_nbd_connection *c, struct fm_nbd_request *r, int32_t status)
{
    fm_lock_take(&fm_nbd.lock);
    struct fm_io *io = r->io;
    forget(r);
    count_in_flight(c, (uint32_t)-1);
    fm_lock_drop(&fm_nbd.lock);
    tell(io, status, false);
}

/* Whoever sends may not have got round to saying that all has gone; while nobody sends it has been said, or is not so. */
struct fm_nbd_request *fm_nbd_claim(struct fm_nbd_connection *c, uint64_t cookie)
{
    uint64_t k = cookie & 0xffff;
    if (k >= FM_NBD_REQUESTS || cookie == 0)
        return NULL;
    struct fm_nbd_request *r = &fm_nbd.request[k];
    fm_lock_take(&fm_nbd.lock);
    bool ours = r->io != NULL && r->cookie == cookie && r->connection == number_of(c);
    fm_lock_drop(&fm_nbd.lock);
    if (ours && __atomic_load_n(&r->sent, __ATOMIC_ACQUIRE) == 0) {
        fm_nbd_hold(c);
        fm_nbd_release(c);
        if (is_up(c))
            fm_nbd_pump(c);                  /* others may have left something to us meanwhile */
    }
    return ours && __atomic_load_n(&r->sent, __ATOMIC_ACQUIRE) != 0 ? r : NULL;
}

/* ---- connections come and go --------------------------------------------------------------------------- */

static uint64_t oldest(uint64_t now)
{
    uint64_t since = now;
    for (uint32_t k = 0; k < FM_NBD_REQUESTS && fm_nbd.outstanding > 0; k++)
        if (fm_nbd.request[k].io != NULL && fm_nbd.request[k].since_ns < since)
            since = fm_nbd.request[k].since_ns;
    return since;
}

bool fm_nbd_closing(struct fm_nbd_connection *c)
{
    uint64_t now = fm_now_ns();
    fm_lock_take(&fm_nbd.lock);
    bool was_up = c->state == FM_NBD_UP;
    if (was_up) {
        c->give_up_ns = now + LAST_REPLIES_NS;
        fm_nbd_store(&c->state, FM_NBD_CLOSING);
        if (--fm_nbd.up == 0)
            fm_nbd.down_since_ns = oldest(now);
        fm_add(fm_nbd.b->chain->count->pool_connections_lost, 1);
    }
    fm_lock_drop(&fm_nbd.lock);
    return was_up;
}

void fm_nbd_came_up(struct fm_nbd_connection *c, uint32_t flags)
{
    fm_lock_take(&fm_nbd.lock);
    bool more = fm_nbd.flags == 0 && (flags & FM_NBD_FLAG_CAN_MULTI_CONN) != 0;
    fm_nbd_store(&fm_nbd.flags, flags);
    fm_nbd_store(&c->blocked, 0);
    fm_nbd.up++;
    fm_nbd_store(&c->state, FM_NBD_UP);
    fm_lock_drop(&fm_nbd.lock);
    for (uint32_t k = 1; more && k < FM_NBD_CONNECTIONS; k++)
        (void)fm_nbd_start(&fm_nbd.connection[k]);          /* one is enough, if slow */
    fm_nbd_pump(c);
}

void fm_nbd_went_down(struct fm_nbd_connection *c)
{
    struct fm_io *failed = NULL;
    uint64_t now = fm_now_ns();
    fm_lock_take(&fm_nbd.lock);
    fm_nbd_store(&c->state, FM_NBD_DOWN);
    for (struct fm_nbd_request *r = fm_nbd.request; r < fm_nbd.request + FM_NBD_REQUESTS; r++) {
        if (r->io == NULL || r->cookie == 0 || r->connection != number_of(c))
            continue;
        r->cookie = 0;
        if (!expired(r, now)) {
            push(r->io);
            continue;
        }
        r->io->next = failed;
        failed = r->io;
        forget(r);
    }
    fm_nbd_store(&c->in_flight, 0);
    fm_lock_drop(&fm_nbd.lock);
    fail_all(failed);
    pump_queue(0);
    pump_queue(1);
}

void fm_nbd_is_gone(const char *why)
{
    if (__atomic_exchange_n(&fm_nbd.gone, 1, __ATOMIC_SEQ_CST) == 0)
        say(FM_LEVEL_ERROR, why, ": what was stored there is lost; bytes", stored_bytes());
    fm_nbd_ring();
}

/* ---- the tender: what is due, and what the kernel has room for again --------------------------------------- */

void fm_nbd_ring(void)
{
    uint64_t one = 1;
    fm_sys(SYS_write, fm_nbd.bell_fd, &one, sizeof one);
}

static struct fm_io *take_due(uint64_t now)
{
    struct fm_io *failed = NULL;
    bool all = hopeless(now);
    for (uint32_t q = 0; q < 2; q++) {
        struct fm_io *io = fm_nbd.head[q], *next;
        __atomic_store_n(&fm_nbd.head[q], NULL, __ATOMIC_SEQ_CST);
        for (; io != NULL; io = next) {
            next = io->next;
            if (!all && !expired(request_of(io), now)) {
                push(io);
                continue;
            }
            forget(request_of(io));
            io->next = failed;
            failed = io;
        }
    }
    return failed;
}

static bool any_overdue(uint64_t now)
{
    for (struct fm_nbd_request *r = fm_nbd.request; r < fm_nbd.request + FM_NBD_REQUESTS; r++)
        if (r->io != NULL && r->cookie != 0 && expired(r, now))
            return true;
    return false;
}

/* A last request may be half sent: then the server does not count it.  Its replies to the others are still taken. */
static void half_close(struct fm_nbd_connection *c)
{
    fm_nbd_hold(c);
    if (fm_nbd_closing(c))
        fm_sys(SYS_shutdown, c->fd, SHUT_WR);
    fm_nbd_release(c);
}

static void say_how_it_is(uint64_t now, uint64_t since, bool up)
{
    uint64_t limit = fm_nbd.server->timeout_ns / 2 < SILENT_NS ? fm_nbd.server->timeout_ns / 2 : SILENT_NS;
    bool silent = now - since > limit;
    if (silent && fm_nbd.silent_since_ns == 0) {
        fm_nbd.silent_since_ns = since;
        say(FM_LEVEL_WARNING, "does not answer.", " Whoever needs a page that is there waits.", 0);
    } else if (!silent && up && fm_nbd.silent_since_ns != 0) {
        uint64_t silent_ns = now - fm_nbd.silent_since_ns;
        fm_nbd.silent_since_ns = 0;
        fm_nbd_store(&fm_nbd.told_lost, 0);
        fm_add(fm_nbd.b->chain->count->pool_silent_ns, silent_ns);
        say(FM_LEVEL_WARNING, "answers again;", " it was silent for so many ms:", silent_ns / 1000000);
    }
}

static void look(void)
{
    uint64_t now = fm_now_ns();
    struct fm_io *failed = NULL;
    bool overdue = false;
    fm_lock_take(&fm_nbd.lock);
    uint64_t since = oldest(now);
    bool up = fm_nbd.up > 0;
    if (fm_nbd.outstanding > 0) {
        overdue = any_overdue(now);
        failed = take_due(now);
    }
    fm_lock_drop(&fm_nbd.lock);
    if (!is_gone())
        say_how_it_is(now, since, up);
    for (struct fm_nbd_connection *c = fm_nbd.connection; overdue && c < fm_nbd.connection + FM_NBD_CONNECTIONS; c++)
        half_close(c);
    fail_all(failed);
}

static void tender(void *arg)
{
    uint64_t tick_ns = fm_nbd.server->timeout_ns / 4 < TICK_NS ? fm_nbd.server->timeout_ns / 4 : TICK_NS, looked_ns = 0;
    (void)arg;
    for (;;) {
        struct pollfd p[FM_NBD_CONNECTIONS + 1] = { { .fd = fm_nbd.bell_fd, .events = POLLIN } };
        for (uint32_t k = 0; k < FM_NBD_CONNECTIONS; k++) {
            struct fm_nbd_connection *c = &fm_nbd.connection[k];
            bool blocked = fm_nbd_load(&c->blocked) != 0;
            p[k + 1] = (struct pollfd){ .fd = blocked ? __atomic_load_n(&c->fd, __ATOMIC_RELAXED) : -1, .events = POLLOUT };
        }
        fm_sys(SYS_poll, p, FM_NBD_CONNECTIONS + 1, tick_ns / 1000000 + 1);
        uint64_t bells;
        if (p[0].revents != 0)
            fm_sys(SYS_read, fm_nbd.bell_fd, &bells, sizeof bells);
        for (uint32_t k = 0; k < FM_NBD_CONNECTIONS; k++)
            if (p[k + 1].revents != 0)
                fm_nbd_pump(&fm_nbd.connection[k]);
        if (fm_nbd_load(&fm_nbd.server->gone) != 0)
            fm_nbd_is_gone("has ended our lease");
        if (fm_now_ns() - looked_ns >= tick_ns || is_gone()) {
            look();
            looked_ns = fm_now_ns();
        }
    }
}

/* ---- space --------------------------------------------------------------------------------------------- */

/* All of it was promised when the pool was opened. */
static bool nbd_grant(struct fm_backend *b, uint32_t extent)
{
    bool gone = is_gone();
    (void)extent;
    b->chain->full = gone ? "the pool's server has no place for us any more: pages stay local, over the budget." : NULL;
    return !gone;
}

static bool nbd_trim(struct fm_backend *b, uint32_t extent)
{
    (void)b;
    (void)extent;
    __atomic_add_fetch(&fm_nbd.trim_bell, 1, __ATOMIC_SEQ_CST);
    fm_futex_wake(&fm_nbd.trim_bell, 1);
    return false;
}

/* Best effort: what stays allocated there holds nothing that is read again.  But nobody may have the extents before the
 * server has answered: it would throw away what is stored there next. */
static void punch(void *ctx, uint32_t extent, uint32_t n)
{
    struct fm_io io = { .kind = FM_NBD_IO_TRIM, .slot = extent * FM_EXTENT_SLOTS, .n = n * FM_EXTENT_SLOTS };
    (void)ctx;
    if ((fm_nbd_load(&fm_nbd.flags) & FM_NBD_FLAG_SEND_TRIM) == 0)
        return;
    fm_nbd_store(&fm_nbd.trim_done, 0);
    fm_nbd.b->submit(fm_nbd.b, &io);
    while (fm_nbd_load(&fm_nbd.trim_done) == 0)
        fm_futex_wait(&fm_nbd.trim_done, 0, -1);
}

static void trimmer(void *arg)
{
    uint32_t seen = 0;
    (void)arg;
    for (;;) {
        while (fm_nbd_load(&fm_nbd.trim_bell) == seen)
            fm_futex_wait(&fm_nbd.trim_bell, seen, -1);
        fm_sleep_ns(GATHER_NS);
        seen = fm_nbd_load(&fm_nbd.trim_bell);
        fm_pool_ledger_trim(fm_nbd.b->chain->ledger, punch, NULL);
    }
}

/* ---- the backend --------------------------------------------------------------------------------------- */

static void nbd_submit(struct fm_backend *b, struct fm_io *io)
{
    uint64_t now = fm_now_ns();
    fm_assert(((uint64_t)io->slot + io->n) * FM_PAGE_BYTES <= b->chain->pool_bytes);
    fm_lock_take(&fm_nbd.lock);
    bool refused = hopeless(now);
    struct fm_nbd_request *r = request_of(io);
    fm_assert(r->io == NULL);
    if (!refused) {
        *r = (struct fm_nbd_request){ .io = io, .since_ns = now };
        fm_nbd.outstanding++;
        push(io);
    }
    fm_lock_drop(&fm_nbd.lock);
    if (!refused) {
        pump_queue(queue_of(io));
        return;
    }
    if (io->kind == FM_NBD_IO_TRIM) {
        fm_nbd_store(&fm_nbd.trim_done, 1);
        return;
    }
    if (io->kind == FM_IO_FETCH && !is_gone())
        say_lost();
    io->status = is_gone() ? ENODATA : ETIMEDOUT;
    io->final = true;
    b->ended(b, io);
}

/* Never waits for the server: a process may be taken over, and a child be forked, while it does not answer. */
static bool nbd_open(struct fm_backend *b)
{
    __builtin_memset(&fm_nbd, 0, sizeof fm_nbd);       /* in the child of a fork it is the parent's */
    fm_nbd.b = b;
    fm_nbd.server = b->chain->server;
    fm_nbd.down_since_ns = fm_now_ns();
    for (uint32_t k = 0; k < FM_NBD_CONNECTIONS; k++)
        fm_nbd.connection[k].fd = -1;
    fm_nbd.bell_fd = (int)fm_sys(SYS_eventfd2, 0, EFD_CLOEXEC | EFD_NONBLOCK);
    return fm_nbd.bell_fd >= 0 && fm_nbd_start(&fm_nbd.connection[0]) && b->chain->thread(tender, NULL) &&
           b->chain->thread(trimmer, NULL);
}

const struct fm_backend fm_backend_nbd = {
    .size = sizeof(struct fm_backend),
    .version = FM_BACKEND_VERSION,
    .name = "nbd",
    .open = nbd_open,
    .submit = nbd_submit,
    .grant = nbd_grant,
    .trim = nbd_trim,
};
