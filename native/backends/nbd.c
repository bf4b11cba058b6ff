/* nbd.c - the bytes live on a server elsewhere, spoken to in the NBD protocol: requests, and what becomes of them.
 *
 * submit() queues and sends what the kernel takes at once, on the caller's thread: a hand-over would cost more than the call.
 * A connection has a thread that receives; fetches and stores have connections of their own where the server allows
 * several, so that a fetch never stands behind a batch of stores.  A connection that ends is made again, and
 * what was in flight is sent again: reads and writes of whole pages can be repeated.  What is not answered within the
 * deadline fails for good.  Before that all connections are closed, their last replies awaited: a write that is
 * given up must not come after a later one to the same place.  (If it does, the core's hash tells.)
 * Servers know nothing of each other.  One that is not used yet has neither connections nor threads.
 */
#include "nbd.h"

#include <errno.h>
#include <stddef.h>

#include "engine/sys.h"
#include "fm_assert.h"

#define LAST_REPLIES_NS 2000000000ull

struct fm_nbd fm_nbd[FM_POOL_SERVERS_MAX];

static struct fm_nbd *nbd_of(const struct fm_backend *b) { return &fm_nbd[b->number]; }

/* ---- the queues: all of it inside the lock --------------------------------------------------------------- */

static uint32_t queue_of(const struct fm_io *io) { return io->kind == FM_IO_FETCH ? 0 : 1; }

static struct fm_nbd_request *request_of(struct fm_nbd *n, const struct fm_io *io)
{
    uint32_t k = io->kind == FM_NBD_IO_TRIM ? FM_NBD_TRIM : io->frame + 1;
    fm_assert(k < FM_NBD_REQUESTS);
    return &n->request[k];
}

/* Places that were never used may hold what was being written when the process was forked. */
static void make_places(struct fm_nbd *n, const struct fm_nbd_request *r)
{
    while (n->requests_n <= (uint32_t)(r - n->request))
        n->request[n->requests_n++] = (struct fm_nbd_request){ .io = NULL };
}

static uint32_t number_of(const struct fm_nbd_connection *c) { return (uint32_t)(c - c->server->connection); }

static void push(struct fm_nbd *n, struct fm_io *io)
{
    uint32_t q = queue_of(io);
    io->next = NULL;
    if (n->head[q] == NULL)
        __atomic_store_n(&n->head[q], io, __ATOMIC_SEQ_CST);
    else
        n->tail[q]->next = io;
    n->tail[q] = io;
}

static struct fm_io *pop(struct fm_nbd *n, uint32_t q)
{
    struct fm_io *io = n->head[q];
    if (io != NULL)
        __atomic_store_n(&n->head[q], io->next, __ATOMIC_SEQ_CST);
    return io;
}

static bool is_up(const struct fm_nbd_connection *c) { return fm_nbd_load(&c->state) == FM_NBD_UP; }
static void count_in_flight(struct fm_nbd_connection *c, uint32_t n) { __atomic_add_fetch(&c->in_flight, n, __ATOMIC_RELAXED); }

/* The first half of the connections is for fetches, the second for stores; where one half is down, the other does both. */
static bool for_queue(const struct fm_nbd_connection *c, uint32_t q)
{
    uint32_t half = FM_NBD_CONNECTIONS / 2, mine = number_of(c) / half;
    bool other = false;
    for (uint32_t k = 0; k < half; k++)
        other |= is_up(&c->server->connection[(1 - mine) * half + k]);
    return mine == q || !other;
}

/* now may be a moment older than since, which another thread has written. */
static bool too_long(const struct fm_nbd *n, uint64_t since_ns, uint64_t now)
{
    return (int64_t)(now - since_ns) > (int64_t)n->server->timeout_ns;
}

bool fm_nbd_expired(const struct fm_nbd_request *r, const struct fm_nbd *n, uint64_t now)
{
    return too_long(n, r->since_ns, now);
}

/* Nothing comes from there any more, or nothing has for as long as anything is waited for. */
bool fm_nbd_hopeless(const struct fm_nbd *n, uint64_t now)
{
    return fm_nbd_gone(n) || (n->used && n->up == 0 && too_long(n, n->down_since_ns, now));
}

static void forget(struct fm_nbd *n, struct fm_nbd_request *r)
{
    r->io = NULL;
    r->cookie = 0;
    n->outstanding--;
}

struct fm_nbd_request *fm_nbd_take(struct fm_nbd_connection *c)
{
    struct fm_nbd *n = c->server;
    struct fm_io *io = NULL;
    struct fm_nbd_request *r = NULL;
    fm_lock_take(&n->lock);
    for (uint32_t q = 0; q < 2 && io == NULL && is_up(c); q++)
        io = for_queue(c, q) ? pop(n, q) : NULL;
    if (io != NULL) {
        r = request_of(n, io);
        fm_assert(r->io == io && r->cookie == 0);
        r->cookie = ++n->cookies << 16 | (uint64_t)(r - n->request);
        r->connection = number_of(c);
        fm_nbd_store(&r->sent, 0);
        count_in_flight(c, 1);
    }
    fm_lock_drop(&n->lock);
    return r;
}

