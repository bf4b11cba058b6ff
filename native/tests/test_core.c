/* test_core.c - the small parts of the core by themselves: ranges, the queue, frames, streams.
 *
 * What they do together is the simulator's business (sim.c); here a wrong edge shows at its own place, and under
 * ASan and UBSan.
 */
#include <string.h>

#include "check.h"
#include "core/core.h"

static struct fm_core *core;
static struct fm_counters counters;

static void *op_memory(void *ctx, void *old, uint64_t old_bytes, uint64_t bytes)
{
    (void)ctx;
    (void)old_bytes;
    free(old);
    return bytes > 0 ? calloc(1, bytes) : NULL;
}

static const struct fm_ops ops = { .memory = op_memory };

static void fresh(uint32_t frames)
{
    if (core != NULL) {
        free(core->managed.at);
        for (uint32_t k = 0; k < FM_ADVICES; k++)
            free(core->advised[k].at);
        free(core->queue);
        free(core);
    }
    core = calloc(1, sizeof *core);
    CHECK(core != NULL);
    core->ops = &ops;
    core->count = &counters;
    fm_core_init(core, frames);
}

/* ---- ranges */

static void is_range(uint32_t k, uint64_t page, uint64_t end)
{
    CHECK(k < core->managed.n && core->managed.at[k].page == page && core->managed.at[k].end == end);
}

static void ranges_merge_and_are_cut(void)
{
    struct fm_ranges *r;
    fresh(8);
    r = &core->managed;
    fm_ranges_add(core, r, 10, 20);
    fm_ranges_add(core, r, 30, 40);
    CHECK(r->n == 2);
    fm_ranges_add(core, r, 20, 25);           /* touches the first */
    is_range(0, 10, 25);
    fm_ranges_add(core, r, 22, 30);           /* closes the gap */
    CHECK(r->n == 1);
    is_range(0, 10, 40);
    fm_ranges_cut(core, r, 15, 20);
    CHECK(r->n == 2);
    is_range(0, 10, 15);
    is_range(1, 20, 40);
    fm_ranges_cut(core, r, 0, 12);
    is_range(0, 12, 15);
    fm_ranges_cut(core, r, 14, 21);
    is_range(0, 12, 14);
    is_range(1, 21, 40);
    fm_ranges_cut(core, r, 14, 21);           /* nothing is there */
    CHECK(r->n == 2);
    fm_ranges_cut(core, r, 0, 100);
    CHECK(r->n == 0);
}

static void ranges_give_pieces(void)
{
    struct fm_range piece;
    fresh(8);
    fm_ranges_add(core, &core->managed, 10, 20);
    fm_ranges_add(core, &core->managed, 30, 40);
    CHECK(fm_ranges_next(&core->managed, 0, 100, &piece) && piece.page == 10 && piece.end == 20);
    CHECK(fm_ranges_next(&core->managed, 15, 17, &piece) && piece.page == 15 && piece.end == 17);
    CHECK(fm_ranges_next(&core->managed, 20, 35, &piece) && piece.page == 30 && piece.end == 35);
    CHECK(!fm_ranges_next(&core->managed, 20, 30, &piece));
    CHECK(!fm_ranges_next(&core->managed, 40, 50, &piece));
}

static void ranges_grow(void)
{
    fresh(8);
    for (uint64_t k = 1000; k > 0; k--)
        fm_ranges_add(core, &core->managed, k * 10, k * 10 + 5);
    CHECK(core->managed.n == 1000);
    for (uint32_t k = 0; k < 1000; k++)
        is_range(k, (k + 1) * 10ull, (k + 1) * 10ull + 5);
}

/* ---- the queue */

static void queue_keeps_order_and_splits_runs(void)
{
    uint64_t page;
    uint32_t n;
    fresh(8);
    CHECK(!fm_queue_pop(core, &page, &n));
    fm_queue_push(core, 1000, 130);
    fm_queue_push(core, 5, 1);
    CHECK(fm_queue_pop(core, &page, &n) && page == 1000 && n == 64);
    fm_queue_unpop(core, 1010, 54);
    CHECK(fm_queue_pop(core, &page, &n) && page == 1010 && n == 54);
    CHECK(fm_queue_pop(core, &page, &n) && page == 1064 && n == 64);
    CHECK(fm_queue_pop(core, &page, &n) && page == 1128 && n == 2);
    CHECK(fm_queue_pop(core, &page, &n) && page == 5 && n == 1);
    CHECK(!fm_queue_pop(core, &page, &n));
}

static void queue_grows_while_it_turns(void)
{
    uint64_t page, out = 0;
    uint32_t n;
    fresh(8);
    for (uint64_t k = 0; k < 20000; k++) {
        fm_queue_push(core, k, 1);
        if (k % 3 == 0)
            CHECK(fm_queue_pop(core, &page, &n) && page == out++ && n == 1);
    }
    while (fm_queue_pop(core, &page, &n))
        CHECK(page == out++ && n == 1);
    CHECK(out == 20000);
}

/* ---- frames */

