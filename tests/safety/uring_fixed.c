/* uring_fixed FOLDER [ROUNDS]: a device writes into memory that the program lent it long
 * ago.  Buffers registered with io_uring are pinned: the kernel writes to the frames that
 * were there at registration.  An engine that evicts such a page by copying and dropping
 * it leaves the device writing to a frame that nobody sees.  The buffers are filled by the
 * program, left alone until everything else has been evicted, then filled by READ_FIXED,
 * changed by the program, and written by WRITE_FIXED; both must be what each side wrote. */
#include "safety.h"
#include <linux/io_uring.h>
#include <sys/uio.h>

#define BUFFERS 8
#define BUFFER_BYTES (MIB / 4)
#define BYTES (BUFFERS * BUFFER_BYTES)

static struct {
    int fd;
    _Atomic uint32_t *sq_tail, *cq_head, *cq_tail;
    uint32_t *sq_mask, *sq_array, *cq_mask;
    struct io_uring_sqe *sqes;
    struct io_uring_cqe *cqes;
} ring;

static void *ring_part(size_t bytes, off_t offset)
{
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring.fd, offset);
    if (p == MAP_FAILED)
        unsupported("mapping an io_uring");
    return p;
}

static void ring_open(void)
{
    struct io_uring_params params = {0};
    ring.fd = (int)syscall(__NR_io_uring_setup, 16, &params);
    if (ring.fd < 0)
        unsupported("io_uring_setup");
    size_t sq_bytes = params.sq_off.array + params.sq_entries * 4;
    char *sq = ring_part(sq_bytes, IORING_OFF_SQ_RING);
    char *cq = ring_part(params.cq_off.cqes + params.cq_entries * sizeof *ring.cqes, IORING_OFF_CQ_RING);
    ring.sqes = ring_part(params.sq_entries * sizeof *ring.sqes, IORING_OFF_SQES);
    ring.sq_tail = (_Atomic uint32_t *)(void *)(sq + params.sq_off.tail);
    ring.sq_mask = (uint32_t *)(void *)(sq + params.sq_off.ring_mask);
    ring.sq_array = (uint32_t *)(void *)(sq + params.sq_off.array);
    ring.cq_head = (_Atomic uint32_t *)(void *)(cq + params.cq_off.head);
    ring.cq_tail = (_Atomic uint32_t *)(void *)(cq + params.cq_off.tail);
    ring.cq_mask = (uint32_t *)(void *)(cq + params.cq_off.ring_mask);
    ring.cqes = (struct io_uring_cqe *)(void *)(cq + params.cq_off.cqes);
}

/* One operation on a registered buffer, waited for. */
static void ring_do(uint8_t opcode, int file, unsigned buffer, char *memory)
{
    uint32_t tail = atomic_load(ring.sq_tail), slot = tail & *ring.sq_mask;
    struct io_uring_sqe *sqe = &ring.sqes[slot];
    memset(sqe, 0, sizeof *sqe);
    sqe->opcode = opcode;
    sqe->fd = file;
    sqe->off = buffer * BUFFER_BYTES;
    sqe->addr = (uint64_t)(uintptr_t)(memory + buffer * BUFFER_BYTES);
    sqe->len = BUFFER_BYTES;
    sqe->buf_index = (uint16_t)buffer;
    ring.sq_array[slot] = slot;
    atomic_store(ring.sq_tail, tail + 1);
    long submitted = syscall(__NR_io_uring_enter, ring.fd, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0);
    CHECK(submitted == 1);
    uint32_t head = atomic_load(ring.cq_head);
    while (atomic_load(ring.cq_tail) == head)
        CHECK(syscall(__NR_io_uring_enter, ring.fd, 0, 1, IORING_ENTER_GETEVENTS, NULL, 0) >= 0);
    int got = ring.cqes[head & *ring.cq_mask].res;
    atomic_store(ring.cq_head, head + 1);
    if (got != (int)BUFFER_BYTES)
        die("io_uring operation %d: %s", opcode, got < 0 ? strerror(-got) : "short");
}

static int scratch_file(const char *folder, uint64_t seed, void *scratch)
{
    char name[512];
    snprintf(name, sizeof name, "%s/uring.XXXXXX", folder);
    int fd = mkstemp(name);
    CHECK(fd >= 0 && unlink(name) == 0);
    fill(scratch, BYTES, seed);
    CHECK(pwrite(fd, scratch, BYTES, 0) == (ssize_t)BYTES);
    return fd;
}

static void one_round(char *memory, void *scratch, int in, int out, uint64_t seed)
{
    fill(memory, BYTES, seed);
    pressure_until_away(memory, BYTES, 2);
    for (unsigned i = 0; i < BUFFERS; i++)
        ring_do(IORING_OP_READ_FIXED, in, i, memory);
    verify(memory, BYTES, 1, "registered buffer after a read");
    fill(memory, BYTES, seed + 1);
    pressure_until_away(memory, BYTES, 2);
    for (unsigned i = 0; i < BUFFERS; i++)
        ring_do(IORING_OP_WRITE_FIXED, out, i, memory);
    CHECK(pread(out, scratch, BYTES, 0) == (ssize_t)BYTES);
    verify(scratch, BYTES, seed + 1, "file after a write from a registered buffer");
    verify(memory, BYTES, seed + 1, "registered buffer after a write");
}

int main(int argc, char **argv)
{
    CHECK(argc > 1);
    long rounds = number(argc, argv, 2, 3);
    ring_open();
    char *memory = map(BYTES);
    void *scratch = map(BYTES);
    int in = scratch_file(argv[1], 1, scratch), out = scratch_file(argv[1], 2, scratch);
    pressure_start(BALLAST_BYTES);
    fill(memory, BYTES, 3);
    pressure_until_away(memory, BYTES, 3); /* registering must bring the pages back, too */
    struct iovec parts[BUFFERS];
    for (size_t i = 0; i < BUFFERS; i++)
        parts[i] = (struct iovec){memory + i * BUFFER_BYTES, BUFFER_BYTES};
    if (syscall(__NR_io_uring_register, ring.fd, IORING_REGISTER_BUFFERS, parts, BUFFERS) != 0)
        unsupported("registering buffers with io_uring");
    verify(memory, BYTES, 3, "registered buffer");
    for (long round = 0; round < rounds; round++)
        one_round(memory, scratch, in, out, 10 + 2 * (uint64_t)round);
    pressure_stop();
    puts("ok");
    return 0;
}
