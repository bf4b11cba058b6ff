/* test_nbd.c - the NBD client against a server of our own that follows the protocol, or breaks it where it is told to.
 *
 * What was stored is what is fetched, with many requests under way and replies in any order; whatever the server does wrong
 * ends the connection, and the request is made again or fails in time; never are wrong bytes taken for right ones.
 */
#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "nbd_server.h"

#define FRAMES 512u
#define WAIT_NS 60000000000ull
#define TIMEOUT_NS 2000000000ull         /* where it is to be met */
#define LONG_NS 50000000000ull

static struct fm_chain chain;
static struct fm_backend backend;
static struct fm_pool_ledger ledger;
static struct fm_counters counters;
static atomic_uint ended;
static struct fm_pool_server two[2];
static bool second_of_two;

/* ---- what the engine gives to a backend, beside backend_host.c */

static void on_end(struct fm_backend *b, struct fm_io *io)
{
    (void)b, (void)io;
    atomic_fetch_add(&ended, 1);
}

static bool trim(void *ctx, uint32_t extent)
{
    (void)ctx;
    return backend.trim(&backend, extent);
}

/* ---- transfers ----------------------------------------------------------------------------------------- */

static void await_ends(uint32_t n)
{
    await(&ended, n);
    atomic_store(&ended, 0);
}

static struct fm_io transfer(uint32_t kind, uint32_t frame, uint32_t slot, uint32_t n)
{
    struct fm_io io = { .kind = kind, .n = n, .frame = frame, .slot = slot };
    backend.submit(&backend, &io);
    await_ends(1);
    return io;
}

static uint64_t *words_of(uint32_t frame) { return (uint64_t *)(chain.frames + (uint64_t)frame * FM_PAGE_BYTES); }

static void fill(uint32_t frame, uint32_t n, uint64_t seed)
{
    for (uint32_t k = 0; k < n * FM_PAGE_BYTES / 8; k++)
        words_of(frame)[k] = seed * 1000003 + k;
}

static void is_filled(uint32_t frame, uint32_t n, uint64_t seed)
{
    for (uint32_t k = 0; k < n * FM_PAGE_BYTES / 8; k++)
        CHECK(words_of(frame)[k] == seed * 1000003 + k);
}

/* As many as there can be: a page in every frame, or runs. */
static void many_at_once(uint32_t n, uint32_t rounds)
{
    static struct fm_io io[FRAMES];
    uint32_t count = FRAMES / n;
    for (uint32_t round = 0; round < rounds; round++) {
        for (uint32_t k = 0; k < count; k++) {
            fill(k * n, n, round * 10000 + k);
            io[k] = (struct fm_io){ .kind = FM_IO_STORE, .n = n, .frame = k * n, .slot = (k * 7 % count) * n };
            backend.submit(&backend, &io[k]);
        }
        await_ends(count);
        memset(chain.frames, 0xee, FRAMES * FM_PAGE_BYTES);
        for (uint32_t k = 0; k < count; k++) {
            CHECK(io[k].status == 0);
            io[k] = (struct fm_io){ .kind = FM_IO_FETCH, .n = n, .frame = k * n, .slot = (k * 7 % count) * n };
            backend.submit(&backend, &io[k]);
        }
        await_ends(count);
        for (uint32_t k = 0; k < count; k++) {
            CHECK(io[k].status == 0);
            is_filled(k * n, n, round * 10000 + k);
        }
    }
}

static void open_backend(void)
{
    backend = fm_backend_nbd;
    backend.chain = &chain;
    backend.ended = on_end;
    backend.number = second_of_two;
    CHECK(backend.open(&backend));
}

