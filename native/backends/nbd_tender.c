/* nbd_tender.c - one thread that looks after all NBD servers of the process: deadlines, what the kernel has room for
 * again, and what is said of a server.  And a thread for each server that gives space back, because it waits for answers.
 */
#include <errno.h>
#include <poll.h>
#include <stddef.h>
#include <sys/eventfd.h>
#include <sys/socket.h>

#include "engine/sys.h"
#include "fm_assert.h"
#include "nbd.h"

#define TICK_NS 250000000ull
#define GATHER_NS 10000000ull           /* for the neighbours of an extent that has become empty */

static struct {
    int bell_fd;
    uint32_t open;                      /* a bit for each server that is looked after */
} tending;

_Static_assert(FM_POOL_SERVERS_MAX <= 32, "a bit for each server");

static bool is_open(const struct fm_nbd *n) { return (fm_nbd_load(&tending.open) >> (n - fm_nbd) & 1) != 0; }

/* ---- words --------------------------------------------------------------------------------------------- */

static uint64_t stored_bytes(const struct fm_nbd *n)
{
    return fm_pool_ledger_span_used(n->b->chain->ledger->base, n->b->number) * FM_PAGE_BYTES;
}

static void shut(struct fm_nbd *n, bool on)
{
    fm_pool_span_shut(n->b->chain->ledger, n->b->number, on);
    if (fm_nbd_load(&n->server->down) != on)
        fm_nbd_store(&n->server->down, on);
}

void fm_nbd_say_lost(struct fm_nbd *n) { fm_talk_lost(&n->talk, stored_bytes(n)); }

/* What is here of its pages is not to be thrown away any more as having a copy there, and nothing new goes there. */
void fm_nbd_is_gone(struct fm_nbd *n, const char *why)
{
    shut(n, true);
    if (__atomic_exchange_n(&n->gone, 1, __ATOMIC_SEQ_CST) == 0 && fm_nbd_load(&n->server->gone) != FM_SERVER_GIVEN_BACK)
        fm_talk_say(&n->talk, FM_LEVEL_ERROR, why, ": what was stored there is lost; bytes", stored_bytes(n));
    fm_nbd_ring();
}

/* ---- the tender ---------------------------------------------------------------------------------------- */

void fm_nbd_ring(void)
{
    uint64_t one = 1;
    fm_sys(SYS_write, tending.bell_fd, &one, sizeof one);
}

