/* rdma_ring.h - what the engine (backends/rdma*.c) and the agent of `rdma:` pools (agent/rdma_*.c) say to each other.
 *
 * For each lease that it uses the engine connects to the agent's Unix socket (SOCK_SEQPACKET) and sends a hello; the agent
 * answers with a welcome and a memfd, which both map: two rings and the bounce frames.  From then on a message on the
 * socket is a bell, whatever is in it, for a side that has said that it sleeps.  The end of the socket is the end of the
 * session, for both: what was under way is not, any more, and a new session has new memory.
 *
 * A transfer is named by the first of its bounce frames, which are neighbours; the engine chooses them.  So as many can be
 * under way as there are frames, and neither ring can overflow.
 */
#ifndef FM_RDMA_RING_H
#define FM_RDMA_RING_H

#include <stdbool.h>
#include <stdint.h>

#define FM_RDMA_MAGIC 0x61646d72666dull
#define FM_RDMA_VERSION 2u
#define FM_RDMA_FRAMES 128u              /* bounce frames, and the places of each ring */
#define FM_RDMA_PAGES_MAX 32u            /* of one transfer: FM_WINDOW_MAX */
#define FM_RDMA_PAGE_BYTES 4096u
#define FM_RDMA_FRAMES_AT 4096u         /* in the memfd */
#define FM_RDMA_SHARED_BYTES (FM_RDMA_FRAMES_AT + FM_RDMA_FRAMES * FM_RDMA_PAGE_BYTES)
#define FM_RDMA_TOKEN_BYTES 16u

/* What lets an engine in, and which of the job's leases it means: a number that no other lease of the job ever has. */
struct fm_rdma_pass {
    uint8_t token[FM_RDMA_TOKEN_BYTES];
    uint32_t lease;
};

struct fm_rdma_hello {
    uint64_t magic;
    uint32_t version;
    uint32_t slot;                       /* of the process in the control segment: it has one session for each lease */
    struct fm_rdma_pass pass;
    uint32_t pad;
};

struct fm_rdma_welcome {                 /* with the memfd */
    uint64_t magic;
    uint32_t version;
    uint32_t bytes;                      /* FM_RDMA_SHARED_BYTES */
};

enum fm_rdma_kind { FM_RDMA_READ = 1, FM_RDMA_WRITE = 2 };

struct fm_rdma_request {
    uint32_t kind;                       /* enum fm_rdma_kind */
    uint32_t frame;
    uint32_t slot;                       /* of the lease: its page k is at k * FM_RDMA_PAGE_BYTES of it */
    uint32_t n;                          /* pages */
};

/* Each counter has one writer, and only grows (and wraps).  A side that is about to sleep says so and looks once more. */
struct fm_rdma_ring {
    uint32_t requested __attribute__((aligned(64)));      /* the engine's */
    uint32_t engine_sleeps;
    uint32_t completed __attribute__((aligned(64)));      /* the agent's */
    uint32_t agent_sleeps;
    struct fm_rdma_request request[FM_RDMA_FRAMES] __attribute__((aligned(64)));
    uint32_t done[FM_RDMA_FRAMES];       /* the frame of each transfer that has ended well; none ends otherwise */
};

_Static_assert(sizeof(struct fm_rdma_ring) <= FM_RDMA_FRAMES_AT, "the bounce frames lie behind the rings");

static inline uint32_t fm_rdma_load(const uint32_t *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
static inline void fm_rdma_store(uint32_t *p, uint32_t value) { __atomic_store_n(p, value, __ATOMIC_SEQ_CST); }

#endif
