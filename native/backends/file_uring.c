/* file_uring.c - transfers of file.c by io_uring: many under way, on one thread that begins and ends them all.
 *
 * That thread waits in the kernel for the end of any transfer, and for an eventfd that whoever queues one writes to.
 * Nobody else uses the ring: the kernel ends a transfer on the thread that has begun it, and any other of the
 * engine's may itself be waiting for a page.  Raw system calls: there is no libc under us.
 */
#include <errno.h>
#include <linux/io_uring.h>
#include <stddef.h>
#include <sys/eventfd.h>
#include <sys/mman.h>

#include "engine/sys.h"
#include "file.h"
#include "fm_assert.h"

#define DEPTH 256u              /* transfers under way at once */
#define ENTRIES 512u            /* room for them and for the bell: neither queue of the ring can overflow */
#define AGAIN_NS 100000ull
#ifndef IORING_SETUP_SINGLE_ISSUER
#define IORING_SETUP_SINGLE_ISSUER (1u << 12)      /* Linux 6.0 */
#endif
#ifndef IORING_SETUP_DEFER_TASKRUN
#define IORING_SETUP_DEFER_TASKRUN (1u << 13)      /* Linux 6.1 */
#endif

static struct {
    int fd, bell_fd;
    char *rings, *sqes_at;
    uint64_t rings_bytes, sqes_bytes;
    uint32_t *sq_head, *sq_tail, *cq_head, *cq_tail;
    uint32_t sq_mask, cq_mask;
    struct io_uring_sqe *sqe;
    struct io_uring_cqe *cqe;
    uint32_t tail, under_way, asleep;
    bool bell_armed;
    uint64_t bell;
} ring;

bool fm_file_mapped(uint64_t start) { return start != 0 && (start == (uint64_t)ring.rings || start == (uint64_t)ring.sqes_at); }

/* ---- the ring ------------------------------------------------------------------------------------------ */

static void push(uint8_t op, int fd, struct fm_file_rest r, struct fm_io *io)
{
    fm_assert(ring.tail - __atomic_load_n(ring.sq_head, __ATOMIC_ACQUIRE) <= ring.sq_mask);
    struct io_uring_sqe *s = &ring.sqe[ring.tail & ring.sq_mask];
    __builtin_memset(s, 0, sizeof *s);
    s->opcode = op;
    s->fd = fd;
    s->addr = (uint64_t)r.memory;
    s->len = r.bytes;
    s->off = r.at;
    s->user_data = (uint64_t)io;
    __atomic_store_n(ring.sq_tail, ++ring.tail, __ATOMIC_RELEASE);
}

static void push_bell(void)
{
    push(IORING_OP_READ, ring.bell_fd, (struct fm_file_rest){ &ring.bell, sizeof ring.bell, 0 }, NULL);
    ring.bell_armed = true;
}

static void push_transfer(struct fm_io *io)
{
    push(io->kind == FM_IO_FETCH ? IORING_OP_READ : IORING_OP_WRITE, fm_file.fd, fm_file_rest(io), io);
}

static long enter(void)
{
    uint32_t fresh = ring.tail - __atomic_load_n(ring.sq_head, __ATOMIC_ACQUIRE);
    return fm_sys(SYS_io_uring_enter, ring.fd, fresh, 1, IORING_ENTER_GETEVENTS, NULL, 0);
}

static bool next_end(struct io_uring_cqe *c)
{
    uint32_t head = *ring.cq_head;
    if (head == __atomic_load_n(ring.cq_tail, __ATOMIC_ACQUIRE))
        return false;
    *c = ring.cqe[head & ring.cq_mask];
    __atomic_store_n(ring.cq_head, head + 1, __ATOMIC_RELEASE);
    return true;
}

/* ---- opening ------------------------------------------------------------------------------------------- */

static char *map_part(uint64_t bytes, uint64_t offset)
{
    long r = fm_sys(SYS_mmap, NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring.fd, offset);
    if (r < 0 && r > -4096)
        return NULL;
    fm_sys(SYS_madvise, r, bytes, MADV_DONTFORK);      /* a child must not keep its parent's ring alive */
    return (char *)r;
}

