/* servers.c - a pool that lies on servers: each transfer goes to the one that has its extent.
 *
 * Every server has a backend of its own, of its own kind, which knows nothing of the others.  One that was added while
 * the program runs is opened when the first extent of it is met.
 */
#include <errno.h>
#include <stddef.h>

#include "backend.h"
#include "fm_assert.h"

static struct {
    fm_lock lock;
    uint32_t open;                      /* a bit for each */
    struct fm_backend server[FM_POOL_SERVERS_MAX];
} all;

_Static_assert(FM_POOL_SERVERS_MAX <= FM_SPANS_MAX && FM_POOL_SERVERS_MAX <= 32, "a span and a bit for each server");

static const struct fm_backend *backend_of(uint32_t kind)
{
    switch ((enum fm_server_kind)kind) {
    case FM_SERVER_NBD: return &fm_backend_nbd;
    case FM_SERVER_RDMA: return &fm_backend_rdma;
    case FM_SERVER_NONE: break;
    }
    return NULL;
}

static bool is_open(uint32_t k) { return (__atomic_load_n(&all.open, __ATOMIC_ACQUIRE) >> k & 1) != 0; }

static bool open_server(struct fm_backend *b, uint32_t k)
{
    const struct fm_backend *kind = backend_of(b->chain->servers[k].kind);
    fm_lock_take(&all.lock);
    if (kind != NULL && !is_open(k)) {
        struct fm_backend *s = &all.server[k];
        *s = *kind;
        s->chain = b->chain;
        s->up = b;
        s->number = k;
        fm_backend_defaults(s);
        if (s->open(s))
            __atomic_fetch_or(&all.open, 1u << k, __ATOMIC_RELEASE);
    }
    fm_lock_drop(&all.lock);
    return is_open(k);
}

/* NULL: it can't be spoken to. */
static struct fm_backend *server_of(struct fm_backend *b, uint32_t extent)
{
    uint32_t k = fm_pool_span_of(b->chain->ledger, extent);
    fm_assert(k < FM_POOL_SERVERS_MAX);
    return is_open(k) || open_server(b, k) ? &all.server[k] : NULL;
}

/* Those that are there already; one must be, or there is no pool. */
static bool servers_open(struct fm_backend *b)
{
    uint32_t n = fm_pool_spans(b->chain->ledger);
    all.lock = (fm_lock){ 0 };          /* in the child of a fork all of it is the parent's */
    all.open = 0;
    bool good = n > 0;
    for (uint32_t k = 0; k < n && good; k++)
        good = open_server(b, k);
    return good;
}

static void servers_submit(struct fm_backend *b, struct fm_io *io)
{
    struct fm_backend *s = server_of(b, io->slot / FM_EXTENT_SLOTS);
    fm_assert(io->slot % FM_EXTENT_SLOTS + io->n <= FM_EXTENT_SLOTS);
    if (s != NULL) {
        s->submit(s, io);
        return;
    }
    io->status = ENXIO;
    b->ended(b, io);
}

static bool servers_grant(struct fm_backend *b, uint32_t extent)
{
    struct fm_backend *s = server_of(b, extent);
    return s != NULL && s->grant(s, extent);
}

static bool servers_trim(struct fm_backend *b, uint32_t extent)
{
    struct fm_backend *s = server_of(b, extent);
    return s == NULL || s->trim(s, extent);
}

const struct fm_backend fm_backend_servers = {
    .size = sizeof(struct fm_backend),
    .version = FM_BACKEND_VERSION,
    .name = "servers",
    .open = servers_open,
    .submit = servers_submit,
    .grant = servers_grant,
    .trim = servers_trim,
};
