/* test_servers.c - a pool on several servers: each transfer, each grant and each trim reaches the server that has the
 * extent, one that was added later as well; one that can't be opened fails what is meant for it and nothing else.
 * The servers' own backend is played: it notes what it is given.
 */
#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include "backend.h"
#include "check.h"

#define EXTENT_BYTES (FM_EXTENT_SLOTS * (uint64_t)FM_PAGE_BYTES)
#define POOL_BYTES (8 * EXTENT_BYTES)

static struct played {
    uint32_t opened, submitted, granted, trimmed, last_slot;
    bool is_rdma;
} played[FM_POOL_SERVERS_MAX];

static struct fm_pool_server servers[FM_POOL_SERVERS_MAX];
static struct fm_pool_ledger ledger;
static struct fm_chain chain;
static struct fm_backend top;
static uint32_t ended, refuses_to_open;

static bool play_open(struct fm_backend *b)
{
    if (refuses_to_open)
        return false;
    played[b->number].opened++;
    return true;
}

static void play_submit(struct fm_backend *b, struct fm_io *io)
{
    played[b->number].submitted++;
    played[b->number].last_slot = io->slot;
    b->ended(b, io);
}

static bool play_grant(struct fm_backend *b, uint32_t extent) { return (void)extent, played[b->number].granted++ == 0; }
static bool play_trim(struct fm_backend *b, uint32_t extent) { return (void)extent, played[b->number].trimmed++ == 0; }

const struct fm_backend fm_backend_nbd = {
    .size = sizeof(struct fm_backend),
    .version = FM_BACKEND_VERSION,
    .name = "played",
    .open = play_open,
    .submit = play_submit,
    .grant = play_grant,
    .trim = play_trim,
};

static bool play_open_rdma(struct fm_backend *b) { return play_open(b) && (played[b->number].is_rdma = true); }

const struct fm_backend fm_backend_rdma = {
    .size = sizeof(struct fm_backend),
    .version = FM_BACKEND_VERSION,
    .name = "played, of another kind",
    .open = play_open_rdma,
    .submit = play_submit,
    .grant = play_grant,
    .trim = play_trim,
};

/* chain.c's, which knows every backend that there is. */
static void ended_up(struct fm_backend *b, struct fm_io *io) { b->up->ended(b->up, io); }

void fm_backend_defaults(struct fm_backend *b) { b->ended = b->ended != NULL ? b->ended : ended_up; }

static void on_end(struct fm_backend *b, struct fm_io *io)
{
    CHECK(b == &top && io != NULL);
    ended++;
}

static int32_t transfer(uint32_t slot, uint32_t n)
{
    struct fm_io io = { .kind = FM_IO_FETCH, .slot = slot, .n = n };
    uint32_t before = ended;
    top.submit(&top, &io);
    CHECK(ended == before + 1);
    return io.status;
}

static void set_up(uint32_t first_extents, uint32_t second_extents)
{
    uint64_t bytes = fm_pool_ledger_bytes(POOL_BYTES);
    void *base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(base != MAP_FAILED && fm_pool_ledger_init_empty(base, POOL_BYTES) == 0);
    for (uint32_t k = 0; k < FM_POOL_SERVERS_MAX; k++)
        servers[k].kind = FM_SERVER_NBD;
    CHECK(fm_pool_ledger_add(base, first_extents) == 0 && fm_pool_ledger_add(base, second_extents) == 1);
    fm_pool_ledger_view(&ledger, base, 0);
    chain = (struct fm_chain){ .ledger = &ledger, .servers = servers };
    memset(played, 0, sizeof played);
    refuses_to_open = 0;
    top = fm_backend_servers;
    top.chain = &chain;
    top.ended = on_end;
}

static void each_extent_has_its_server(void)
{
    set_up(3, 2);
    CHECK(top.open(&top) && played[0].opened == 1 && played[1].opened == 1 && played[2].opened == 0);
    CHECK(transfer(3 * FM_EXTENT_SLOTS - 32, 32) == 0 && played[0].submitted == 1);
    CHECK(transfer(3 * FM_EXTENT_SLOTS, 32) == 0 && played[1].submitted == 1);
    CHECK(played[1].last_slot == 3 * FM_EXTENT_SLOTS);
    CHECK(top.grant(&top, 4) && !top.grant(&top, 3) && top.grant(&top, 2));
    CHECK(top.trim(&top, 2) && top.trim(&top, 4) && !top.trim(&top, 3));
    CHECK(played[0].granted == 1 && played[1].granted == 2 && played[0].trimmed == 1 && played[1].trimmed == 2);
}

static void each_server_has_its_kind(void)
{
    set_up(1, 1);
    servers[1].kind = FM_SERVER_RDMA;
    CHECK(top.open(&top) && transfer(0, 1) == 0 && transfer(FM_EXTENT_SLOTS, 1) == 0);
    CHECK(!played[0].is_rdma && played[1].is_rdma && played[0].submitted == 1 && played[1].submitted == 1);
}

static void one_is_added_later(void)
{
    set_up(1, 1);
    CHECK(top.open(&top));
    CHECK(fm_pool_ledger_add(ledger.base, 6) == 2 && played[2].opened == 0);
    CHECK(top.grant(&top, 7) && played[2].opened == 1);
    CHECK(transfer(2 * FM_EXTENT_SLOTS, 1) == 0 && played[2].opened == 1 && played[2].submitted == 1);
}

static void one_can_not_be_opened(void)
{
    set_up(1, 1);
    CHECK(top.open(&top));
    CHECK(fm_pool_ledger_add(ledger.base, 1) == 2 && fm_pool_ledger_add(ledger.base, 1) == 3);
    refuses_to_open = 1;
    CHECK(transfer(2 * FM_EXTENT_SLOTS, 1) == ENXIO && !top.grant(&top, 2) && top.trim(&top, 2));
    CHECK(transfer(0, 1) == 0);
    refuses_to_open = 0;
    CHECK(transfer(2 * FM_EXTENT_SLOTS, 1) == 0);
    servers[3].kind = FM_SERVER_NONE;
    CHECK(transfer(3 * FM_EXTENT_SLOTS, 1) == ENXIO && !top.grant(&top, 3));
}

/* At the start all must be there, or the process is not managed; in the child of a fork it is so again. */
static void the_start(void)
{
    set_up(1, 1);
    refuses_to_open = 1;
    CHECK(!top.open(&top));
    refuses_to_open = 0;
    CHECK(top.open(&top) && played[0].opened == 1);
    CHECK(top.open(&top) && played[0].opened == 2 && played[1].opened == 2);
}

int main(void)
{
    each_extent_has_its_server();
    each_server_has_its_kind();
    one_is_added_later();
    one_can_not_be_opened();
    the_start();
    puts("test_servers: all well");
    return 0;
}
