/* region.h - what the Python API asks of the engine: the one table of functions that libfarmem.so exports.
 *
 * Python finds `fm_region_api` in the library that `farmem run` has preloaded, else it loads one itself.  Calls are made
 * on the program's threads, which only post them and sleep: all the work is the engine's threads'.
 */
#ifndef FM_REGION_H
#define FM_REGION_H

#include <stdint.h>

#include "control.h"

/* cdef begins */
/* What must be left of a budget beside what is pinned, or brought at once. */
#define FM_REGION_HEAD_ROOM_BYTES 4194304

enum fm_region_kind {
    FM_REGION_ADD = 1,        /* manage this mapping from now on */
    FM_REGION_BUDGET,         /* value: the job's budget from now on; answered when it counts */
    FM_REGION_LOOK,           /* only fill in the last fields below */
    FM_REGION_WILLNEED,       /* bring it here */
    FM_REGION_EVICT,          /* send it away, as far as it is not pinned */
    FM_REGION_PIN,            /* bring it here, and never evict it */
    FM_REGION_UNPIN,
    FM_REGION_ADVISE,         /* value: enum fm_region_advice */
    FM_REGION_TALLY           /* count its pages; they are added to the fields below */
};

enum fm_region_advice { FM_REGION_NORMAL = 0, FM_REGION_SEQUENTIAL = 1, FM_REGION_RANDOM = 2 };

enum fm_region_answer {
    FM_REGION_DONE = 0,
    FM_REGION_MORE,           /* not done yet: call again with the same fields, and what was changed in them */
    FM_REGION_NO_ROOM,        /* the budget can't hold that much at once */
    FM_REGION_LOST,           /* the page at `at` can't be had from the pool any more */
    FM_REGION_FULL,           /* the pool is full */
    FM_REGION_STORE_FAILED,   /* the pool did not take pages: they stay */
    FM_REGION_NO_MEMORY,      /* none is left for the engine's own records */
    FM_REGION_NOT_MANAGED,    /* nothing is managed there */
    FM_REGION_NO_ENGINE       /* there is none in this process, or it can't have what it needs */
};

struct fm_region_call {
    uint32_t kind;            /* enum fm_region_kind */
    uint32_t answer;          /* enum fm_region_answer */
    uint64_t start, bytes;    /* whole pages */
    uint64_t value;
    uint64_t at;              /* 0 at first: the address that the call has come to; LOST: of that page */
    uint64_t mark;            /* 0 at first: the engine's own, what it found at the beginning */
    /* TALLY: pages of the range, by state.  moving: on their way out or in */
    uint64_t resident, moving, remote, fresh, lost, pinned;
    uint64_t first_lost;      /* address, 0: none */
    /* always: the process's managed memory, frames included, when the call was answered */
    uint64_t local_bytes, limit_bytes, remote_bytes, pinned_bytes;
};

enum fm_region_mode {
    FM_REGION_MODE_NONE = 0,  /* no engine, or its job could not be joined */
    FM_REGION_MODE_REGIONS,   /* only regions are managed */
    FM_REGION_MODE_PROGRAM    /* `farmem run`: all of the program is */
};

struct fm_region_api {
    uint32_t version;                             /* FM_CONTROL_VERSION */
    /* Before anything else; joins the job ("NAME:TOKEN"; NULL: only if that was done).  enum fm_region_mode */
    uint32_t (*start)(const char *job, const char *defects);
    struct fm_control *(*control)(void);
    uint32_t (*slot)(void);
    void (*call)(struct fm_region_call *call);
};
/* cdef ends */

#endif
