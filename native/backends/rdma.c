/* rdma.c - the bytes live in memory of a server elsewhere, read and written by one-sided RDMA: requests, deadlines, and what
 * is said of them.
 *
 * No RDMA library may live in the program's process, so an agent of the job (native/agent/rdma_*.c) posts the transfers.  It
 * and this process share bounce frames: what is stored is copied there before it is asked for, what is fetched is copied
 * from there when it has come. submit() does that on the caller's thread; one thread (rdma_session.c) takes what has ended
 * and looks at deadlines, for all servers.
 *
 * There are fewer bounce frames than frames: who finds none waits in a queue, first come, first served.  They
 * are never used again while a transfer of them could be under way: a request that is not answered in time
 * ends the whole session, and the next has new ones.  The agent asks the server for another queue pair only when the old one
 * is gone at both ends, so a write that was given up can't come after a later one.
 * Servers know nothing of each other: each has a session of its own, once something is asked of it.
 */
#include "rdma.h"

#include <errno.h>
#include <stddef.h>

#include "engine/sys.h"
#include "fm_assert.h"

#define USERS_STEP_NS 10000

struct fm_rdma fm_rdma[FM_POOL_SERVERS_MAX];

static struct fm_rdma *rdma_of(const struct fm_backend *b) { return &fm_rdma[b->number]; }
static uint32_t first_slot(const struct fm_rdma *r) { return r->span->first * FM_EXTENT_SLOTS; }

static struct fm_rdma_transfer *transfer_of(struct fm_rdma *r, const struct fm_io *io)
{
    fm_assert(io->n > 0 && io->n <= FM_RDMA_PAGES_MAX && io->frame < FM_BACKEND_FRAMES_MAX);
    return &r->transfer[io->frame];
}

/* now may be a moment older than since, which another thread has written. */
static bool too_long(const struct fm_rdma *r, uint64_t since_ns, uint64_t now)
{
    return (int64_t)(now - since_ns) > (int64_t)r->server->timeout_ns;
}

/* Nothing comes from there any more, or nothing has for as long as anything is waited for. */
static bool hopeless(const struct fm_rdma *r, uint64_t now)
{
    return fm_rdma_gone(r) || (r->used && r->up == 0 && too_long(r, r->down_since_ns, now));
}

/* ---- ends ---------------------------------------------------------------------------------------------- */

static uint64_t stored_bytes(const struct fm_rdma *r)
{
    return fm_pool_ledger_span_used(r->b->chain->ledger->base, r->b->number) * FM_PAGE_BYTES;
}

static void say_lost(struct fm_rdma *r) { fm_talk_lost(&r->talk, stored_bytes(r)); }

/* What is here of its pages is not to be thrown away any more as having a copy there, and nothing new goes there. */
static void shut(struct fm_rdma *r, bool on)
{
    fm_pool_span_shut(r->b->chain->ledger, r->b->number, on);
    if (fm_rdma_load(&r->server->down) != on)
        fm_rdma_store(&r->server->down, on);
}

static void tell(struct fm_rdma *r, struct fm_io *io, int32_t status, bool final)
{
    struct fm_backend *b = r->b;
    io->status = status;
    io->final = final;
    b->chain->gate_in();
    b->ended(b, io);
    b->chain->gate_out();
}

/* A list of transfers that are out of the books. */
static void fail_all(struct fm_rdma *r, struct fm_io *io)
{
    for (struct fm_io *next; io != NULL; io = next) {
        next = io->next;
        if (io->kind == FM_IO_FETCH && !fm_rdma_gone(r))
            say_lost(r);
        tell(r, io, fm_rdma_gone(r) ? ENODATA : ETIMEDOUT, true);
    }
}

static void forget(struct fm_rdma *r, struct fm_rdma_transfer *t)
{
    *t = (struct fm_rdma_transfer){ 0 };
    __atomic_sub_fetch(&r->outstanding, 1, __ATOMIC_SEQ_CST);
}

