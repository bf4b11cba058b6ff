/* rdma.c - the bytes live in memory of a server elsewhere, read and written by one-sided RDMA: requests, deadlines, and what
 * is said of them.
 *
 * No RDMA library may live in the program's process, so an agent of the job (native/agent/rdma_*.c) posts the transfers.  It
 * and this process share bounce frames: what is stored is copied there before it is asked for, what is fetched is copied
 * from there when it has come. submit() does that on the caller's thread; one thread (rdma_session.c) takes what has ended
 * and looks at deadlines.
 *
 * Bounce frames are never used again while a transfer of them could be under way: a request that is not answered in time
 * ends the whole session, and the next has new ones.  The agent asks the server for another queue pair only when the old one
 * is gone at both ends, so a write that was given up can't come after a later one.
 */
#include "rdma.h"

#include <errno.h>
#include <stddef.h>

#include "engine/sys.h"
#include "fm_assert.h"

#define USERS_STEP_NS 10000

struct fm_rdma fm_rdma;

static bool is_gone(void) { return fm_rdma_load(&fm_rdma.gone) != 0; }

static struct fm_rdma_transfer *transfer_of(const struct fm_io *io)
{
    fm_assert(io->n > 0 && io->n <= FM_RDMA_PAGES_MAX && io->frame < FM_RDMA_FRAMES && io->frame + io->n <= FM_RDMA_FRAMES);
    return &fm_rdma.transfer[io->frame];
}

/* now may be a moment older than since, which another thread has written. */
static bool too_long(uint64_t since_ns, uint64_t now)
{
    return (int64_t)(now - since_ns) > (int64_t)fm_rdma.server->timeout_ns;
}

/* Nothing comes from there any more, or nothing has for as long as anything is waited for. */
static bool hopeless(uint64_t now)
{
    return is_gone() || (fm_rdma.up == 0 && too_long(fm_rdma.down_since_ns, now));
}

/* ---- ends ---------------------------------------------------------------------------------------------- */

static uint64_t stored_bytes(void) { return fm_pool_ledger_used(fm_rdma.b->chain->ledger->base) * FM_PAGE_BYTES; }

static void say_lost(void) { fm_talk_lost(&fm_rdma.talk, stored_bytes()); }

