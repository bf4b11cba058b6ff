/* test_rdma_many.c - the RDMA client with several servers, on verbs that are none: each has its own bytes, and one that
 * fails, dies or is given back is nothing to the others.
 */
#include <errno.h>
#include <sched.h>
#include <string.h>

#include "check.h"
#include "rdma_engine.h"

/* Both have as many transfers under way as there can be, half of the frames each, of every size. */
static void both_at_once(uint32_t rounds)
{
    static struct fm_io io[FRAMES];
    for (uint32_t round = 0; round < 2 * rounds; round++) {
        bool fetches = round % 2 != 0;
        uint32_t n = 1u << round / 2 % 6, count = FRAMES / n;
        if (fetches)
            memset(chain.frames, 0xee, FRAMES * FM_PAGE_BYTES);
        for (uint32_t k = 0; k < count; k++) {
            if (!fetches)
                fill(words_of(k * n), n, round * 10000 + k);
            io[k] = (struct fm_io){ .kind = fetches ? FM_IO_FETCH : FM_IO_STORE, .n = n, .frame = k * n,
                                    .slot = k % 2 * SLOTS + (k * 7 % count) * n };
            servers[k % 2].submit(&servers[k % 2], &io[k]);
        }
        await_ends(count);
        for (uint32_t k = 0; k < count; k++) {
            CHECK(io[k].status == 0);
            if (fetches)
                is_filled(words_of(k * n), n, (round - 1) * 10000 + k);
        }
    }
}

/* Each its own bytes at the same place of its lease; who asks nothing of a server has no session with it. */
static void two_servers(void)
{
    set_up_several(3, LONG_NS);
    peer.fabric->delay_ns_max = 50000;
    both_at_once(12);
    CHECK(atomic_load(&peer.opened_of[0]) == 1 && atomic_load(&peer.opened_of[1]) == 1 && atomic_load(&peer.opened_of[2]) == 0);
    CHECK(LOAD(counters.engine_bytes) == 2 * FM_RDMA_SHARED_BYTES && LOAD(counters.pool_connections_lost) == 0);
}

static void two_servers_that_fail(void)
{
    set_up_several(2, LONG_NS);
    peer.fabric->delay_ns_max = 20000;
    peer.fabric->fail_ppm = 2000;
    both_at_once(24);
    CHECK(peer.fabric->failures > 0 && LOAD(counters.pool_connections_lost) >= peer.fabric->failures);
}

static bool is_shut(uint32_t lease) { return fm_slot_shut(&ledger, lease * SLOTS); }

/* One is silent, with transfers under way, and the device never gives up: the other's session goes on as if nothing were. */
static void one_that_dies(void)
{
    static struct fm_io lost[4];
    set_up_several(2, TIMEOUT_NS);
    peer.fabric->retry_ns = LONG_NS;
    both_at_once(6);
    uint32_t closed = atomic_load(&peer.closed_of[0]);
    peer_silence(1, true);
    uint64_t begin = fm_now_ns();
    for (uint32_t k = 0; k < 4; k++) {
        lost[k] = (struct fm_io){ .kind = k < 2 ? FM_IO_FETCH : FM_IO_STORE, .n = 8, .frame = 256 + 8 * k,
                                  .slot = SLOTS + 8 * k };
        servers[1].submit(&servers[1], &lost[k]);
    }
    uint32_t rounds = 0;
    for (; !is_shut(1); rounds++) {
        CHECK(fm_now_ns() - begin < WAIT_NS);
        uint32_t before = atomic_load(&ended_of[0]);
        struct fm_io io = { .kind = FM_IO_STORE, .n = 8, .frame = 0, .slot = rounds % 64 * 8 };
        fill(words_of(0), 8, rounds);
        servers[0].submit(&servers[0], &io);
        await(&ended_of[0], before + 1);
        CHECK(io.status == 0);
    }
    await_ends(rounds + 4);
    for (uint32_t k = 0; k < 4; k++)
        CHECK(lost[k].status == ETIMEDOUT && lost[k].final);
    CHECK(fm_now_ns() - begin >= TIMEOUT_NS && rounds > 0);
    CHECK(strstr(last_said, "the-test:2 has not answered for too long") != NULL);
    CHECK(!is_shut(0) && atomic_load(&peer.closed_of[0]) == closed && there[1].down == 1 && there[0].down == 0);
    many_at_once(8, 2);
    peer_silence(1, false);
    while (is_shut(1))                                    /* it is used again once it answers */
        sched_yield();
    both_at_once(6);
}

/* Nothing is stored there, and nobody is told; the session ends, there too. */
static void one_that_is_given_back(void)
{
    set_up_several(2, LONG_NS);
    both_at_once(2);
    __atomic_store_n(&there[1].gone, FM_SERVER_GIVEN_BACK, __ATOMIC_SEQ_CST);
    await(&peer.closed_of[1], 1);
    CHECK(is_shut(1) && !is_shut(0) && !servers[1].grant(&servers[1], EXTENTS) && servers[0].grant(&servers[0], 0));
    many_at_once(8, 2);
    CHECK(atomic_load(&said) == 0 && atomic_load(&peer.closed_of[0]) == 0);
    while (LOAD(counters.engine_bytes) != FM_RDMA_SHARED_BYTES)
        sched_yield();
}

int main(int argc, char **argv)
{
    static void (*const cases[])(void) = { two_servers, two_servers_that_fail, one_that_dies, one_that_is_given_back };
    return run_cases(argc, argv, cases, sizeof cases / sizeof cases[0]);
}
