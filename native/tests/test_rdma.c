/* test_rdma.c - the RDMA client, backend and agent together, on verbs that are none (fake_verbs.c): right bytes, whatever
 * fails.
 *
 * What was stored is what is fetched, with many transfers under way, completions of several queue pairs in any order, work
 * requests that fail half done, queue pairs that end, agents that end; what can't be had fails in time; and whoever joins
 * without being an engine of the job, or asks for what is not its own, gets nothing.
 */
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "check.h"
#include "rdma_engine.h"

#define OTHER_SLOT 2048u                 /* of the pool: from there on nobody but other processes stores */

/* ---- another process of the job, or a stranger: by hand ---------------------------------------------------- */

struct other {
    int sock;
    struct fm_rdma_ring *ring;
    uint32_t reaped;
};

static bool is_closed(int sock)
{
    char byte;
    ssize_t r;
    while ((r = recv(sock, &byte, 1, 0)) > 0)
        continue;
    return r == 0 || errno == ECONNRESET;
}

static int connect_to_agent(void)
{
    int sock = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    CHECK(sock >= 0 && connect(sock, (struct sockaddr *)there[0].address, there[0].address_bytes) == 0);
    return sock;
}

static struct fm_rdma_hello hello_of(uint32_t slot)
{
    struct fm_rdma_hello h = { .magic = FM_RDMA_MAGIC, .version = FM_RDMA_VERSION, .slot = slot };
    memcpy(h.pass.token, peer.options.token, sizeof h.pass.token);
    return h;
}

static struct other join_as(uint32_t slot)
{
    struct other o = { .sock = connect_to_agent() };
    struct fm_rdma_hello h = hello_of(slot);
    struct fm_rdma_welcome w;
    char control[CMSG_SPACE(sizeof(int))] __attribute__((aligned(8)));
    struct iovec iov = { &w, sizeof w };
    struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control };
    CHECK(send(o.sock, &h, sizeof h, 0) == (ssize_t)sizeof h && recvmsg(o.sock, &m, 0) == (ssize_t)sizeof w);
    int fd = *(int *)CMSG_DATA(CMSG_FIRSTHDR(&m));
    o.ring = mmap(NULL, FM_RDMA_SHARED_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    CHECK(o.ring != MAP_FAILED);
    close(fd);
    return o;
}

static uint64_t *bounce_of(const struct other *o, uint32_t frame)
{
    return (uint64_t *)((char *)o->ring + FM_RDMA_FRAMES_AT + frame * FM_PAGE_BYTES);
}

static void request(struct other *o, struct fm_rdma_request r)
{
    o->ring->request[o->ring->requested % FM_RDMA_FRAMES] = r;
    __atomic_store_n(&o->ring->requested, o->ring->requested + 1, __ATOMIC_SEQ_CST);
    if (fm_rdma_load(&o->ring->agent_sleeps) != 0)
        CHECK(send(o->sock, "", 1, MSG_NOSIGNAL) == 1 || errno == EPIPE);
}

static uint32_t await_done(struct other *o)
{
    uint64_t begin = fm_now_ns();
    while (fm_rdma_load(&o->ring->completed) == o->reaped) {
        CHECK(fm_now_ns() - begin < WAIT_NS);
        sched_yield();
    }
    return o->ring->done[o->reaped++ % FM_RDMA_FRAMES];
}

/* A process that stores and fetches in its own part of the pool. */
static void *be_other(void *arg)
{
    uint32_t number = *(uint32_t *)arg, slot = OTHER_SLOT + number * 256;
    struct other o = join_as(100 + number);
    for (uint32_t round = 0; round < 200; round++) {
        for (uint32_t k = 0; k < 8; k++) {
            fill(bounce_of(&o, k * 8), 8, number * 1000000 + round * 100 + k);
            request(&o, (struct fm_rdma_request){ FM_RDMA_WRITE, k * 8, slot + k * 8, 8 });
        }
        for (uint32_t k = 0; k < 8; k++)
            CHECK(await_done(&o) == k * 8);              /* of one queue pair: in order */
        for (uint32_t k = 0; k < 8; k++)
            request(&o, (struct fm_rdma_request){ FM_RDMA_READ, 64 + k * 8, slot + k * 8, 8 });
        for (uint32_t k = 0; k < 8; k++) {
            CHECK(await_done(&o) == 64 + k * 8);
            is_filled(bounce_of(&o, 64 + k * 8), 8, number * 1000000 + round * 100 + k);
        }
    }
    close(o.sock);
    return NULL;
}