static void set_up_with(enum how how, bool meets_timeout)
{
    int prot = PROT_READ | PROT_WRITE;
    void *base = mmap(NULL, fm_pool_ledger_bytes(POOL_BYTES), prot, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    char *frames = mmap(NULL, FRAMES * FM_PAGE_BYTES, prot, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(base != MAP_FAILED && frames != MAP_FAILED && fm_pool_ledger_init_empty(base, POOL_BYTES) == 0);
    CHECK(!second_of_two || fm_pool_ledger_add(base, EXTENTS / 2) == 0);
    CHECK(fm_pool_ledger_add(base, second_of_two ? EXTENTS / 2 : EXTENTS) == second_of_two);
    fm_pool_ledger_view(&ledger, base, 0);
    ledger.trim = trim;
    chain = (struct fm_chain){ .frames = frames, .ledger = &ledger, .count = &counters, .thread = test_thread, .say = say,
                               .pool_bytes = POOL_BYTES, .gate_in = gate_in, .gate_out = gate_out };
    atomic_store(&server.how, (int)how);
    server_open(meets_timeout ? TIMEOUT_NS : LONG_NS);
    two[1] = server.there;
    chain.servers = second_of_two ? two : &server.there;
    open_backend();
}

static void await_connections(void)
{
    uint64_t begin = fm_now_ns();
    for (uint32_t k = 0; k < FM_NBD_CONNECTIONS; sched_yield()) {
        CHECK(fm_now_ns() - begin < WAIT_NS);
        k += fm_nbd_load(&fm_nbd[0].connection[k].state) == FM_NBD_UP;
    }
}

static void set_up(enum how how) { set_up_with(how, false); }

/* ---- cases: each in a process of its own ------------------------------------------------------------------ */

static void right_bytes(void)
{
    set_up(WELL);
    many_at_once(1, 4);
    await_connections();
    many_at_once(32, 4);
    atomic_store(&server.how, OUT_OF_ORDER);
    many_at_once(1, 2);
    many_at_once(32, 2);
    CHECK(atomic_load(&said) == 0 && counters.pool_connections_lost == 0);
}

static void one_connection(void)
{
    set_up(ONE_CONNECTION);
    many_at_once(1, 2);
    many_at_once(32, 2);
    CHECK(atomic_load(&server.connections) == 1);
}

static void goes_wrong_once(void)
{
    set_up(WELL);
    many_at_once(4, 1);
    for (int how = BAD_MAGIC; how <= SHUTS_DOWN; how++) {
        /* First a request by itself, then amid many. */
        fill(0, 8, (uint64_t)how);
        CHECK(transfer(FM_IO_STORE, 0, 100, 8).status == 0);
        for (int amid = 0; amid < 2; amid++) {
            uint32_t before = atomic_load(&server.misbehaved);
            memset(words_of(16), 0xee, 8 * FM_PAGE_BYTES);
            atomic_store(&server.how, how);
            if (amid == 1)
                many_at_once(2, 1);
            else
                CHECK(transfer(FM_IO_FETCH, 16, 100, 8).status == 0);
            if (amid == 0)
                is_filled(16, 8, (uint64_t)how);
            CHECK(atomic_load(&server.misbehaved) == before + 1);
        }
        CHECK(transfer(FM_IO_STORE, 0, 100, 8).status == 0);
    }
    CHECK(counters.pool_connections_lost >= 2 * (SHUTS_DOWN - BAD_MAGIC + 1));
}

/* The first connection meets it, and there is none beside it. */
static void goes_wrong_in_the_handshake(void)
{
    for (int how = BAD_HELLO; how <= CLOSES_IN_HANDSHAKE; how++) {
        int status, pid = fork();
        if (pid == 0) {
            set_up((enum how)how);
            many_at_once(4, 1);
            CHECK(atomic_load(&server.misbehaved) == 1);
            server_stops_listening();
            _exit(0);
        }
        CHECK(pid > 0 && waitpid(pid, &status, 0) == pid && status == 0);
    }
    set_up(WELL);
}

static void errors_are_told(void)
{
    set_up(WELL);
    CHECK(transfer(FM_IO_STORE, 0, 0, 1).status == 0);
    atomic_store(&server.how, SAYS_EIO);
    struct fm_io io = transfer(FM_IO_FETCH, 0, 0, 1);
    CHECK(io.status == EIO && !io.final);
    CHECK(transfer(FM_IO_STORE, 0, 0, 1).status == EIO);
    atomic_store(&server.how, SAYS_STRANGE_ERROR);
    CHECK(transfer(FM_IO_FETCH, 0, 0, 1).status == EINVAL);
    atomic_store(&server.how, WELL);
    CHECK(transfer(FM_IO_FETCH, 0, 0, 1).status == 0 && counters.pool_connections_lost == 0);
}

static void silence_has_an_end(void)
{
    set_up_with(WELL, true);
    fill(0, 2, 5);
    CHECK(transfer(FM_IO_STORE, 0, 7, 2).status == 0);
    atomic_store(&server.how, SILENT);
    uint64_t begin = fm_now_ns();
    struct fm_io io = transfer(FM_IO_FETCH, 4, 7, 2);
    CHECK(io.status == ETIMEDOUT && io.final && fm_now_ns() - begin >= TIMEOUT_NS);
    CHECK(strstr(last_said, "the-test:1 has not answered for too long") != NULL);
    io = transfer(FM_IO_STORE, 0, 9, 2);
    CHECK(io.status == ETIMEDOUT && io.final);
    atomic_store(&server.how, WELL);
    /* It has not gone for good. */
    begin = fm_now_ns();
    while (transfer(FM_IO_FETCH, 4, 7, 2).status != 0)
        CHECK(fm_now_ns() - begin < WAIT_NS);
    is_filled(4, 2, 5);
}

static void nobody_there(void)
{
    set_up_with(WELL, true);
    CHECK(transfer(FM_IO_STORE, 0, 0, 1).status == 0);
    server_stops_listening();
    atomic_store(&server.how, SILENT);
    uint64_t begin = fm_now_ns();
    CHECK(transfer(FM_IO_FETCH, 0, 0, 1).status == ETIMEDOUT);
    /* Nothing is up by now, or soon, and from then on nothing is waited for. */
    while (fm_now_ns() - begin < WAIT_NS) {
        uint64_t now = fm_now_ns();
        CHECK(transfer(FM_IO_FETCH, 0, 0, 1).status == ETIMEDOUT);
        if (fm_now_ns() - now < TIMEOUT_NS / 10)
            return;
    }
    CHECK(false);
}

static void gone(enum how how, const char *word)
{
    set_up(WELL);
    CHECK(transfer(FM_IO_STORE, 0, 0, 1).status == 0);
    await_connections();
    atomic_store(&server.how, (int)how);
    for (struct fm_nbd_connection *c = fm_nbd[0].connection; c < fm_nbd[0].connection + FM_NBD_CONNECTIONS; c++) {
        fm_nbd_hold(c);
        shutdown(c->fd, SHUT_RDWR);
        fm_nbd_release(c);
    }
    uint64_t begin = fm_now_ns();
    struct fm_io io = transfer(FM_IO_FETCH, 0, 0, 1);
    CHECK(io.status == ENODATA && io.final);
    CHECK(fm_now_ns() - begin < LONG_NS / 2);
    await(&said, 1);
    CHECK(atomic_load(&said) == 1 && strstr(last_said, word) != NULL && strstr(last_said, "a secret") == NULL);
    CHECK(transfer(FM_IO_STORE, 0, 0, 1).status == ENODATA && !backend.grant(&backend, 1) && chain.full != NULL);
    atomic_store(&server.how, WELL);
    CHECK(transfer(FM_IO_FETCH, 0, 0, 1).status == ENODATA);         /* it is not taken for the same again */
}

static void started_anew(void) { gone(UNKNOWN, "no longer has"); }
static void wants_tls(void) { gone(WANTS_TLS, "TLS"); }
static void is_smaller(void) { gone(SMALLER, "smaller"); }
static void is_read_only(void) { gone(READ_ONLY, "read-only"); }

/* The supervisor's word, while the server still answers. */
static void lease_has_ended(void)
{
    set_up(WELL);
    CHECK(transfer(FM_IO_STORE, 0, 0, 1).status == 0);
    __atomic_store_n(&server.there.gone, 1, __ATOMIC_SEQ_CST);
    await(&said, 1);
    CHECK(strstr(last_said, "has ended our lease") != NULL);
    struct fm_io io = transfer(FM_IO_FETCH, 0, 0, 1);
    CHECK(io.status == ENODATA && io.final);
}

static void space_is_given_back(void)
{
    set_up(WELL);
    CHECK(transfer(FM_IO_STORE, 0, 0, 1).status == 0);
    uint32_t e[2];
    for (uint32_t k = 0; k < 2; k++) {
        e[k] = fm_extent_take(&ledger, FM_EXTENT_NONE);
        CHECK(backend.grant(&backend, e[k]));
        fill(0, 8, k);
        CHECK(transfer(FM_IO_STORE, 0, e[k] * FM_EXTENT_SLOTS, 8).status == 0);
    }
    fm_extent_release(&ledger, e[0]);
    await(&server.trims, 1);
    CHECK(server.trimmed_bytes == EXTENT_BYTES);
    char byte;
    server_copy(&byte, server.bytes + e[0] * EXTENT_BYTES + 8, 1);
    CHECK(byte == 0);
    CHECK(transfer(FM_IO_FETCH, 8, e[1] * FM_EXTENT_SLOTS, 8).status == 0);
    is_filled(8, 8, 1);
    /* Not lent again before the server has answered. */
    uint64_t begin = fm_now_ns();
    while (__atomic_load_n(&ledger.extent_refs[e[0]], __ATOMIC_ACQUIRE) != 0)
        CHECK(fm_now_ns() - begin < WAIT_NS);
}

/* Its extents lie behind those of another, which is never asked; to this one they begin at 0. */
static void the_second_of_two_servers(void)
{
    uint32_t first = EXTENTS / 2 * FM_EXTENT_SLOTS;
    second_of_two = true;
    set_up(WELL);
    CHECK(atomic_load(&server.connections) == 0);        /* nothing was asked of it yet */
    fill(0, 8, 3);
    CHECK(transfer(FM_IO_STORE, 0, first + 5, 8).status == 0);
    char there[FM_PAGE_BYTES];
    server_copy(there, server.bytes + 5 * FM_PAGE_BYTES, sizeof there);
    CHECK(memcmp(there, words_of(0), sizeof there) == 0);
    CHECK(transfer(FM_IO_FETCH, 8, first + 5, 8).status == 0);
    is_filled(8, 8, 3);
    uint32_t last = EXTENTS * FM_EXTENT_SLOTS - 32;
    CHECK(transfer(FM_IO_STORE, 0, last, 32).status == 0 && transfer(FM_IO_FETCH, 64, last, 32).status == 0);
    __atomic_store_n(&two[1].gone, 1, __ATOMIC_SEQ_CST);
    await(&said, 1);
    CHECK(fm_slot_shut(&ledger, first) && !fm_slot_shut(&ledger, first - 1));
    CHECK(!backend.grant(&backend, EXTENTS / 2));
}

int main(int argc, char **argv)
{
    static void (*const cases[])(void) = { right_bytes, one_connection, goes_wrong_once, goes_wrong_in_the_handshake,
                                           errors_are_told, silence_has_an_end, nobody_there, started_anew, wants_tls,
                                           is_smaller, is_read_only, lease_has_ended, space_is_given_back,
                                           the_second_of_two_servers };
    for (uint32_t k = 0; k < sizeof cases / sizeof cases[0]; k++) {
        int status, pid = argc > 1 && atoi(argv[1]) != (int)k ? -1 : fork();
        if (argc > 1 && pid < 0)
            continue;
        if (pid == 0) {
            cases[k]();
            server_stops_listening();
            fflush(stdout);
            _exit(0);
        }
        CHECK(pid > 0 && waitpid(pid, &status, 0) == pid);
        if (status != 0)
            fprintf(stderr, "case %u failed: %d\n", k, status);
        CHECK(status == 0);
    }
    return 0;
}
