/* lease_table.h - what `farmem serve` has lent: the one layout that the control plane (Python, through cffi) and
 * the data plane (the nbdkit plugin) share.
 *
 * A lease is a range of the pool's memory (a sparse memfd), named by its token.  The control plane alone grants and
 * ends leases; a door (an nbdkit process) looks a token up when a client connects, and from then on asks before every
 * access whether that lease still lives.  Whoever is inside when a lease ends is counted, so that the memory is
 * given to nobody else before the last access is over.
 *
 * The table is a memfd; what several threads write is changed with atomic instructions only.  This header must not
 * be changed without raising FM_LEASE_TABLE_VERSION.
 */
#ifndef FM_LEASE_TABLE_H
#define FM_LEASE_TABLE_H

#include <stdbool.h>
#include <stdint.h>

/* cdef begins */
#define FM_LEASE_TABLE_MAGIC 0x7361656c6d66
#define FM_LEASE_TABLE_VERSION 2
#define FM_LEASES_MAX 4096
#define FM_LEASE_DOORS_MAX 4
#define FM_LEASE_TOKEN_BYTES 64           /* hex digits, without a NUL */
#define FM_LEASE_NONE 0xffffffff

enum fm_lease_flags {
    FM_LEASE_HUGE_PAGES = 1,              /* the memory can only be written through a mapping */
};

/* Named defects: each takes one fix out, so that a test can show that it is noticed. */
enum fm_lease_defect {
    FM_LEASE_DEFECT_KEEP_BYTES = 1,       /* memory is lent again as it came back */
    FM_LEASE_DEFECT_NO_GENERATION = 2,    /* a connection goes on when its lease has ended */
    FM_LEASE_DEFECT_NO_DRAIN = 4,         /* memory is lent again while somebody is inside */
    FM_LEASE_DEFECT_KEEP_REGISTRATION = 8,   /* memory is lent again while a device may still reach it */
    FM_LEASE_DEFECT_PUNCH_PINNED = 16,    /* a hole is made where a device has the pages */
};

struct fm_lease_counters {
    uint64_t reads;
    uint64_t writes;
    uint64_t trims;                       /* TRIM and WRITE_ZEROES */
    uint64_t read_bytes;
    uint64_t written_bytes;
    uint64_t trimmed_bytes;
    uint64_t errors;                      /* requests that the memory refused */
};

struct fm_lease {
    uint64_t generation;                  /* odd: lives; raised when it ends, and when the place is given out again */
    uint64_t offset;                      /* of the range, in the memory */
    uint64_t bytes;
    uint64_t token[FM_LEASE_TOKEN_BYTES / 8];
    uint64_t pinned;                      /* 1: a device has its pages, so they must stay where they are in the memory */
    uint64_t in_flight[FM_LEASE_DOORS_MAX];  /* accesses under way, by door: a door that dies is struck out alone */
    struct fm_lease_counters counters;
};

struct fm_lease_door {
    uint64_t pid;                         /* of the nbdkit that serves it; 0: not yet */
    uint64_t connections;                 /* open now */
    uint64_t refused;                     /* export names that no lease has */
};

struct fm_lease_table {
    uint64_t magic;
    uint64_t version;
    uint64_t bytes;                       /* of this struct */
    uint64_t flags;
    uint64_t defects;
    struct fm_lease_door doors[FM_LEASE_DOORS_MAX];
    struct fm_lease leases[FM_LEASES_MAX];
};

/* The control plane's.  All of them are called by one thread of one process. */
void fm_lease_table_init(struct fm_lease_table *t, uint64_t flags, uint64_t defects);
/* Lend a range under a token; the place in the table, or FM_LEASE_NONE: the table is full. */
uint32_t fm_lease_grant(struct fm_lease_table *t, const char *token, uint64_t offset, uint64_t bytes);
/* From now on nobody enters. */
void fm_lease_end(struct fm_lease_table *t, uint32_t place);
/* From now on no door takes pages away.  One that was inside before may still do it: wait until none is. */
void fm_lease_pin(struct fm_lease_table *t, uint32_t place);
/* How many are still inside.  Once none was seen there after the end, the place may be freed: who comes later (and counts
 * for a moment) touches nothing. */
uint64_t fm_lease_in_flight(const struct fm_lease_table *t, uint32_t place);
void fm_lease_free(struct fm_lease_table *t, uint32_t place);
/* A door's process has gone, and every access of its with it. */
void fm_lease_door_gone(struct fm_lease_table *t, uint32_t door);
/* cdef ends */

/* A door's view of a lease: what a connection keeps. */
struct fm_lease_view {
    uint32_t place;
    uint32_t door;
    uint64_t generation;
    uint64_t offset;
    uint64_t bytes;
};

bool fm_lease_table_fits(const struct fm_lease_table *t, uint64_t bytes);
/* Which living lease has this token: the time it takes tells nothing of the tokens. */
bool fm_lease_find(struct fm_lease_table *t, uint32_t door, const char *name, struct fm_lease_view *view);
/* Around every access to the memory; false: the lease has ended, and nothing may be touched. */
bool fm_lease_enter(struct fm_lease_table *t, const struct fm_lease_view *view);
void fm_lease_leave(struct fm_lease_table *t, const struct fm_lease_view *view);
/* Whether pages must stay; asked inside. */
bool fm_lease_is_pinned(const struct fm_lease_table *t, const struct fm_lease_view *view);

#endif