bool fm_nbd_has_work(const struct fm_nbd_connection *c)
{
    for (uint32_t q = 0; q < 2; q++)
        if (__atomic_load_n(&c->server->head[q], __ATOMIC_SEQ_CST) != NULL && is_up(c) && for_queue(c, q))
            return true;
    return false;
}

/* By the connection that has the least to do. */
static void pump_queue(struct fm_nbd *n, uint32_t q)
{
    struct fm_nbd_connection *best = NULL;
    uint64_t least = UINT64_MAX;
    for (struct fm_nbd_connection *c = n->connection; c < n->connection + FM_NBD_CONNECTIONS; c++) {
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

static void tell(struct fm_nbd *n, struct fm_io *io, int32_t status, bool final)
{
    struct fm_backend *b = n->b;
    io->status = status;
    io->final = final;
    if (io->kind == FM_NBD_IO_TRIM) {
        fm_nbd_store(&n->trim_done, 1);
        fm_futex_wake(&n->trim_done, 1);
        return;
    }
    b->chain->gate_in();
    b->ended(b, io);
    b->chain->gate_out();
}

void fm_nbd_fail_all(struct fm_nbd *n, struct fm_io *io)
{
    for (struct fm_io *next; io != NULL; io = next) {
        next = io->next;
        if (io->kind == FM_IO_FETCH && !fm_nbd_gone(n))
            fm_nbd_say_lost(n);
        tell(n, io, fm_nbd_gone(n) ? ENODATA : ETIMEDOUT, true);
    }
}

void fm_nbd_end(struct fm_nbd_connection *c, struct fm_nbd_request *r, int32_t status)
{
    struct fm_nbd *n = c->server;
    fm_lock_take(&n->lock);
    struct fm_io *io = r->io;
    forget(n, r);
    count_in_flight(c, (uint32_t)-1);
    fm_lock_drop(&n->lock);
    tell(n, io, status, false);
}

/* Whoever sends may not have got round to saying that all has gone; while nobody sends it has been said, or is not so. */
struct fm_nbd_request *fm_nbd_claim(struct fm_nbd_connection *c, uint64_t cookie)
{
    struct fm_nbd *n = c->server;
    uint64_t k = cookie & 0xffff;
    if (k >= FM_NBD_REQUESTS || cookie == 0)
        return NULL;
    struct fm_nbd_request *r = &n->request[k];
    fm_lock_take(&n->lock);
    bool ours = k < n->requests_n && r->io != NULL && r->cookie == cookie && r->connection == number_of(c);
    fm_lock_drop(&n->lock);
    if (ours && __atomic_load_n(&r->sent, __ATOMIC_ACQUIRE) == 0) {
        fm_nbd_hold(c);
        fm_nbd_release(c);
        if (is_up(c))
            fm_nbd_pump(c);                  /* others may have left something to us meanwhile */
    }
    return ours && __atomic_load_n(&r->sent, __ATOMIC_ACQUIRE) != 0 ? r : NULL;
}

/* ---- connections come and go --------------------------------------------------------------------------- */

uint64_t fm_nbd_oldest(const struct fm_nbd *n, uint64_t now)
{
    uint64_t since = now;
    for (uint32_t k = 0; k < n->requests_n && n->outstanding > 0; k++)
        if (n->request[k].io != NULL && n->request[k].since_ns < since)
            since = n->request[k].since_ns;
    return since;
}

bool fm_nbd_closing(struct fm_nbd_connection *c)
{
    struct fm_nbd *n = c->server;
    uint64_t now = fm_now_ns();
    fm_lock_take(&n->lock);
    bool was_up = c->state == FM_NBD_UP;
    if (was_up) {
        c->give_up_ns = now + LAST_REPLIES_NS;
        fm_nbd_store(&c->state, FM_NBD_CLOSING);
        if (--n->up == 0)
            n->down_since_ns = fm_nbd_oldest(n, now);
        fm_add(n->b->chain->count->pool_connections_lost, 1);
    }
    fm_lock_drop(&n->lock);
    return was_up;
}

void fm_nbd_came_up(struct fm_nbd_connection *c, uint32_t flags)
{
    struct fm_nbd *n = c->server;
    fm_lock_take(&n->lock);
    bool more = n->flags == 0 && (flags & FM_NBD_FLAG_CAN_MULTI_CONN) != 0;
    fm_nbd_store(&n->flags, flags);
    fm_nbd_store(&c->blocked, 0);
    n->up++;
    fm_nbd_store(&c->state, FM_NBD_UP);
    fm_lock_drop(&n->lock);
    for (uint32_t k = 1; more && k < FM_NBD_CONNECTIONS; k++)
        (void)fm_nbd_start(&n->connection[k]);          /* one is enough, if slow */
    fm_nbd_pump(c);
}

void fm_nbd_went_down(struct fm_nbd_connection *c)
{
    struct fm_nbd *n = c->server;
    struct fm_io *failed = NULL;
    uint64_t now = fm_now_ns();
    fm_lock_take(&n->lock);
    fm_nbd_store(&c->state, FM_NBD_DOWN);
    for (struct fm_nbd_request *r = n->request; r < n->request + n->requests_n; r++) {
        if (r->io == NULL || r->cookie == 0 || r->connection != number_of(c))
            continue;
        r->cookie = 0;
        if (!fm_nbd_expired(r, n, now)) {
            push(n, r->io);
            continue;
        }
        r->io->next = failed;
        failed = r->io;
        forget(n, r);
    }
    fm_nbd_store(&c->in_flight, 0);
    fm_lock_drop(&n->lock);
    fm_nbd_fail_all(n, failed);
    pump_queue(n, 0);
    pump_queue(n, 1);
}

struct fm_io *fm_nbd_take_due(struct fm_nbd *n, uint64_t now)
{
    struct fm_io *failed = NULL;
    bool all = fm_nbd_hopeless(n, now);
    for (uint32_t q = 0; q < 2; q++) {
        struct fm_io *io = n->head[q], *next;
        __atomic_store_n(&n->head[q], NULL, __ATOMIC_SEQ_CST);
        for (; io != NULL; io = next) {
            next = io->next;
            if (!all && !fm_nbd_expired(request_of(n, io), n, now)) {
                push(n, io);
                continue;
            }
            forget(n, request_of(n, io));
            io->next = failed;
            failed = io;
        }
    }
    return failed;
}

/* ---- the backend --------------------------------------------------------------------------------------- */

/* If no thread can be had now, the tender tries again. */
void fm_nbd_begin(struct fm_nbd *n)
{
    if (fm_nbd_load(&n->started) != 0 || __atomic_exchange_n(&n->started, 1, __ATOMIC_SEQ_CST) != 0)
        return;
    if (!fm_nbd_start(&n->connection[0]))
        fm_nbd_store(&n->started, 0);
}

static void nbd_submit(struct fm_backend *b, struct fm_io *io)
{
    struct fm_nbd *n = nbd_of(b);
    uint64_t now = fm_now_ns();
    uint32_t first = n->span->first * FM_EXTENT_SLOTS;
    fm_assert(io->slot >= first && io->slot - first + io->n <= n->span->extents * FM_EXTENT_SLOTS);
    fm_lock_take(&n->lock);
    if (!n->used)
        n->down_since_ns = now;
    n->used = 1;
    bool refused = fm_nbd_hopeless(n, now);
    struct fm_nbd_request *r = request_of(n, io);
    make_places(n, r);
    fm_assert(r->io == NULL);
    if (!refused) {
        *r = (struct fm_nbd_request){ .io = io, .since_ns = now };
        n->outstanding++;
        push(n, io);
    }
    fm_lock_drop(&n->lock);
    if (!refused) {
        fm_nbd_begin(n);
        pump_queue(n, queue_of(io));
        return;
    }
    if (io->kind == FM_NBD_IO_TRIM) {
        fm_nbd_store(&n->trim_done, 1);
        return;
    }
    if (io->kind == FM_IO_FETCH && !fm_nbd_gone(n))
        fm_nbd_say_lost(n);
    io->status = fm_nbd_gone(n) ? ENODATA : ETIMEDOUT;
    io->final = true;
    b->ended(b, io);
}

/* All of it was promised when the server was asked. */
static bool nbd_grant(struct fm_backend *b, uint32_t extent)
{
    bool shut = fm_slot_shut(b->chain->ledger, extent * FM_EXTENT_SLOTS);
    b->chain->full = shut ? "the pool's server has no place for us now: pages stay local, over the budget." : NULL;
    return !shut;
}

static bool nbd_trim(struct fm_backend *b, uint32_t extent)
{
    (void)extent;
    return !fm_nbd_trim_later(nbd_of(b));
}

/* Never waits for the server: a process may be taken over, and a child be forked, while it does not answer. */
static bool nbd_open(struct fm_backend *b)
{
    struct fm_nbd *n = nbd_of(b);
    __builtin_memset(n, 0, offsetof(struct fm_nbd, request));     /* in the child of a fork it is the parent's */
    n->b = b;
    n->server = &b->chain->servers[b->number];
    fm_talk_begin(&n->talk, b, n->server);
    n->span = fm_pool_span(b->chain->ledger, b->number);
    for (uint32_t k = 0; k < FM_NBD_CONNECTIONS; k++) {
        n->connection[k].server = n;
        n->connection[k].fd = -1;
    }
    return fm_nbd_tend(n);
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
