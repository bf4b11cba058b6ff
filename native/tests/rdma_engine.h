/* rdma_engine.h - what tests of the RDMA client have below them instead of an engine: frames, a ledger, threads, and transfers
 * that are waited for.  Above rdma_peer.h: the servers and the agent. */
#ifndef FM_RDMA_ENGINE_H
#define FM_RDMA_ENGINE_H

#include "backend_host.h"
#include "backends/rdma.h"
#include "rdma_peer.h"

#define FRAMES FM_BACKEND_FRAMES_MAX
#define EXTENTS 8u
#define EXTENT_BYTES (FM_EXTENT_SLOTS * (uint64_t)FM_PAGE_BYTES)
#define LEASE_BYTES (EXTENTS * EXTENT_BYTES)
#define POOL_BYTES (PEER_LEASES * LEASE_BYTES)
#define SLOTS (EXTENTS * FM_EXTENT_SLOTS)      /* of a lease */
#define WAIT_NS 60000000000ull
#define TIMEOUT_NS 2000000000ull         /* where it is to be met */
#define LONG_NS 50000000000ull
#define LOAD(word) __atomic_load_n(&(word), __ATOMIC_SEQ_CST)

extern struct fm_chain chain;
extern struct fm_backend servers[PEER_LEASES], *backend;      /* each is a lease of its own; the first */
extern struct fm_pool_ledger ledger;
extern struct fm_counters counters;
extern struct fm_pool_server there[PEER_LEASES];
extern atomic_uint ended, ended_of[PEER_LEASES];
extern uint64_t seed;

void await_ends(uint32_t n);
struct fm_io transfer(uint32_t kind, uint32_t frame, uint32_t slot, uint32_t n);     /* of the first, and its end */
uint64_t *words_of(uint32_t frame);
void fill(uint64_t *words, uint32_t n, uint64_t with);                               /* n pages */
void is_filled(const uint64_t *words, uint32_t n, uint64_t with);
void many_at_once(uint32_t n, uint32_t rounds);
bool closed_for(const char *why);
void set_up_several(uint32_t n, uint64_t timeout_ns);
void set_up(uint64_t timeout_ns);                                                    /* of one */

/* Each in a process of its own; arguments: one of them alone, a seed. */
int run_cases(int argc, char **argv, void (*const *cases)(void), uint32_t n);

#endif
