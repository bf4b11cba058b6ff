/* pool_ledger.h - who uses which slot of the job's pool.
 *
 * The pool is cut into slots of a page and extents of 512 slots (2 MiB).  Forked
 * children share slots, so each slot has a reference count, and each process a
 * bitmap of the slots that it counts on: when a process dies without a word, the
 * supervisor walks its bitmap and gives back what it held.  Extents lie in spans: one for
 * each server that the pool is spread over, or one of all.  All of it lies in a
 * sparse memfd that every process of the job maps; everything is changed with
 * atomic instructions, and the order of the steps is such that a death between
 * any two of them leaks one slot at worst, and never frees one that is in use.
 */
#ifndef FM_POOL_LEDGER_H
#define FM_POOL_LEDGER_H

#include <stdbool.h>
#include <stdint.h>

#define FM_EXTENT_SLOTS 512u
#define FM_SLOT_NONE 0xffffffffu
#define FM_EXTENT_NONE 0xffffffffu
#define FM_SPANS_MAX 32u

/* cdef begins */
/* Bytes of the memfd for a pool of pool_bytes (a multiple of 2 MiB). */
uint64_t fm_pool_ledger_bytes(uint64_t pool_bytes);
/* Write the head of a new, all-zero ledger, of one span.  0, or -1 when pool_bytes is not
 * a multiple of 2 MiB or too large for 32-bit slot numbers. */
int fm_pool_ledger_init(void *base, uint64_t pool_bytes);
/* ... of no span yet: pool_bytes is as large as it can become. */
int fm_pool_ledger_init_empty(void *base, uint64_t pool_bytes);
/* So many extents more, as a span of their own: from now on they are taken.  The span's number, which no other ever
 * has, or -1: there is no room.  By one thread of the job only, as is the next. */
int fm_pool_ledger_add(void *base, uint32_t extents);
/* The most that can be added now. */
uint32_t fm_pool_ledger_room(void *base);
/* Nothing is taken of a span any more.  0, or -1: something of it is in use, and all stays as it was. */
int fm_pool_ledger_close(void *base, uint32_t span);
/* Extents of a span, and about how many of them are free. */
uint32_t fm_pool_ledger_span_extents(void *base, uint32_t span);
uint32_t fm_pool_ledger_span_free(void *base, uint32_t span);
/* Bytes of all spans. */
uint64_t fm_pool_ledger_capacity(void *base);
/* Give back all that the process in a ledger slot held.  With trim_later extents that are empty
 * now wait for fm_pool_ledger_trim_reaped(); without it their space is just not returned. */
void fm_pool_ledger_reap(void *base, uint32_t proc, int trim_later);
/* Return those extents to the system: pool_fd is the pool's memfd or file.  Takes its time;
 * by one thread of the job only. */
void fm_pool_ledger_trim_reaped(void *base, int pool_fd);
/* Slots in use, and the most there ever were. */
uint64_t fm_pool_ledger_used(void *base);
uint64_t fm_pool_ledger_peak(void *base);
/* Slots in use of one span; those that forked children share may count more than once. */
uint64_t fm_pool_ledger_span_used(void *base, uint32_t span);
/* cdef ends */

/* Extents that come from one place. */
struct fm_pool_span {
    uint32_t first, extents; /* none: it was closed, and its place may be another's */
    uint32_t room;           /* of its place */
    uint32_t taken;          /* about how many are not free: what decides where the next extent comes from */
    uint32_t next;           /* where the search for a free one begins, from first on */
};

/* A view of the ledger: pointers into the mapped memfd. */
struct fm_pool_ledger {
    void *base;
    uint32_t extents;
    uint64_t shut;           /* a bit for each span that this process can't use: its backend's, which grants nothing there */
    uint32_t *extent_refs;   /* slots in use + 1 when a block fills it; FREEING until it is trimmed */
    uint32_t *extent_owner;  /* process + 1 whose block fills it, or that will trim it, or 0 */
    uint16_t *slot_refs;
    uint64_t *checksum;      /* a word per slot for the checksum filter */
    uint64_t *bitmap;        /* this process's */
    uint32_t proc;
    /* Returns an empty extent to where it came from; may be NULL.  False: it will be done by fm_pool_ledger_trim(), and
     * nobody gets the extent until then. */
    bool (*trim)(void *ctx, uint32_t extent);
    void *trim_ctx;
};

void fm_pool_ledger_view(struct fm_pool_ledger *l, void *base, uint32_t proc);
/* An empty extent for one block of this process, of the span that has the most free, near hint if that lies there;
 * FM_EXTENT_NONE: the pool is full. */
uint32_t fm_extent_take(struct fm_pool_ledger *l, uint32_t hint);
void fm_extent_release(struct fm_pool_ledger *l, uint32_t extent);
bool fm_extent_idle(struct fm_pool_ledger *l, uint32_t extent);    /* the block that fills it is all that keeps it */
/* Take an unused slot of an extent that this process fills; false: in use (by another process). */
bool fm_slot_take(struct fm_pool_ledger *l, uint32_t slot);
void fm_slot_release(struct fm_pool_ledger *l, uint32_t slot);
bool fm_slot_shared(struct fm_pool_ledger *l, uint32_t slot);
bool fm_slot_shut(const struct fm_pool_ledger *l, uint32_t slot);    /* its span is: what is there can't be had now, or ever */
/* The span of an extent that is in use. */
uint32_t fm_pool_span_of(const struct fm_pool_ledger *l, uint32_t extent);
const struct fm_pool_span *fm_pool_span(const struct fm_pool_ledger *l, uint32_t span);
uint32_t fm_pool_spans(const struct fm_pool_ledger *l);              /* how many there are */
void fm_pool_span_shut(struct fm_pool_ledger *l, uint32_t span, bool shut);
/* Punch what this process's trim() has put off in a span, neighbours together. */
void fm_pool_ledger_trim(struct fm_pool_ledger *l, uint32_t span, void (*punch)(void *ctx, uint32_t extent, uint32_t n),
                         void *ctx);
/* The child of a fork counts on every slot that this process counts on. */
void fm_pool_ledger_fork(struct fm_pool_ledger *l, uint32_t child);

#endif
