/* fake_fabric.h - the network and the servers that the fake verbs reach: a file, which a test maps as well
 * (tests/pools/fake_fabric.py).
 *
 * The test is the servers: it makes halves of queue pairs and ends them, holds the memory, and says what is to go wrong.
 */
#ifndef FM_FAKE_FABRIC_H
#define FM_FAKE_FABRIC_H

#include <stdint.h>

#define FAKE_MAGIC 0x636972626166ull
#define FAKE_HALVES 1023u
#define FAKE_MEMORY_AT 131072u
#define FAKE_DEVICE "fake0"
#define FAKE_GID_INDEX 3                /* of the only GID that the server is reached by */
#define FAKE_SERVER_GID { 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 0, 2 }

enum fake_wrong { FAKE_WELL = 0, FAKE_NO_DEVICE, FAKE_PORT_DOWN, FAKE_NO_GID, FAKE_NO_LOCKED_MEMORY };

struct fake_half {                      /* a server's half of a queue pair; 64 bytes */
    uint64_t alive, qpn, psn, peer_qpn, peer_psn;
    uint64_t start, bytes;              /* the part of the memory that is its lease: see fake_rkey() */
    uint64_t silent;                    /* 1: that server answers nothing */
};

/* All fields are words of 8 bytes, for whoever has no C. */
struct fake_fabric {
    uint64_t magic;
    uint64_t rkey, address, bytes;      /* of the memory, all servers': at FAKE_MEMORY_AT of the file */
    uint64_t seed;
    uint64_t fail_ppm;                  /* so many of a million work requests fail, half done */
    uint64_t delay_ns_max;
    uint64_t silent;                    /* 1: nothing is answered */
    uint64_t retry_ns;                  /* then the device gives up */
    uint64_t wrong;                     /* enum fake_wrong: from the start */
    uint64_t reads, writes, failures, doorbells;       /* counted */
    uint64_t pad[50];
    struct fake_half half[FAKE_HALVES];
};

_Static_assert(sizeof(struct fake_fabric) <= FAKE_MEMORY_AT, "the memory lies behind the books");

/* Each lease has a key of its own. */
static inline uint32_t fake_rkey(const struct fake_fabric *f, uint64_t start)
{
    return (uint32_t)(__atomic_load_n(&f->rkey, __ATOMIC_SEQ_CST) + (start >> 21));
}

#endif
