/* rdma_engine.c - see rdma_engine.h. */
#include "rdma_engine.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

struct fm_chain chain;
struct fm_backend servers[PEER_LEASES], *backend = servers;
struct fm_pool_ledger ledger;
struct fm_counters counters;
struct fm_pool_server there[PEER_LEASES];
atomic_uint ended, ended_of[PEER_LEASES];
uint64_t seed = 1;

/* ---- what the engine gives to a backend, beside backend_host.c */

static void on_end(struct fm_backend *b, struct fm_io *io)
{
    (void)io;
    atomic_fetch_add(&ended_of[b->number], 1);
    atomic_fetch_add(&ended, 1);
}

/* ---- transfers ------------------------------------------------------------------------------------------ */

void await_ends(uint32_t n)
{
    await(&ended, n);
    atomic_store(&ended, 0);
}

struct fm_io transfer(uint32_t kind, uint32_t frame, uint32_t slot, uint32_t n)
{
    struct fm_io io = { .kind = kind, .n = n, .frame = frame, .slot = slot };
    backend->submit(backend, &io);
    await_ends(1);
    return io;
}

uint64_t *words_of(uint32_t frame) { return (uint64_t *)(chain.frames + (uint64_t)frame * FM_PAGE_BYTES); }

void fill(uint64_t *words, uint32_t n, uint64_t with)
{
    for (uint32_t k = 0; k < n * FM_PAGE_BYTES / 8; k++)
        words[k] = with * 1000003 + k;
}

void is_filled(const uint64_t *words, uint32_t n, uint64_t with)
{
    for (uint32_t k = 0; k < n * FM_PAGE_BYTES / 8; k++)
        CHECK(words[k] == with * 1000003 + k);
}

/* As many as there can be, of n pages each; every place in the pool gets other bytes in each round. */
void many_at_once(uint32_t n, uint32_t rounds)
{
    static struct fm_io io[FRAMES];
    uint32_t count = FRAMES / n;
    for (uint32_t round = 0; round < rounds; round++) {
        for (uint32_t k = 0; k < count; k++) {
            fill(words_of(k * n), n, round * 10000 + k);
            io[k] = (struct fm_io){ .kind = FM_IO_STORE, .n = n, .frame = k * n, .slot = (k * 7 % count) * n };
            backend->submit(backend, &io[k]);
        }
        await_ends(count);
        memset(chain.frames, 0xee, FRAMES * FM_PAGE_BYTES);
        for (uint32_t k = 0; k < count; k++) {
            CHECK(io[k].status == 0);
            io[k] = (struct fm_io){ .kind = FM_IO_FETCH, .n = n, .frame = k * n, .slot = (k * 7 % count) * n };
            backend->submit(backend, &io[k]);
        }
        await_ends(count);
        for (uint32_t k = 0; k < count; k++) {
            CHECK(io[k].status == 0);
            is_filled(words_of(k * n), n, round * 10000 + k);
        }
    }
}

bool closed_for(const char *why)
{
    pthread_mutex_lock(&peer.lock);
    bool found = strstr(peer.last_closed, why) != NULL;
    pthread_mutex_unlock(&peer.lock);
    return found;
}

void set_up_several(uint32_t n, uint64_t timeout_ns)
{
    int prot = PROT_READ | PROT_WRITE;
    void *base = mmap(NULL, fm_pool_ledger_bytes(POOL_BYTES), prot, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    char *frames = mmap(NULL, FRAMES * FM_PAGE_BYTES, prot, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(base != MAP_FAILED && frames != MAP_FAILED && fm_pool_ledger_init_empty(base, POOL_BYTES) == 0);
    peer_open(LEASE_BYTES, seed);
    agent_start();
    chain = (struct fm_chain){ .frames = frames, .ledger = &ledger, .count = &counters, .servers = there,
                               .pool_bytes = POOL_BYTES, .thread = test_thread, .say = say, .gate_in = gate_in,
                               .gate_out = gate_out };
    for (uint32_t k = 0; k < n; k++) {
        there[k].timeout_ns = timeout_ns;
        snprintf(there[k].name, sizeof there[k].name, "the-test:%u", k + 1);
        address_of_agent(&there[k], k);
        CHECK(fm_pool_ledger_add(base, EXTENTS) == (int)k);
    }
    fm_pool_ledger_view(&ledger, base, 0);
    for (uint32_t k = 0; k < n; k++) {
        servers[k] = fm_backend_rdma;
        servers[k].chain = &chain;
        servers[k].number = k;
        servers[k].ended = on_end;
        CHECK(servers[k].open(&servers[k]));
    }
}

void set_up(uint64_t timeout_ns) { set_up_several(1, timeout_ns); }

int run_cases(int argc, char **argv, void (*const *cases)(void), uint32_t n)
{
    uint32_t only = argc > 1 ? (uint32_t)atoi(argv[1]) : UINT32_MAX;
    seed = argc > 2 ? (uint64_t)atoll(argv[2]) : 1;
    for (uint32_t k = 0; k < n; k++) {
        int status, pid = only == UINT32_MAX || only == k ? fork() : -1;
        if (pid < 0)
            continue;
        if (pid == 0) {
            cases[k]();
            agent_stop();                                 /* so that it gives everything back, and says if it can't */
            fflush(stdout);
            _exit(0);
        }
        CHECK(waitpid(pid, &status, 0) == pid);
        if (status != 0)
            fprintf(stderr, "case %u failed: %d\n", k, status);
        CHECK(status == 0);
    }
    return 0;
}