static bool any_overdue(const struct fm_nbd *n, uint64_t now)
{
    for (const struct fm_nbd_request *r = n->request; r < n->request + n->requests_n; r++)
        if (r->io != NULL && r->cookie != 0 && fm_nbd_expired(r, n, now))
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

static void look(struct fm_nbd *n)
{
    uint64_t now = fm_now_ns();
    struct fm_io *failed = NULL;
    bool overdue = false;
    fm_lock_take(&n->lock);
    uint64_t since = fm_nbd_oldest(n, now);
    bool up = n->up > 0, hopeless = fm_nbd_hopeless(n, now), waits = n->outstanding > 0, used = n->used != 0;
    if (waits) {
        overdue = any_overdue(n, now);
        failed = fm_nbd_take_due(n, now);
    }
    fm_lock_drop(&n->lock);
    if (used || hopeless)                    /* who has not asked anything of it knows nothing */
        shut(n, hopeless);
    if (waits && !hopeless)
        fm_nbd_begin(n);
    if (!fm_nbd_gone(n))
        fm_talk_look(&n->talk, now, since, up);
    overdue |= fm_nbd_gone(n);               /* what still comes from there is of no use */
    for (struct fm_nbd_connection *c = n->connection; overdue && c < n->connection + FM_NBD_CONNECTIONS; c++)
        half_close(c);
    fm_nbd_fail_all(n, failed);
}

/* The connections that the kernel takes no more on for now. */
static uint32_t blocked_ones(struct pollfd *p, struct fm_nbd_connection **which)
{
    uint32_t count = 0;
    for (struct fm_nbd *n = fm_nbd; n < fm_nbd + FM_POOL_SERVERS_MAX; n++) {
        if (!is_open(n))
            continue;
        for (struct fm_nbd_connection *c = n->connection; c < n->connection + FM_NBD_CONNECTIONS; c++) {
            if (fm_nbd_load(&c->blocked) == 0)
                continue;
            p[count] = (struct pollfd){ .fd = __atomic_load_n(&c->fd, __ATOMIC_RELAXED), .events = POLLOUT };
            which[count++] = c;
        }
    }
    return count;
}

static uint64_t tick_of(const struct fm_nbd *n)
{
    return n->server->timeout_ns / 4 < TICK_NS ? n->server->timeout_ns / 4 : TICK_NS;
}

static void tender(void *arg)
{
    struct pollfd p[FM_POOL_SERVERS_MAX * FM_NBD_CONNECTIONS + 1];
    struct fm_nbd_connection *which[FM_POOL_SERVERS_MAX * FM_NBD_CONNECTIONS];
    uint64_t tick_ns = tick_of(arg), looked_ns = 0;
    for (;;) {
        uint32_t blocked = blocked_ones(p + 1, which);
        p[0] = (struct pollfd){ .fd = tending.bell_fd, .events = POLLIN };
        fm_sys(SYS_poll, p, blocked + 1, tick_ns / 1000000 + 1);
        uint64_t bells;
        if (p[0].revents != 0)
            fm_sys(SYS_read, tending.bell_fd, &bells, sizeof bells);
        for (uint32_t k = 0; k < blocked; k++)
            if (p[k + 1].revents != 0)
                fm_nbd_pump(which[k]);
        bool due = fm_now_ns() - looked_ns >= tick_ns;
        for (struct fm_nbd *n = fm_nbd; n < fm_nbd + FM_POOL_SERVERS_MAX; n++) {
            if (!is_open(n))
                continue;
            if (fm_nbd_load(&n->server->gone) != 0)
                fm_nbd_is_gone(n, "has ended our lease");
            if (due || fm_nbd_gone(n))
                look(n);
        }
        looked_ns = due ? fm_now_ns() : looked_ns;
    }
}

bool fm_nbd_tend(struct fm_nbd *n)
{
    struct fm_chain *chain = n->b->chain;
    if (!chain->nbd_is_tended) {
        fm_nbd_store(&tending.open, 0);      /* in the child of a fork it is the parent's */
        tending.bell_fd = (int)fm_sys(SYS_eventfd2, 0, EFD_CLOEXEC | EFD_NONBLOCK);
        chain->nbd_is_tended = tending.bell_fd >= 0 && chain->thread(tender, n);
    }
    if (chain->nbd_is_tended)
        __atomic_fetch_or(&tending.open, 1u << (n - fm_nbd), __ATOMIC_SEQ_CST);
    return chain->nbd_is_tended;
}

/* ---- space is given back ------------------------------------------------------------------------------- */

/* Best effort: what stays allocated there holds nothing that is read again.  But nobody may have the extents before the
 * server has answered: it would throw away what is stored there next. */
static void punch(void *ctx, uint32_t extent, uint32_t count)
{
    struct fm_nbd *n = ctx;
    struct fm_io io = { .kind = FM_NBD_IO_TRIM, .slot = extent * FM_EXTENT_SLOTS, .n = count * FM_EXTENT_SLOTS };
    if ((fm_nbd_load(&n->flags) & FM_NBD_FLAG_SEND_TRIM) == 0)
        return;
    fm_nbd_store(&n->trim_done, 0);
    n->b->submit(n->b, &io);
    while (fm_nbd_load(&n->trim_done) == 0)
        fm_futex_wait(&n->trim_done, 0, -1);
}

static void trimmer(void *arg)
{
    struct fm_nbd *n = arg;
    uint32_t seen = 0;
    for (;;) {
        while (fm_nbd_load(&n->trim_bell) == seen)
            fm_futex_wait(&n->trim_bell, seen, -1);
        fm_sleep_ns(GATHER_NS);
        seen = fm_nbd_load(&n->trim_bell);
        fm_pool_ledger_trim(n->b->chain->ledger, n->b->number, punch, n);
    }
}

bool fm_nbd_trim_later(struct fm_nbd *n)
{
    if (__atomic_exchange_n(&n->trimmer, 1, __ATOMIC_SEQ_CST) == 0 && !n->b->chain->thread(trimmer, n)) {
        fm_nbd_store(&n->trimmer, 0);
        return false;
    }
    __atomic_add_fetch(&n->trim_bell, 1, __ATOMIC_SEQ_CST);
    fm_futex_wake(&n->trim_bell, 1);
    return true;
}