static bool map_ring(const struct io_uring_params *p)
{
    uint64_t sq = p->sq_off.array + p->sq_entries * sizeof(uint32_t);
    uint64_t cq = p->cq_off.cqes + p->cq_entries * sizeof(struct io_uring_cqe);
    ring.rings_bytes = sq > cq ? sq : cq;
    ring.sqes_bytes = p->sq_entries * sizeof(struct io_uring_sqe);
    ring.rings = map_part(ring.rings_bytes, IORING_OFF_SQ_RING);
    ring.sqes_at = map_part(ring.sqes_bytes, IORING_OFF_SQES);
    if (ring.rings == NULL || ring.sqes_at == NULL || (p->features & IORING_FEAT_SINGLE_MMAP) == 0)
        return false;
    ring.sq_head = (uint32_t *)(ring.rings + p->sq_off.head);
    ring.sq_tail = (uint32_t *)(ring.rings + p->sq_off.tail);
    ring.cq_head = (uint32_t *)(ring.rings + p->cq_off.head);
    ring.cq_tail = (uint32_t *)(ring.rings + p->cq_off.tail);
    ring.sq_mask = p->sq_entries - 1;
    ring.cq_mask = p->cq_entries - 1;
    ring.sqe = (struct io_uring_sqe *)ring.sqes_at;
    ring.cqe = (struct io_uring_cqe *)(ring.rings + p->cq_off.cqes);
    uint32_t *order = (uint32_t *)(ring.rings + p->sq_off.array);
    for (uint32_t k = 0; k < p->sq_entries; k++)
        order[k] = k;
    return true;
}

/* A ring can be had and yet be forbidden to be used: try. */
static bool bell_rings(void)
{
    struct io_uring_cqe c;
    uint64_t one = 1;
    push_bell();
    if (fm_sys(SYS_write, ring.bell_fd, &one, sizeof one) != (long)sizeof one || enter() < 0)
        return false;
    ring.bell_armed = false;
    return next_end(&c) && c.user_data == 0 && c.res == (int)sizeof ring.bell;
}

static void give_up_ring(void)
{
    if (ring.rings != NULL)
        fm_sys(SYS_munmap, ring.rings, ring.rings_bytes);
    if (ring.sqes_at != NULL)
        fm_sys(SYS_munmap, ring.sqes_at, ring.sqes_bytes);
    if (ring.fd >= 0)
        fm_sys(SYS_close, ring.fd);
    if (ring.bell_fd >= 0)
        fm_sys(SYS_close, ring.bell_fd);
    __builtin_memset(&ring, 0, sizeof ring);
}

bool fm_uring_open(void)
{
    struct io_uring_params p;
    __builtin_memset(&p, 0, sizeof p);
    __builtin_memset(&ring, 0, sizeof ring);             /* in the child of a fork it is the parent's */
    p.flags = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN;
    ring.bell_fd = (int)fm_sys(SYS_eventfd2, 0, EFD_CLOEXEC);
    ring.fd = (int)fm_sys(SYS_io_uring_setup, ENTRIES, &p);
    if (ring.fd >= 0 && ring.bell_fd >= 0 && map_ring(&p) && bell_rings())
        return true;
    give_up_ring();
    return false;
}

/* ---- running ------------------------------------------------------------------------------------------- */

void fm_uring_ring(void)
{
    uint64_t one = 1;
    if (__atomic_exchange_n(&ring.asleep, 0, __ATOMIC_SEQ_CST) != 0)
        fm_sys(SYS_write, ring.bell_fd, &one, sizeof one);
}

static void begin_all(void)
{
    struct fm_io *io;
    if (!ring.bell_armed)
        push_bell();
    while (ring.under_way < DEPTH && (io = fm_file_take()) != NULL) {
        push_transfer(io);
        ring.under_way++;
    }
}

static void end_all(void)
{
    struct io_uring_cqe c;
    while (next_end(&c)) {
        struct fm_io *io = (struct fm_io *)c.user_data;
        if (io == NULL) {
            ring.bell_armed = false;
        } else if (fm_file_went(io, c.res)) {
            ring.under_way--;
            fm_file_ended(io);
        } else {
            push_transfer(io);
        }
    }
}

_Noreturn void fm_uring_run(void)
{
    for (;;) {
        begin_all();
        __atomic_store_n(&ring.asleep, 1, __ATOMIC_SEQ_CST);
        if (ring.under_way < DEPTH && fm_file_waits()) {
            __atomic_store_n(&ring.asleep, 0, __ATOMIC_SEQ_CST);
            continue;                       /* queued just now: it may not have rung */
        }
        long r = enter();
        __atomic_store_n(&ring.asleep, 0, __ATOMIC_SEQ_CST);
        if (r == -EAGAIN || r == -EBUSY || r == -ENOMEM)
            fm_sleep_ns(AGAIN_NS);
        else if (r < 0 && r != -EINTR)
            fm_panic("io_uring, which has worked, is refused now", __FILE__, __LINE__);
        end_all();
    }
}