/* ---- bounce frames, and the queue for them: all of it inside the lock --------------------------------------- */

static bool is_taken(const struct fm_rdma *r, uint32_t frame) { return (r->taken[frame / 64] >> frame % 64 & 1) != 0; }

static void set_taken(struct fm_rdma *r, uint32_t frame, uint32_t n, bool on)
{
    for (uint32_t f = frame; f < frame + n; f++) {
        fm_assert(is_taken(r, f) != on);
        r->taken[f / 64] ^= 1ull << f % 64;
    }
}

/* Neighbours for a transfer; false: there are none now. */
static bool take_bounce(struct fm_rdma *r, struct fm_rdma_transfer *t)
{
    uint32_t n = t->io->n, free = 0;
    for (uint32_t f = 0; f < FM_RDMA_FRAMES; f++) {
        free = is_taken(r, f) ? 0 : free + 1;
        if (free < n)
            continue;
        t->bounce = f + 1 - n;
        t->state = FM_RDMA_ISSUING;
        set_taken(r, t->bounce, n, true);
        r->bounced[t->bounce] = t;
        return true;
    }
    return false;
}

static void push(struct fm_rdma *r, struct fm_rdma_transfer *t)
{
    t->state = FM_RDMA_WAITING;
    t->io->next = NULL;
    if (r->head == NULL)
        r->head = t->io;
    else
        r->tail->next = t->io;
    r->tail = t->io;
}

/* The next that can be issued, which the caller then does; or NULL. */
static struct fm_rdma_transfer *pop(struct fm_rdma *r)
{
    struct fm_io *io = r->head;
    if (io == NULL || !r->up || !take_bounce(r, transfer_of(r, io)))
        return NULL;
    r->head = io->next;
    return transfer_of(r, io);
}

/* ---- issuing ------------------------------------------------------------------------------------------- */

/* The caller counts among the users, or is the session's thread, so the session's memory is there. */
static void issue(struct fm_rdma *r, struct fm_rdma_transfer *t)
{
    const struct fm_io *io = t->io;
    struct fm_rdma_ring *ring = r->session.ring;
    if (io->kind == FM_IO_STORE)
        __builtin_memcpy(fm_rdma_bounce(r, t->bounce), fm_io_bytes(r->b, io), (uint64_t)io->n * FM_PAGE_BYTES);
    fm_lock_take(&r->lock);
    ring->request[ring->requested % FM_RDMA_FRAMES] = (struct fm_rdma_request){
        .kind = io->kind == FM_IO_FETCH ? FM_RDMA_READ : FM_RDMA_WRITE, .frame = t->bounce, .slot = io->slot - first_slot(r),
        .n = io->n };
    __atomic_store_n(&t->state, FM_RDMA_ISSUED, __ATOMIC_RELEASE);
    __atomic_store_n(&ring->requested, ring->requested + 1, __ATOMIC_SEQ_CST);
    fm_lock_drop(&r->lock);
    fm_rdma_bell(r);
}

static void leave_session(struct fm_rdma *r) { __atomic_sub_fetch(&r->users, 1, __ATOMIC_SEQ_CST); }

/* By the session's thread: what waits, as far as there are bounce frames. */
static void issue_waiting(struct fm_rdma *r)
{
    struct fm_rdma_transfer *t;
    do {
        fm_lock_take(&r->lock);
        t = pop(r);
        fm_lock_drop(&r->lock);
        if (t != NULL)
            issue(r, t);
    } while (t != NULL);
}

