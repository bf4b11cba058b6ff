/* error.c - a filter that makes things go wrong: failed fetches, failed stores, bytes that were changed on the way.
 *
 * params: the three chances in parts per million, and a seed, so that a run can be repeated.  With a path it is armed
 * only while that file exists, so that a test decides when the trouble begins and ends.
 */
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>

#include "backend.h"
#include "engine/sys.h"

enum { FETCH_PPM = 0, STORE_PPM = 1, CORRUPT_PPM = 2, SEED = 3 };
#define STATE 0

static bool armed(const struct fm_backend *b)
{
    return b->config->path[0] == 0 || fm_sys(SYS_faccessat, AT_FDCWD, b->config->path, 0) == 0;
}

/* splitmix64: S. Vigna's finalizer over a counter, so concurrent callers only need an atomic add. */
static uint64_t draw(struct fm_backend *b)
{
    uint64_t z = __atomic_add_fetch(&b->word[STATE], 0x9e3779b97f4a7c15ull, __ATOMIC_RELAXED);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

static bool strikes(struct fm_backend *b, int which)
{
    uint64_t ppm = b->config->params[which];
    return ppm > 0 && draw(b) % 1000000 < ppm && armed(b);
}

static bool error_open(struct fm_backend *b)
{
    b->word[STATE] = b->config->params[SEED];
    return true;
}

static void error_submit(struct fm_backend *b, struct fm_io *io)
{
    if (!strikes(b, io->kind == FM_IO_FETCH ? FETCH_PPM : STORE_PPM)) {
        b->next->submit(b->next, io);
        return;
    }
    io->status = EIO;
    b->ended(b, io);
}

static void error_ended(struct fm_backend *b, struct fm_io *io)
{
    if (io->kind == FM_IO_FETCH && io->status == 0 && strikes(b, CORRUPT_PPM)) {
        uint64_t at = draw(b) % ((uint64_t)io->n * FM_PAGE_BYTES);
        fm_io_bytes(b, io)[at] ^= (char)(1u << (draw(b) % 8));
    }
    fm_backend_ended_up(b, io);
}

const struct fm_backend fm_filter_error = {
    .size = sizeof(struct fm_backend),
    .version = FM_BACKEND_VERSION,
    .name = "error",
    .open = error_open,
    .submit = error_submit,
    .ended = error_ended,
};
