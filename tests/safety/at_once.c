/* at_once populate|mlock|pin MIB: a single call that brings more memory than there may be.
 * MAP_POPULATE fills a mapping, mlock() fills and locks one, io_uring pins one (here, by
 * registering it as a buffer).  Says "there" when it has been done, waits until its standard
 * input ends, and then verifies every byte. */
#include "safety.h"
#include <linux/io_uring.h>
#include <sys/uio.h>

static char *populated(size_t bytes)
{
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE;
    char *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    CHECK(p != MAP_FAILED);
    return p;
}

static char *locked(size_t bytes)
{
    char *p = map(bytes);
    if (mlock(p, bytes) != 0)
        unsupported("locking memory");
    return p;
}

/* A buffer of a ring may have a GiB; the ring itself is never used. */
static char *pinned(size_t bytes)
{
    struct io_uring_params params = {0};
    char *p = map(bytes);
    int ring = (int)syscall(__NR_io_uring_setup, 4, &params);
    if (ring < 0)
        unsupported("io_uring_setup");
    struct iovec part = {p, bytes};
    if (syscall(__NR_io_uring_register, ring, IORING_REGISTER_BUFFERS, &part, 1) != 0)
        unsupported("registering buffers with io_uring");
    return p;
}

int main(int argc, char **argv)
{
    CHECK(argc > 2);
    size_t bytes = (size_t)number(argc, argv, 2, 0) * MIB;
    char end, *p = NULL;
    if (strcmp(argv[1], "populate") == 0)
        p = populated(bytes);
    else if (strcmp(argv[1], "mlock") == 0)
        p = locked(bytes);
    else if (strcmp(argv[1], "pin") == 0)
        p = pinned(bytes);
    CHECK(p != NULL);
    puts("there");
    fflush(stdout);
    CHECK(read(0, &end, 1) == 0);
    verify_zero(p, bytes, "brought at once");
    fill(p, bytes, 1);
    verify(p, bytes, 1, "filled");
    puts("ok");
    return 0;
}
