/* streams.c - the data plane's own prefetch plan: sequential streams.
 *
 * It is what works when no control plane does.  A fault on the page just behind what a stream
 * has asked for continues it with a doubled window; anything else begins a new one in the place
 * of the least recently used.  A window ends in a marker (see fault.c), and touching that keeps
 * the stream two windows ahead of the program.
 * A program may advise otherwise for a range: random pages come one by one and don't disturb the streams, sequential
 * ones in the largest windows from the first fault on.
 */
#include <stddef.h>

#include "core/core.h"
#include "fm_assert.h"

#define WINDOW_FIRST 4u
#define WINDOWS_AHEAD 2u

static struct fm_stream *oldest(struct fm_core *c)
{
    struct fm_stream *s = &c->stream[0];
    for (uint32_t k = 1; k < FM_STREAMS; k++)
        if (c->stream_clock - c->stream[k].used > c->stream_clock - s->used)
            s = &c->stream[k];
    return s;
}

/* Inside streams_lock. */
static bool is_advised(struct fm_core *c, uint64_t page, enum fm_advice advice)
{
    struct fm_range piece;
    return c->advised[advice].n > 0 && fm_ranges_next(&c->advised[advice], page, page + 1, &piece);
}

void fm_stream_advise(struct fm_core *c, uint64_t page, uint64_t end, enum fm_advice advice)
{
    fm_lock_take(&c->streams_lock);
    for (uint32_t k = 0; k < FM_ADVICES; k++)
        fm_ranges_cut(c, &c->advised[k], page, end);
    if (advice != FM_ADVICE_NORMAL)
        fm_ranges_add(c, &c->advised[advice], page, end);
    fm_lock_drop(&c->streams_lock);
}

uint32_t fm_stream_plan(struct fm_core *c, uint64_t page)
{
    uint32_t window = 1;
    fm_lock_take(&c->streams_lock);
    if (is_advised(c, page, FM_ADVICE_RANDOM)) {
        fm_lock_drop(&c->streams_lock);
        return 1;
    }
    bool sequential = is_advised(c, page, FM_ADVICE_SEQUENTIAL);
    c->stream_clock++;
    struct fm_stream *s = NULL;
    for (uint32_t k = 0; k < FM_STREAMS && s == NULL; k++)
        if (c->stream[k].next == page)
            s = &c->stream[k];
    if (s != NULL) {
        window = s->window < WINDOW_FIRST ? WINDOW_FIRST : s->window * 2;
    } else {
        s = oldest(c);
    }
    if (sequential || window > FM_WINDOW_MAX)
        window = FM_WINDOW_MAX;
    *s = (struct fm_stream){ .next = page + window, .window = window, .used = c->stream_clock };
    fm_lock_drop(&c->streams_lock);
    fm_assert(window >= 1 && window <= FM_WINDOW_MAX);
    return window;
}

void fm_stream_took(struct fm_core *c, uint64_t page, uint32_t planned, uint32_t got)
{
    fm_assert(got >= 1);
    if (got >= planned)
        return;
    fm_lock_take(&c->streams_lock);
    for (uint32_t k = 0; k < FM_STREAMS; k++)
        if (c->stream[k].next == page + planned)
            c->stream[k].next = page + got;
    fm_lock_drop(&c->streams_lock);
}

uint32_t fm_stream_ahead(struct fm_core *c, uint64_t page, uint64_t *from)
{
    uint32_t n = 0;
    fm_lock_take(&c->streams_lock);
    for (uint32_t k = 0; k < FM_STREAMS && n == 0; k++) {
        struct fm_stream *s = &c->stream[k];
        uint64_t reach = page + 1 + (uint64_t)WINDOWS_AHEAD * s->window;
        if (s->window < WINDOW_FIRST || page >= s->next || s->next >= reach)
            continue;
        n = s->window * 2 > FM_WINDOW_MAX ? FM_WINDOW_MAX : s->window * 2;
        *from = s->next;
        s->window = n;
        s->next += n;
        s->used = ++c->stream_clock;
    }
    fm_lock_drop(&c->streams_lock);
    return n;
}
