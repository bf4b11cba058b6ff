/* mem.c - the embedded default: the bytes live in a memfd of this host, mapped by every process of the job.
 *
 * For trying and testing: pages are copied as they would be to a far node, but stay here.  The
 * copy is done at once on the calling thread; there is nothing to wait for.
 */
#include <stddef.h>
#include <sys/mman.h>

#include "backend.h"
#include "engine/sys.h"
#include "fm_assert.h"

static void mem_submit(struct fm_backend *b, struct fm_io *io)
{
    uint64_t at = (uint64_t)io->slot * FM_PAGE_BYTES, bytes = (uint64_t)io->n * FM_PAGE_BYTES;
    fm_assert(at + bytes <= b->chain->pool_bytes);
    if (io->kind == FM_IO_FETCH)
        __builtin_memcpy(fm_io_bytes(b, io), b->chain->pool + at, bytes);
    else
        __builtin_memcpy(b->chain->pool + at, fm_io_bytes(b, io), bytes);
    io->status = 0;
    b->ended(b, io);
}

static bool mem_trim(struct fm_backend *b, uint32_t extent)
{
    uint64_t bytes = (uint64_t)FM_EXTENT_SLOTS * FM_PAGE_BYTES;
    /* Best effort: memory that stays allocated holds nothing that is read again. */
    (void)fm_sys(SYS_madvise, b->chain->pool + extent * bytes, bytes, MADV_REMOVE);
    return true;
}

const struct fm_backend fm_backend_mem = {
    .size = sizeof(struct fm_backend),
    .version = FM_BACKEND_VERSION,
    .name = "mem",
    .submit = mem_submit,
    .trim = mem_trim,
};