/* ---- cases: each in a process of its own ------------------------------------------------------------------- */

static void right_bytes(void)
{
    set_up(LONG_NS);
    atomic_store(&peer.one_at_a_time, 1);
    many_at_once(1, 4);
    many_at_once(32, 4);
    peer.fabric->delay_ns_max = 200000;
    many_at_once(1, 2);
    many_at_once(32, 4);
    CHECK(atomic_load(&said) == 0 && LOAD(counters.pool_connections_lost) == 0 && atomic_load(&peer.opened) == 1);
    CHECK(LOAD(counters.engine_bytes) == FM_RDMA_SHARED_BYTES);
    CHECK(peer.fabric->writes == 6 * FRAMES + 8 * FRAMES / 32);
}

static void several_processes(void)
{
    pthread_t id[4];
    uint32_t number[4];
    set_up(LONG_NS);
    peer.fabric->delay_ns_max = 50000;
    for (uint32_t k = 0; k < 4; k++) {
        number[k] = k;
        CHECK(pthread_create(&id[k], NULL, be_other, &number[k]) == 0);
    }
    many_at_once(4, 20);
    for (uint32_t k = 0; k < 4; k++)
        CHECK(pthread_join(id[k], NULL) == 0);
    await(&peer.closed, 4);
    CHECK(atomic_load(&peer.opened) == 5 && LOAD(counters.pool_connections_lost) == 0);
}

/* Work requests end half done and take those behind them along; each session's end is another's beginning. */
static void what_fails_is_made_again(void)
{
    set_up(LONG_NS);
    atomic_store(&peer.one_at_a_time, 1);
    peer.fabric->delay_ns_max = 20000;
    peer.fabric->fail_ppm = 2000;
    many_at_once(1, 12);
    many_at_once(4, 12);
    many_at_once(32, 12);
    CHECK(peer.fabric->failures > 0 && LOAD(counters.pool_connections_lost) >= peer.fabric->failures);
    CHECK(LOAD(counters.fetch_retries) == 0);
}

static void silence_has_an_end(void)
{
    set_up(TIMEOUT_NS);
    peer.fabric->retry_ns = LONG_NS;                      /* a device that never gives up by itself */
    fill(words_of(0), 2, 5);
    CHECK(transfer(FM_IO_STORE, 0, 7, 2).status == 0);
    __atomic_store_n(&peer.fabric->silent, 1, __ATOMIC_SEQ_CST);
    uint64_t begin = fm_now_ns();
    struct fm_io io = transfer(FM_IO_FETCH, 4, 7, 2);
    CHECK(io.status == ETIMEDOUT && io.final && fm_now_ns() - begin >= TIMEOUT_NS);
    CHECK(strstr(last_said, "the-test:1 has not answered for too long") != NULL);
    fill(words_of(0), 2, 6);
    io = transfer(FM_IO_STORE, 0, 9, 2);
    CHECK(io.status == ETIMEDOUT && io.final);
    __atomic_store_n(&peer.fabric->silent, 0, __ATOMIC_SEQ_CST);
    /* It has not gone for good; and what was given up does not come late. */
    begin = fm_now_ns();
    while (transfer(FM_IO_FETCH, 4, 7, 2).status != 0)
        CHECK(fm_now_ns() - begin < WAIT_NS);
    is_filled(words_of(4), 2, 5);
    CHECK(transfer(FM_IO_FETCH, 8, 9, 2).status == 0 && words_of(8)[0] == 0);
}