bool fm_rdma_reap(struct fm_rdma *r)
{
    struct fm_rdma_ring *ring = r->session.ring;
    uint32_t completed = __atomic_load_n(&ring->completed, __ATOMIC_ACQUIRE);
    for (; r->session.reaped != completed; r->session.reaped++) {
        uint32_t bounce = ring->done[r->session.reaped % FM_RDMA_FRAMES];
        if (bounce >= FM_RDMA_FRAMES)
            return false;
        fm_lock_take(&r->lock);
        struct fm_rdma_transfer *t = r->bounced[bounce];
        bool right = t != NULL && t->state == FM_RDMA_ISSUED;
        fm_lock_drop(&r->lock);
        if (!right)
            return false;
        struct fm_io *io = t->io;
        if (io->kind == FM_IO_FETCH)
            __builtin_memcpy(fm_io_bytes(r->b, io), fm_rdma_bounce(r, bounce), (uint64_t)io->n * FM_PAGE_BYTES);
        fm_lock_take(&r->lock);
        set_taken(r, bounce, io->n, false);
        r->bounced[bounce] = NULL;
        forget(r, t);
        fm_lock_drop(&r->lock);
        issue_waiting(r);
        tell(r, io, 0, false);
    }
    return true;
}

void fm_rdma_came_up(struct fm_rdma *r)
{
    fm_lock_take(&r->lock);
    fm_rdma_store(&r->up, 1);
    fm_lock_drop(&r->lock);
    issue_waiting(r);
}

static uint64_t oldest(const struct fm_rdma *r, uint64_t now)
{
    uint64_t since = now;
    for (uint32_t f = 0; f < FM_BACKEND_FRAMES_MAX && r->outstanding > 0; f++)
        if (r->transfer[f].state != FM_RDMA_NONE && r->transfer[f].since_ns < since)
            since = r->transfer[f].since_ns;
    return since;
}

/* What was under way is asked for once more, by the next session: to read or write whole pages twice does no harm. */
void fm_rdma_went_down(struct fm_rdma *r)
{
    uint64_t now = fm_now_ns();
    fm_lock_take(&r->lock);
    fm_rdma_store(&r->up, 0);
    r->down_since_ns = oldest(r, now);
    fm_lock_drop(&r->lock);
    while (__atomic_load_n(&r->users, __ATOMIC_SEQ_CST) != 0)
        fm_sleep_ns(USERS_STEP_NS);
    fm_lock_take(&r->lock);
    for (struct fm_rdma_transfer *t = r->transfer; t < r->transfer + FM_BACKEND_FRAMES_MAX; t++) {
        fm_assert(t->state != FM_RDMA_ISSUING);
        if (t->state == FM_RDMA_ISSUED)
            push(r, t);
    }
    __builtin_memset(r->taken, 0, sizeof r->taken);       /* the next session has new ones */
    __builtin_memset(r->bounced, 0, sizeof r->bounced);
    fm_lock_drop(&r->lock);
    fm_add(r->b->chain->count->pool_connections_lost, 1);
}

/* ---- deadlines ----------------------------------------------------------------------------------------- */

static void see_whether_gone(struct fm_rdma *r)
{
    uint32_t how = fm_rdma_load(&r->server->gone);
    if (how == 0)
        return;
    shut(r, true);
    if (__atomic_exchange_n(&r->gone, 1, __ATOMIC_SEQ_CST) == 0 && how != FM_SERVER_GIVEN_BACK)
        fm_talk_say(&r->talk, FM_LEVEL_ERROR, "has ended our lease", ": what was stored there is lost; bytes", stored_bytes(r));
}

static bool is_due(const struct fm_rdma *r, const struct fm_rdma_transfer *t, uint64_t now)
{
    return hopeless(r, now) || too_long(r, t->since_ns, now);
}

/* Those that wait and are due, out of the books. */
static struct fm_io *take_due(struct fm_rdma *r, uint64_t now)
{
    struct fm_io *io = r->head, *failed = NULL, *next;
    r->head = NULL;
    for (; io != NULL; io = next) {
        next = io->next;
        struct fm_rdma_transfer *t = transfer_of(r, io);
        if (!is_due(r, t, now)) {
            push(r, t);
            continue;
        }
        io->next = failed;
        failed = io;
        forget(r, t);
    }
    return failed;
}

static bool any_due_under_way(const struct fm_rdma *r, uint64_t now)
{
    for (uint32_t f = 0; f < FM_RDMA_FRAMES; f++)
        if (r->bounced[f] != NULL && is_due(r, r->bounced[f], now))
            return true;
    return false;
}

