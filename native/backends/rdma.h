/* rdma.h - what the parts of the RDMA client in the engine share: rdma.c (requests, deadlines, what is said of them) and
 * rdma_session.c (the agent's sockets, the rings, the bounce frames). */
#ifndef FM_RDMA_H
#define FM_RDMA_H

#include "backend.h"
#include "rdma_ring.h"
#include "talk.h"

enum fm_rdma_state {
    FM_RDMA_NONE = 0,
    FM_RDMA_WAITING,                  /* for a session, or for bounce frames: in the queue */
    FM_RDMA_ISSUING,                  /* whoever issues it has it in hand, for a moment */
    FM_RDMA_ISSUED                    /* the agent has it */
};

struct fm_rdma_transfer {
    struct fm_io *io;
    uint64_t since_ns;                /* when it was asked for: the deadline counts from here, however often it is issued */
    uint32_t state;                   /* enum fm_rdma_state */
    uint32_t bounce;                  /* the first of its bounce frames, once it is issued */
};

#define FM_RDMA_BOUNCE_WORDS (FM_RDMA_FRAMES / 64)

/* A session is over when its socket is: then nothing of it is under way any more, or will be. */
struct fm_rdma_session {
    int sock;                         /* -1: none */
    struct fm_rdma_ring *ring;        /* NULL: the agent has not let us in yet */
    uint32_t reaped;
    uint64_t again_ns;                /* when the next may be begun */
    uint64_t wait_ns;
};

/* A server, or rather a lease. */
struct fm_rdma {
    struct fm_backend *b;
    struct fm_pool_server *server;
    const struct fm_pool_span *span;  /* its extents */
    fm_lock lock;                     /* of the transfers, the queue, the bounce frames, up and the ring of requests */
    struct fm_io *head, *tail;        /* those that wait, the oldest first */
    uint64_t taken[FM_RDMA_BOUNCE_WORDS];               /* bounce frames, a bit for each */
    struct fm_rdma_transfer *bounced[FM_RDMA_FRAMES];   /* by the first bounce frame */
    uint32_t outstanding;
    uint32_t up;                      /* there is a session */
    uint32_t used;                    /* something was asked of it: a session is begun */
    uint32_t users;                   /* threads that issue: the session's memory stays meanwhile */
    uint32_t gone;                    /* what was stored there can't be had any more */
    struct fm_talk talk;
    uint64_t down_since_ns;           /* while none is up: since when nothing has come */
    struct fm_rdma_session session;   /* the thread's, and its ring the users' */
    struct fm_rdma_transfer transfer[FM_BACKEND_FRAMES_MAX];      /* by its first frame */
};

/* By the server's number. */
extern struct fm_rdma fm_rdma[FM_POOL_SERVERS_MAX];

static inline char *fm_rdma_bounce(const struct fm_rdma *r, uint32_t frame)
{
    return (char *)r->session.ring + FM_RDMA_FRAMES_AT + (uint64_t)frame * FM_RDMA_PAGE_BYTES;
}

static inline bool fm_rdma_gone(const struct fm_rdma *r) { return fm_rdma_load(&r->gone) != 0; }

/* rdma.c */
void fm_rdma_came_up(struct fm_rdma *r);
void fm_rdma_went_down(struct fm_rdma *r);           /* after it nobody uses the session */
bool fm_rdma_reap(struct fm_rdma *r);                /* what has ended; false: the agent says what can't be */
bool fm_rdma_look(struct fm_rdma *r);                /* at deadlines; true: the session must end */

/* rdma_session.c */
bool fm_rdma_tend(struct fm_rdma *r);                /* from now on; false: no thread can be had */
void fm_rdma_wake(void);                             /* the thread: there is a server to begin with */
void fm_rdma_bell(struct fm_rdma *r);                /* if the agent sleeps */

#endif