/* The bounce frames of a request that was given up are in nobody's hand again while it could still be carried out. */
static void what_is_given_up_disturbs_nobody(void)
{
    set_up(TIMEOUT_NS);
    peer.fabric->retry_ns = LONG_NS;
    for (uint32_t round = 0; round < 4; round++) {
        many_at_once(8, 1);
        __atomic_store_n(&peer.fabric->silent, 1, __ATOMIC_SEQ_CST);
        CHECK(transfer(FM_IO_STORE, 0, 100, 8).status == ETIMEDOUT);
        __atomic_store_n(&peer.fabric->silent, 0, __ATOMIC_SEQ_CST);
        uint64_t begin = fm_now_ns();
        while (transfer(FM_IO_FETCH, 8, 0, 8).status != 0)
            CHECK(fm_now_ns() - begin < WAIT_NS);
    }
    CHECK(LOAD(counters.pool_connections_lost) >= 4 && atomic_load(&peer.opened) >= 5);
}

static void an_agent_that_ends(void)
{
    static struct fm_io io[FRAMES];
    set_up(LONG_NS);
    atomic_store(&peer.one_at_a_time, 1);
    for (uint32_t round = 0; round < 5; round++) {
        peer.fabric->delay_ns_max = 1000000;
        CHECK(transfer(FM_IO_STORE, 0, FRAMES, 1).status == 0);
        for (uint32_t k = 0; k < FRAMES; k++) {
            fill(words_of(k), 1, round * 1000 + k);
            io[k] = (struct fm_io){ .kind = FM_IO_STORE, .n = 1, .frame = k, .slot = k };
            backend->submit(backend, &io[k]);
        }
        agent_stop();
        CHECK(peer.status == 0);
        agent_start();
        await_ends(FRAMES);
        memset(chain.frames, 0xee, FRAMES * FM_PAGE_BYTES);
        for (uint32_t k = 0; k < FRAMES; k += 32)
            CHECK(io[k].status == 0 && transfer(FM_IO_FETCH, k, k, 32).status == 0);
        for (uint32_t k = 0; k < FRAMES; k++)
            is_filled(words_of(k), 1, round * 1000 + k);
    }
    CHECK(LOAD(counters.pool_connections_lost) >= 5);
}

static void nobody_there(void)
{
    set_up(TIMEOUT_NS);
    CHECK(transfer(FM_IO_STORE, 0, 0, 1).status == 0);
    agent_stop();
    uint64_t begin = fm_now_ns();
    CHECK(transfer(FM_IO_FETCH, 0, 0, 1).status == ETIMEDOUT);
    /* Nothing is up by now, or soon, and from then on nothing is waited for. */
    while (fm_now_ns() - begin < WAIT_NS) {
        uint64_t now = fm_now_ns();
        CHECK(transfer(FM_IO_FETCH, 0, 0, 1).status == ETIMEDOUT);
        if (fm_now_ns() - now < TIMEOUT_NS / 10) {
            agent_start();
            return;
        }
    }
    CHECK(false);
}

static void lease_has_ended(void)
{
    set_up(LONG_NS);
    CHECK(transfer(FM_IO_STORE, 0, 0, 1).status == 0);
    __atomic_store_n(&there[0].gone, FM_SERVER_GONE, __ATOMIC_SEQ_CST);
    await(&said, 1);
    CHECK(strstr(last_said, "has ended our lease") != NULL);
    struct fm_io io = transfer(FM_IO_FETCH, 0, 0, 1);
    CHECK(io.status == ENODATA && io.final);
    CHECK(transfer(FM_IO_STORE, 0, 0, 1).status == ENODATA && !backend->grant(backend, 1) && chain.full != NULL);
    await(&peer.closed, 1);
}

static void halves_that_are_not_given(void)
{
    atomic_store(&peer.refuses, 3);
    set_up(LONG_NS);
    many_at_once(8, 1);
    CHECK(atomic_load(&peer.refuses) == 0 && atomic_load(&peer.opened) == 1);
}

/* A key that is another lease's: the device says so, and nothing moves. */
static void a_wrong_key(void)
{
    set_up(TIMEOUT_NS);
    CHECK(transfer(FM_IO_STORE, 0, 0, 1).status == 0);
    __atomic_store_n(&peer.fabric->rkey, peer.rkeys + 1, __ATOMIC_SEQ_CST);
    memset(words_of(1), 0xee, FM_PAGE_BYTES);
    uint64_t reads = peer.fabric->reads;
    CHECK(transfer(FM_IO_FETCH, 1, 0, 1).status == ETIMEDOUT && peer.fabric->reads == reads);
    CHECK(words_of(1)[0] == 0xeeeeeeeeeeeeeeeeull && closed_for("remote access error"));
}

