/* stats.c - a filter that counts the transfers that pass and how long they take (pool_requests, pool_wait_ns). */
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
    fm_add(b->chain->count->pool_requests, 1);
    fm_add(b->chain->count->pool_wait_ns, fm_now_ns() - io->begun_ns);
    fm_backend_ended_up(b, io);
}

const struct fm_backend fm_filter_stats = {
    .size = sizeof(struct fm_backend),
    .version = FM_BACKEND_VERSION,
    .name = "stats",
    .submit = stats_submit,
    .ended = stats_ended,
};
