/* checksum.c - a filter that notices when the backend below returns other bytes than it was given.
 *
 * The core checks each page by its own hash anyway; this one sits lower, and tells a bad pool
 * from a bad core.  Sums are kept in the pool ledger, which the job's processes share.
 */
#include <errno.h>
#include <stddef.h>

#include "backend.h"
#include "engine/hash.h"

static uint64_t sum(const struct fm_backend *b, const struct fm_io *io, uint32_t k)
{
    uint64_t h = fm_hash64(fm_io_bytes(b, io) + (uint64_t)k * FM_PAGE_BYTES);
    return h != 0 ? h : 1;               /* 0: never stored */
}

static void checksum_submit(struct fm_backend *b, struct fm_io *io)
{
    for (uint32_t k = 0; io->kind == FM_IO_STORE && k < io->n; k++)
        b->chain->ledger->checksum[io->slot + k] = sum(b, io, k);
    b->next->submit(b->next, io);
}

static void checksum_ended(struct fm_backend *b, struct fm_io *io)
{
    for (uint32_t k = 0; io->kind == FM_IO_FETCH && io->status == 0 && k < io->n; k++)
        if (b->chain->ledger->checksum[io->slot + k] != sum(b, io, k))
            io->status = EILSEQ;
    fm_backend_ended_up(b, io);
}

const struct fm_backend fm_filter_checksum = {
    .size = sizeof(struct fm_backend),
    .version = FM_BACKEND_VERSION,
    .name = "checksum",
    .submit = checksum_submit,
    .ended = checksum_ended,
};