static void strangers_get_nothing(void)
{
    set_up(LONG_NS);
    many_at_once(8, 1);
    struct fm_rdma_hello wrong[] = { hello_of(50), hello_of(51), hello_of(52) };
    wrong[0].pass.token[15] ^= 1;
    wrong[1].version++;
    wrong[2].magic++;
    for (uint32_t k = 0; k < 3; k++) {
        int sock = connect_to_agent();
        CHECK(send(sock, &wrong[k], sizeof wrong[k], 0) == (ssize_t)sizeof wrong[k] && is_closed(sock));
        close(sock);
    }
    int sock = connect_to_agent();
    CHECK(send(sock, wrong, 1, 0) == 1 && is_closed(sock));
    close(sock);
    int silent = connect_to_agent();                      /* it may wait, and holds nobody up */
    many_at_once(8, 1);
    close(silent);
    CHECK(atomic_load(&peer.opened) == 1 && LOAD(counters.pool_connections_lost) == 0);
}

static void what_is_not_ones_own(void)
{
    static const struct fm_rdma_request wrong[] = {
        { FM_RDMA_READ, FM_RDMA_FRAMES, 0, 1 }, { FM_RDMA_READ, FM_RDMA_FRAMES - 1, 0, 2 },
        { FM_RDMA_READ, 0, 0, 0 },              { FM_RDMA_READ, 0, 0, 33 },
        { FM_RDMA_WRITE, 0, EXTENTS * 512, 1 }, { FM_RDMA_WRITE, 0, EXTENTS * 512 - 1, 2 },
        { 0, 0, 0, 1 },                         { 3, 0, 0, 1 },
        { FM_RDMA_READ, UINT32_MAX, 0, 2 },     { FM_RDMA_WRITE, 0, UINT32_MAX, 32 },
    };
    set_up(LONG_NS);
    many_at_once(8, 1);
    for (uint32_t k = 0; k < sizeof wrong / sizeof wrong[0]; k++) {
        struct other o = join_as(60);
        request(&o, wrong[k]);
        CHECK(is_closed(o.sock));
        close(o.sock);
        munmap(o.ring, FM_RDMA_SHARED_BYTES);
        await(&peer.closed, k + 1);
        CHECK(closed_for("asks for what can't be"));
    }
    struct other o = join_as(60);
    __atomic_store_n(&o.ring->requested, 100000, __ATOMIC_SEQ_CST);
    send(o.sock, "", 1, MSG_NOSIGNAL);
    CHECK(is_closed(o.sock));
    many_at_once(8, 1);
    CHECK(LOAD(counters.pool_connections_lost) == 0);
}

/* What has gathered goes to the device at once. */
static void a_chain_to_a_doorbell(void)
{
    set_up(LONG_NS);
    struct other o = join_as(80);
    uint64_t before = peer.fabric->doorbells;
    for (uint32_t k = 0; k < FM_RDMA_BATCH; k++)
        o.ring->request[k] = (struct fm_rdma_request){ FM_RDMA_WRITE, k, OTHER_SLOT + k, 1 };
    __atomic_store_n(&o.ring->requested, FM_RDMA_BATCH - 1, __ATOMIC_SEQ_CST);
    request(&o, (struct fm_rdma_request){ FM_RDMA_WRITE, FM_RDMA_BATCH - 1, OTHER_SLOT + FM_RDMA_BATCH - 1, 1 });
    for (uint32_t k = 0; k < FM_RDMA_BATCH; k++)
        CHECK(await_done(&o) == k);
    CHECK(peer.fabric->doorbells - before <= 2);
}

