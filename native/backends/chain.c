/* chain.c - puts a backend and its filters together; the one place where defaults are filled in.
 *
 * A process has one chain, made when it is adopted and again in the child of a fork.
 */
#include <stddef.h>

#include "backend.h"
#include "fm_assert.h"

static struct fm_backend link_of[FM_FILTERS_MAX + 1];

static bool open_nothing(struct fm_backend *b)
{
    (void)b;
    return true;
}

static void submit_down(struct fm_backend *b, struct fm_io *io) { b->next->submit(b->next, io); }

void fm_backend_ended_up(struct fm_backend *b, struct fm_io *io)
{
    if (b->up != NULL)
        b->up->ended(b->up, io);
    else
        b->chain->done(io);
}

static bool grant_down(struct fm_backend *b, uint32_t extent) { return b->next == NULL || b->next->grant(b->next, extent); }
static bool trim_down(struct fm_backend *b, uint32_t extent) { return b->next == NULL || b->next->trim(b->next, extent); }

void fm_backend_defaults(struct fm_backend *b)
{
    fm_assert(b->size == sizeof *b && b->version == FM_BACKEND_VERSION);
    fm_assert(b->submit != NULL || b->next != NULL);
    b->open = b->open != NULL ? b->open : open_nothing;
    b->submit = b->submit != NULL ? b->submit : submit_down;
    b->ended = b->ended != NULL ? b->ended : fm_backend_ended_up;
    b->grant = b->grant != NULL ? b->grant : grant_down;
    b->trim = b->trim != NULL ? b->trim : trim_down;
}

static const struct fm_backend *filter_of(uint32_t kind)
{
    switch ((enum fm_filter_kind)kind) {
    case FM_FILTER_CHECKSUM: return &fm_filter_checksum;
    case FM_FILTER_STATS: return &fm_filter_stats;
    case FM_FILTER_DELAY: return &fm_filter_delay;
    case FM_FILTER_ERROR: return &fm_filter_error;
    case FM_FILTER_NONE: break;
    }
    return NULL;
}

static const struct fm_backend *backend_of(uint32_t kind)
{
    switch ((enum fm_backend_kind)kind) {
    case FM_BACKEND_MEM: return &fm_backend_mem;
    case FM_BACKEND_FILE: return &fm_backend_file;
    case FM_BACKEND_SERVERS: return &fm_backend_servers;
    }
    return NULL;
}

struct fm_backend *fm_chain_open(struct fm_chain *chain, const struct fm_control *control)
{
    uint32_t n = control->filters;
    if (n > FM_FILTERS_MAX)
        return NULL;
    for (uint32_t k = 0; k <= n; k++) {
        const struct fm_backend *kind = k < n ? filter_of(control->filter[k].kind) : backend_of(control->backend);
        if (kind == NULL)
            return NULL;
        struct fm_backend *b = &link_of[k];
        *b = *kind;
        b->chain = chain;
        b->config = k < n ? &control->filter[k] : NULL;
        b->next = k < n ? &link_of[k + 1] : NULL;
        b->up = k > 0 ? &link_of[k - 1] : NULL;
        fm_backend_defaults(b);
    }
    for (uint32_t k = 0; k <= n; k++)
        if (!link_of[k].open(&link_of[k]))
            return NULL;
    return &link_of[0];
}