bool fm_rdma_look(struct fm_rdma *r)
{
    uint64_t now = fm_now_ns();
    struct fm_io *failed = NULL;
    bool under_way = false;
    see_whether_gone(r);
    fm_lock_take(&r->lock);
    uint64_t since = oldest(r, now);
    bool up = r->up != 0, used = r->used != 0, lost = hopeless(r, now);
    if (r->outstanding > 0) {
        under_way = any_due_under_way(r, now);
        failed = take_due(r, now);
    }
    fm_lock_drop(&r->lock);
    if (used || lost)                        /* who has not asked anything of it knows nothing */
        shut(r, lost);
    if (!fm_rdma_gone(r))
        fm_talk_look(&r->talk, now, since, up);
    fail_all(r, failed);
    return under_way || fm_rdma_gone(r);
}

/* ---- the backend --------------------------------------------------------------------------------------- */

/* All of it was promised when the server was asked. */
static bool rdma_grant(struct fm_backend *b, uint32_t extent)
{
    bool is_shut = fm_slot_shut(b->chain->ledger, extent * FM_EXTENT_SLOTS);
    b->chain->full = is_shut ? "the pool's server has no place for us now: pages stay local, over the budget." : NULL;
    return !is_shut;
}

/* The server's processor does nothing for us, so it gives nothing back before the lease's end. */
static bool rdma_trim(struct fm_backend *b, uint32_t extent)
{
    (void)b;
    (void)extent;
    return true;
}

static void begin(struct fm_rdma *r, uint64_t now)
{
    r->down_since_ns = now;
    fm_rdma_store(&r->used, 1);
    fm_rdma_wake();
}

static void rdma_submit(struct fm_backend *b, struct fm_io *io)
{
    struct fm_rdma *r = rdma_of(b);
    uint64_t now = fm_now_ns();
    struct fm_rdma_transfer *t = transfer_of(r, io);
    fm_assert(io->slot >= first_slot(r) && io->slot - first_slot(r) + io->n <= r->span->extents * FM_EXTENT_SLOTS);
    fm_lock_take(&r->lock);
    if (!r->used)
        begin(r, now);
    bool refused = hopeless(r, now), issues = false;
    fm_assert(t->state == FM_RDMA_NONE);
    if (!refused) {
        *t = (struct fm_rdma_transfer){ .io = io, .since_ns = now };
        __atomic_add_fetch(&r->outstanding, 1, __ATOMIC_SEQ_CST);
        issues = r->up && r->head == NULL && take_bounce(r, t);
        if (issues)
            __atomic_add_fetch(&r->users, 1, __ATOMIC_SEQ_CST);
        else
            push(r, t);
    }
    fm_lock_drop(&r->lock);
    if (issues) {
        issue(r, t);
        leave_session(r);
    }
    if (!refused)
        return;
    if (io->kind == FM_IO_FETCH && !fm_rdma_gone(r))
        say_lost(r);
    io->status = fm_rdma_gone(r) ? ENODATA : ETIMEDOUT;
    io->final = true;
    b->ended(b, io);
}

/* Never waits for the agent: a process may be taken over, and a child be forked, while it does not answer. */
static bool rdma_open(struct fm_backend *b)
{
    struct fm_rdma *r = rdma_of(b);
    __builtin_memset(r, 0, sizeof *r);       /* in the child of a fork it is the parent's */
    r->b = b;
    r->server = &b->chain->servers[b->number];
    r->span = fm_pool_span(b->chain->ledger, b->number);
    r->session.sock = -1;
    fm_talk_begin(&r->talk, b, r->server);
    return fm_rdma_tend(r);
}

const struct fm_backend fm_backend_rdma = {
    .size = sizeof(struct fm_backend),
    .version = FM_BACKEND_VERSION,
    .name = "rdma",
    .open = rdma_open,
    .submit = rdma_submit,
    .grant = rdma_grant,
    .trim = rdma_trim,
};
