/* rdma_peer.h - what test_rdma.c has around the client: a server (a fabric of the fake verbs), and control, which the agent
 * asks for the server's halves of queue pairs. */
#ifndef FM_RDMA_PEER_H
#define FM_RDMA_PEER_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "agent/rdma.h"
#include "control.h"
#include "fake_fabric.h"

struct peer {
    struct fake_fabric *fabric;
    char *memory;
    int control[2];                   /* ours, the agent's */
    uint32_t rkey;                    /* as the agent is told */
    int listener;
    struct fm_agent_options options;  /* of the agent */
    pthread_t agent, hears;
    int status;                       /* what the agent ended with */
    pthread_mutex_t lock;             /* of the lines that were heard */
    char last_closed[4 * FM_RDMA_LINE_BYTES], last_failed[4 * FM_RDMA_LINE_BYTES];
    atomic_uint opened, closed, reached, ready, refused;
    atomic_uint refuses;              /* so many halves are not given */
    atomic_uint one_at_a_time;        /* of the one process that there is: the old half is gone before the new one is made */
};

extern struct peer peer;

void peer_open(uint64_t bytes, uint64_t seed);
void agent_start(void);
void agent_stop(void);                /* as at the end of the job; halves that it left are ended, as control would */
void peer_tell(const char *line);
void address_of_agent(struct fm_pool_server *there);

#endif
