/* rdma_peer.h - what test_rdma.c has around the client: servers (a fabric of the fake verbs), a lease of each, and control,
 * which the agent asks for their halves of queue pairs. */
#ifndef FM_RDMA_PEER_H
#define FM_RDMA_PEER_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "agent/rdma.h"
#include "control.h"
#include "fake_fabric.h"

#define PEER_LEASES 3u

struct peer {
    struct fake_fabric *fabric;
    char *memory;
    int control[2];                   /* ours, the agent's */
    uint32_t rkeys;                   /* what keys are counted from, as the agent is told */
    uint64_t lease_bytes;             /* lease k's memory lies behind those of the leases before */
    int listener;
    struct fm_agent_options options;  /* of the agent */
    pthread_t agent, hears;
    int status;                       /* what the agent ended with */
    pthread_mutex_t lock;             /* of the lines that were heard */
    char last_closed[4 * FM_RDMA_LINE_BYTES], last_failed[4 * FM_RDMA_LINE_BYTES];
    atomic_uint opened, closed, reached, ready, refused;
    atomic_uint opened_of[PEER_LEASES], closed_of[PEER_LEASES];
    atomic_uint silent_of[PEER_LEASES];   /* its server answers nothing */
    atomic_uint refuses;              /* so many halves are not given */
    atomic_uint one_at_a_time;        /* of the one process and lease: the old half is gone before the new one is made */
};

extern struct peer peer;

void peer_open(uint64_t lease_bytes, uint64_t seed);
void agent_start(void);
void agent_stop(void);                /* as at the end of the job; halves that it left are ended, as control would */
void peer_tell(const char *line);
void peer_silence(uint32_t lease, bool on);
void address_of_agent(struct fm_pool_server *there, uint32_t lease);

#endif