static void frames_come_in_runs(void)
{
    uint32_t first, other;
    fresh(100);
    CHECK(fm_frames_take(core, FM_FRAME_FREE, 1, &first) == 0);
    CHECK(fm_frames_take(core, FM_FRAME_EMPTY, 40, &first) == 40 && first == 0);
    CHECK(fm_frames_take(core, FM_FRAME_EMPTY, 40, &other) == 36 && other == 64);   /* the longest within a word */
    fm_frames_put(core, first, 40, FM_FRAME_FREE);
    CHECK(core->kind_n[FM_FRAME_FREE] == 40 && core->kind_n[FM_FRAME_BUSY] == 36 && core->kind_n[FM_FRAME_EMPTY] == 24);
    CHECK(fm_frames_take(core, FM_FRAME_FREE, 8, &first) == 8 && first == 0);
    fm_core_share_frames(core);
    CHECK(core->kind_n[FM_FRAME_FREE] == 0 && core->kind_n[FM_FRAME_DEAD] == 32);
    fm_frames_put(core, first, 8, FM_FRAME_FREE);
    CHECK(core->kind_n[FM_FRAME_FREE] == 0 && core->kind_n[FM_FRAME_DEAD] == 40);
}

static void the_oldest_staged_frame_comes_first(void)
{
    uint32_t first;
    fresh(16);
    CHECK(fm_frames_take(core, FM_FRAME_EMPTY, 16, &first) == 16);
    for (uint32_t f = 0; f < 16; f++) {
        core->frame[f].page = 100 + f;
        fm_frame_stage(core, f);
    }
    CHECK(fm_frame_unstage(core, 1));
    CHECK(!fm_frame_unstage(core, 1));
    CHECK(fm_frame_oldest(core) == 0);
    CHECK(fm_frame_oldest(core) == 2);        /* 1 is not staged any more */
    for (uint32_t turn = 0; turn < 3 * FM_FRAMES_MAX; turn++) {
        fm_frame_stage(core, 1);              /* old entries pile up in the ring, and are passed over */
        CHECK(fm_frame_unstage(core, 1));
    }
    CHECK(fm_frame_oldest(core) == 3);
    fm_frame_stage(core, 1);
    for (uint32_t f = 4; f < 16; f++)
        CHECK(fm_frame_oldest(core) == f);
    CHECK(fm_frame_oldest(core) == 1);
    CHECK(fm_frame_oldest(core) == FM_FRAME_NONE);
}

/* ---- streams */

static void a_stream_doubles_its_window(void)
{
    uint64_t from, page = 1000;
    fresh(8);
    CHECK(fm_stream_plan(core, page) == 1);
    page += 1;
    for (uint32_t want = 4; want <= FM_WINDOW_MAX; want *= 2) {
        CHECK(fm_stream_plan(core, page) == want);
        page += want;
    }
    CHECK(fm_stream_plan(core, page) == FM_WINDOW_MAX);
    fm_stream_took(core, page, FM_WINDOW_MAX, 5);
    page += 5;
    CHECK(fm_stream_ahead(core, page - 1, &from) == FM_WINDOW_MAX && from == page);
    CHECK(fm_stream_ahead(core, page - 1, &from) == FM_WINDOW_MAX && from == page + FM_WINDOW_MAX);
    CHECK(fm_stream_ahead(core, page - 1, &from) == 0);      /* two windows ahead is enough */
    CHECK(fm_stream_ahead(core, 77, &from) == 0);
}

static void scattered_faults_make_no_stream(void)
{
    fresh(8);
    for (uint64_t k = 0; k < 100; k++)
        CHECK(fm_stream_plan(core, 5000 + k * 7919 % 4000) == 1);
}

static void advice_changes_the_windows(void)
{
    uint64_t page = 1000;
    fresh(8);
    fm_stream_advise(core, 1000, 2000, FM_ADVICE_RANDOM);
    for (uint32_t k = 0; k < 10; k++)
        CHECK(fm_stream_plan(core, page++) == 1);
    fm_stream_advise(core, 1500, 3000, FM_ADVICE_SEQUENTIAL);      /* the last word counts */
    CHECK(fm_stream_plan(core, 1499) == 1);
    CHECK(fm_stream_plan(core, 1700) == FM_WINDOW_MAX);
    CHECK(fm_stream_plan(core, 2999) == FM_WINDOW_MAX);
    CHECK(fm_stream_plan(core, 3500) == 1);
    CHECK(fm_stream_plan(core, 3501) == 4);
    fm_stream_advise(core, 0, 5000, FM_ADVICE_NORMAL);
    CHECK(core->advised[FM_ADVICE_RANDOM].n == 0 && core->advised[FM_ADVICE_SEQUENTIAL].n == 0);
    CHECK(fm_stream_plan(core, 1200) == 1);
    CHECK(fm_stream_plan(core, 1201) == 4);
}

int main(void)
{
    ranges_merge_and_are_cut();
    ranges_give_pieces();
    ranges_grow();
    queue_keeps_order_and_splits_runs();
    queue_grows_while_it_turns();
    frames_come_in_runs();
    the_oldest_staged_frame_comes_first();
    a_stream_doubles_its_window();
    scattered_faults_make_no_stream();
    advice_changes_the_windows();
    fresh(8);
    free(core);
    return 0;
}