static void tell(struct fm_io *io, int32_t status, bool final)
{
    struct fm_backend *b = fm_rdma.b;
    io->status = status;
    io->final = final;
    b->chain->gate_in();
    b->ended(b, io);
    b->chain->gate_out();
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

static void forget(struct fm_rdma_transfer *t)
{
    *t = (struct fm_rdma_transfer){ 0 };
    __atomic_sub_fetch(&fm_rdma.outstanding, 1, __ATOMIC_SEQ_CST);
}

bool fm_rdma_reap(void)
{
    struct fm_rdma_ring *ring = fm_rdma.ring;
    uint32_t completed = __atomic_load_n(&ring->completed, __ATOMIC_ACQUIRE);
    for (; fm_rdma.reaped != completed; fm_rdma.reaped++) {
        uint32_t frame = ring->done[fm_rdma.reaped % FM_RDMA_FRAMES];
        if (frame >= FM_RDMA_FRAMES)
            return false;
        struct fm_rdma_transfer *t = &fm_rdma.transfer[frame];
        if (__atomic_load_n(&t->state, __ATOMIC_ACQUIRE) != FM_RDMA_ISSUED)
            return false;
        struct fm_io *io = t->io;
        if (io->kind == FM_IO_FETCH)
            __builtin_memcpy(fm_io_bytes(fm_rdma.b, io), fm_rdma_bounce(frame), (uint64_t)io->n * FM_PAGE_BYTES);
        fm_lock_take(&fm_rdma.lock);
        forget(t);
        fm_lock_drop(&fm_rdma.lock);
        tell(io, 0, false);
    }
    return true;
}

/* ---- issuing ------------------------------------------------------------------------------------------- */

/* The caller counts among the users, so the session's memory is there, even if nobody looks at it any more. */
static void issue(struct fm_rdma_transfer *t)
{
    const struct fm_io *io = t->io;
    struct fm_rdma_ring *ring = fm_rdma.ring;
    if (io->kind == FM_IO_STORE)
        __builtin_memcpy(fm_rdma_bounce(io->frame), fm_io_bytes(fm_rdma.b, io), (uint64_t)io->n * FM_PAGE_BYTES);
    fm_lock_take(&fm_rdma.lock);
    ring->request[ring->requested % FM_RDMA_FRAMES] = (struct fm_rdma_request){
        .kind = io->kind == FM_IO_FETCH ? FM_RDMA_READ : FM_RDMA_WRITE, .frame = io->frame, .slot = io->slot, .n = io->n };
    __atomic_store_n(&t->state, FM_RDMA_ISSUED, __ATOMIC_RELEASE);
    __atomic_store_n(&ring->requested, ring->requested + 1, __ATOMIC_SEQ_CST);
    fm_lock_drop(&fm_rdma.lock);
    fm_rdma_bell();
}

static void leave_session(void) { __atomic_sub_fetch(&fm_rdma.users, 1, __ATOMIC_SEQ_CST); }

void fm_rdma_came_up(void)
{
    uint32_t waiting[FM_RDMA_FRAMES / 32] = { 0 };
    fm_lock_take(&fm_rdma.lock);
    fm_rdma_store(&fm_rdma.up, 1);
    __atomic_add_fetch(&fm_rdma.users, 1, __ATOMIC_SEQ_CST);
    for (uint32_t f = 0; f < FM_RDMA_FRAMES; f++) {
        if (fm_rdma.transfer[f].state != FM_RDMA_WAITING)
            continue;
        fm_rdma.transfer[f].state = FM_RDMA_ISSUING;
        waiting[f / 32] |= 1u << f % 32;
    }
    fm_lock_drop(&fm_rdma.lock);
    for (uint32_t f = 0; f < FM_RDMA_FRAMES; f++)
        if ((waiting[f / 32] & 1u << f % 32) != 0)
            issue(&fm_rdma.transfer[f]);
    leave_session();
}

static uint64_t oldest(uint64_t now)
{
    uint64_t since = now;
    for (uint32_t f = 0; f < FM_RDMA_FRAMES && fm_rdma.outstanding > 0; f++)
        if (fm_rdma.transfer[f].state != FM_RDMA_NONE && fm_rdma.transfer[f].since_ns < since)
            since = fm_rdma.transfer[f].since_ns;
    return since;
}

/* What was under way is asked for once more, by the next session: to read or write whole pages twice does no harm. */
void fm_rdma_went_down(void)
{
    uint64_t now = fm_now_ns();
    fm_lock_take(&fm_rdma.lock);
    fm_rdma_store(&fm_rdma.up, 0);
    fm_rdma.down_since_ns = oldest(now);
    fm_lock_drop(&fm_rdma.lock);
    while (__atomic_load_n(&fm_rdma.users, __ATOMIC_SEQ_CST) != 0)
        fm_sleep_ns(USERS_STEP_NS);
    fm_lock_take(&fm_rdma.lock);
    for (struct fm_rdma_transfer *t = fm_rdma.transfer; t < fm_rdma.transfer + FM_RDMA_FRAMES; t++) {
        fm_assert(t->state != FM_RDMA_ISSUING);
        if (t->state == FM_RDMA_ISSUED)
            t->state = FM_RDMA_WAITING;
    }
    fm_lock_drop(&fm_rdma.lock);
    fm_add(fm_rdma.b->chain->count->pool_connections_lost, 1);
}

/* ---- deadlines ----------------------------------------------------------------------------------------- */

static void see_whether_gone(void)
{
    if (__atomic_load_n(&fm_rdma.server->gone, __ATOMIC_SEQ_CST) != 0 &&
        __atomic_exchange_n(&fm_rdma.gone, 1, __ATOMIC_SEQ_CST) == 0)
        fm_talk_say(&fm_rdma.talk, FM_LEVEL_ERROR, "has ended our lease", ": what was stored there is lost; bytes", stored_bytes());
}

/* Those that nobody has in hand and that are due; *under_way: one is due that the agent has. */
static struct fm_io *take_due(uint64_t now, bool *under_way)
{
    struct fm_io *failed = NULL;
    bool all = hopeless(now);
    for (struct fm_rdma_transfer *t = fm_rdma.transfer; t < fm_rdma.transfer + FM_RDMA_FRAMES; t++) {
        if (t->state == FM_RDMA_NONE || (!all && !too_long(t->since_ns, now)))
            continue;
        *under_way |= t->state == FM_RDMA_ISSUED;
        if (t->state != FM_RDMA_WAITING)
            continue;
        t->io->next = failed;
        failed = t->io;
        forget(t);
    }
    return failed;
}

bool fm_rdma_look(void)
{
    uint64_t now = fm_now_ns();
    struct fm_io *failed = NULL;
    bool under_way = false;
    see_whether_gone();
    fm_lock_take(&fm_rdma.lock);
    uint64_t since = oldest(now);
    bool up = fm_rdma.up != 0;
    if (fm_rdma.outstanding > 0)
        failed = take_due(now, &under_way);
    fm_lock_drop(&fm_rdma.lock);
    if (!is_gone())
        fm_talk_look(&fm_rdma.talk, now, since, up);
    fail_all(failed);
    return under_way || is_gone();
}

bool fm_rdma_is_over(void) { return is_gone() && __atomic_load_n(&fm_rdma.outstanding, __ATOMIC_SEQ_CST) == 0; }

/* ---- the backend --------------------------------------------------------------------------------------- */

/* All of it was promised when the pool was opened. */
static bool rdma_grant(struct fm_backend *b, uint32_t extent)
{
    bool gone = is_gone();
    (void)extent;
    b->chain->full = gone ? "the pool's server has no place for us any more: pages stay local, over the budget." : NULL;
    return !gone;
}

/* The server's processor does nothing for us, so it gives nothing back before the lease's end. */
static bool rdma_trim(struct fm_backend *b, uint32_t extent)
{
    (void)b;
    (void)extent;
    return true;
}

static void rdma_submit(struct fm_backend *b, struct fm_io *io)
{
    uint64_t now = fm_now_ns();
    struct fm_rdma_transfer *t = transfer_of(io);
    fm_assert(((uint64_t)io->slot + io->n) * FM_PAGE_BYTES <= b->chain->pool_bytes);
    fm_lock_take(&fm_rdma.lock);
    bool refused = hopeless(now), up = fm_rdma.up != 0;
    fm_assert(t->state == FM_RDMA_NONE);
    if (!refused) {
        *t = (struct fm_rdma_transfer){ .io = io, .since_ns = now, .state = up ? FM_RDMA_ISSUING : FM_RDMA_WAITING };
        __atomic_add_fetch(&fm_rdma.outstanding, 1, __ATOMIC_SEQ_CST);
        if (up)
            __atomic_add_fetch(&fm_rdma.users, 1, __ATOMIC_SEQ_CST);
    }
    fm_lock_drop(&fm_rdma.lock);
    if (!refused && up) {
        issue(t);
        leave_session();
    }
    if (!refused)
        return;
    if (io->kind == FM_IO_FETCH && !is_gone())
        say_lost();
    io->status = is_gone() ? ENODATA : ETIMEDOUT;
    io->final = true;
    b->ended(b, io);
}

/* Never waits for the agent: a process may be taken over, and a child be forked, while it does not answer. */
static bool rdma_open(struct fm_backend *b)
{
    __builtin_memset(&fm_rdma, 0, sizeof fm_rdma);       /* in the child of a fork it is the parent's */
    fm_rdma.b = b;
    fm_rdma.server = &b->chain->servers[0];
    fm_talk_begin(&fm_rdma.talk, b, fm_rdma.server);
    fm_rdma.down_since_ns = fm_now_ns();
    fm_rdma.sock = -1;
    return fm_rdma_start();
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
