/* rdma.h - what the parts of the RDMA client in the engine share: rdma.c (requests, deadlines, what is said of them) and
 * rdma_session.c (the agent's socket, the rings, the bounce frames). */
#ifndef FM_RDMA_H
#define FM_RDMA_H

#include "backend.h"
#include "rdma_ring.h"
#include "talk.h"

enum fm_rdma_state {
    FM_RDMA_NONE = 0,
    FM_RDMA_WAITING,                  /* for a session */
    FM_RDMA_ISSUING,                  /* whoever issues it has it in hand, for a moment */
    FM_RDMA_ISSUED                    /* the agent has it */
};

struct fm_rdma_transfer {
    struct fm_io *io;
    uint64_t since_ns;                /* when it was asked for: the deadline counts from here, however often it is issued */
    uint32_t state;                   /* enum fm_rdma_state */
};

/* A session is over when its socket is: then nothing of it is under way any more, or will be. */
struct fm_rdma {
    struct fm_backend *b;
    const struct fm_pool_server *server;
    fm_lock lock;                     /* of the transfers, up and the ring of requests */
    struct fm_rdma_transfer transfer[FM_RDMA_FRAMES];   /* by its first frame */
    uint32_t outstanding;
    uint32_t up;                      /* there is a session */
    uint32_t users;                   /* threads that issue: the session's memory stays meanwhile */
    uint32_t gone;                    /* what was stored there can't be had any more */
    struct fm_talk talk;
    uint64_t down_since_ns;           /* while none is up: since when nothing has come */
    /* the session, of its thread and of users */
    int sock;
    struct fm_rdma_ring *ring;
    uint32_t reaped;
};

extern struct fm_rdma fm_rdma;

static inline char *fm_rdma_bounce(uint32_t frame)
{
    return (char *)fm_rdma.ring + FM_RDMA_FRAMES_AT + (uint64_t)frame * FM_RDMA_PAGE_BYTES;
}

/* rdma.c */
void fm_rdma_came_up(void);
void fm_rdma_went_down(void);                        /* after it nobody uses the session */
bool fm_rdma_reap(void);                             /* what has ended; false: the agent says what can't be */
bool fm_rdma_look(void);                             /* at deadlines; true: the session must end */
bool fm_rdma_is_over(void);                          /* nothing can come any more, and nothing is waited for */

/* rdma_session.c */
bool fm_rdma_start(void);                            /* its thread */
void fm_rdma_bell(void);                             /* if the agent sleeps */

#endif