/* A process has one session: a new one of it ends the old, there too, before it begins. */
static void a_slot_has_one_session(void)
{
    set_up(LONG_NS);
    struct other first = join_as(70);
    struct other second = join_as(70);
    CHECK(is_closed(first.sock));
    fill(bounce_of(&second, 0), 1, 3);
    request(&second, (struct fm_rdma_request){ FM_RDMA_WRITE, 0, OTHER_SLOT, 1 });
    CHECK(await_done(&second) == 0);
    await(&peer.closed, 1);
    CHECK(closed_for("begun another"));
}

static void a_trial(void)
{
    set_up(LONG_NS);
    peer_tell("try 0\n");
    await(&peer.reached, 1);
    await(&peer.closed, 1);
    __atomic_store_n(&peer.fabric->silent, 1, __ATOMIC_SEQ_CST);
    peer_tell("try 0\n");
    await(&peer.closed, 2);
    CHECK(atomic_load(&peer.reached) == 1 && closed_for("retry counter exceeded"));
    __atomic_store_n(&peer.fabric->silent, 0, __ATOMIC_SEQ_CST);
}

/* Nothing is asked for: the keep-alive notices it, and the session ends. */
static void a_peer_that_goes_is_noticed(void)
{
    set_up(LONG_NS);
    CHECK(transfer(FM_IO_STORE, 0, 0, 1).status == 0);
    uint64_t reads = peer.fabric->reads, begin = fm_now_ns();
    while (__atomic_load_n(&peer.fabric->reads, __ATOMIC_SEQ_CST) == reads)
        CHECK(fm_now_ns() - begin < WAIT_NS);
    __atomic_store_n(&peer.fabric->silent, 1, __ATOMIC_SEQ_CST);
    await(&peer.closed, 1);
    CHECK(closed_for("retry counter exceeded"));
    __atomic_store_n(&peer.fabric->silent, 0, __ATOMIC_SEQ_CST);
    CHECK(transfer(FM_IO_FETCH, 0, 0, 1).status == 0);
}

/* ---- what this host lacks */

static void refuses(enum fake_wrong wrong, const char *device, int gid_index, const char *word)
{
    peer_open(LEASE_BYTES, seed);
    peer.fabric->wrong = wrong;
    peer.options.device = device;
    peer.options.gid_index = gid_index;
    agent_start();
    await(&peer.refused, 1);
    CHECK(strncmp(peer.last_failed, "refused\t", 8) == 0 && strchr(peer.last_failed + 8, '\t') != NULL);
    CHECK(strstr(peer.last_failed, word) != NULL);
}

static void no_device(void) { refuses(FAKE_NO_DEVICE, NULL, -1, "no RDMA device here"); }
static void no_such_device(void) { refuses(FAKE_WELL, "mlx5_7", -1, "no RDMA device mlx5_7"); }
static void port_down(void) { refuses(FAKE_PORT_DOWN, FAKE_DEVICE, -1, "no active port"); }
static void no_gid(void) { refuses(FAKE_NO_GID, NULL, -1, "has no GID"); }
static void no_such_gid(void) { refuses(FAKE_WELL, NULL, 5, "no usable GID of index 5"); }

static void no_locked_memory(void)
{
    peer_open(LEASE_BYTES, seed);
    peer.fabric->wrong = FAKE_NO_LOCKED_MEMORY;
    agent_start();
    peer_tell("try 1\n");
    await(&peer.closed_of[1], 1);
    CHECK(strncmp(peer.last_failed, "failed\t", 7) == 0 && strstr(peer.last_failed, "ulimit -l") != NULL);
}

int main(int argc, char **argv)
{
    static void (*const cases[])(void) = { right_bytes, several_processes, what_fails_is_made_again, silence_has_an_end,
                                           what_is_given_up_disturbs_nobody, an_agent_that_ends, nobody_there, lease_has_ended,
                                           halves_that_are_not_given, a_wrong_key, strangers_get_nothing, what_is_not_ones_own,
                                           a_chain_to_a_doorbell, a_slot_has_one_session, a_trial,
                                           a_peer_that_goes_is_noticed, no_device, no_such_device, port_down, no_gid,
                                           no_such_gid, no_locked_memory };
    return run_cases(argc, argv, cases, sizeof cases / sizeof cases[0]);
}
