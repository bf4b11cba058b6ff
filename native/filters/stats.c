/* stats.c - a filter that counts the transfers that pass and how long they take (pool_fetches, pool_fetch_ns and so on). */
#include <stddef.h>

#include "backend.h"
#include "engine/sys.h"

static void stats_submit(struct fm_backend *b, struct fm_io *io)
{
    io->begun_ns = fm_now_ns();
    b->next->submit(b->next, io);
}

static void stats_ended(struct fm_backend *b, struct fm_io *io)
{
    struct fm_counters *count = b->chain->count;
    uint64_t took_ns = fm_now_ns() - io->begun_ns;
    if (io->kind == FM_IO_FETCH) {
        fm_add(count->pool_fetches, 1);
        fm_add(count->pool_fetch_ns, took_ns);
    } else {
        fm_add(count->pool_stores, 1);
        fm_add(count->pool_store_ns, took_ns);
    }
    fm_backend_ended_up(b, io);
}

const struct fm_backend fm_filter_stats = {
    .size = sizeof(struct fm_backend),
    .version = FM_BACKEND_VERSION,
    .name = "stats",
    .submit = stats_submit,
    .ended = stats_ended,
};
