/* backend.h - where bytes live: one struct for backends and for the filters around them.
 *
 * submit() takes a transfer and never waits for it; however it ends, on whatever thread, ended() is called on
 * the same backend with io->status set.  A filter passes both on: submit() downwards to next,
 * ended() upwards to up.  Every callback is mandatory inside; fm_backend_defaults() fills in
 * those that a backend has no opinion on.  Nothing here may call libc's heap or touch managed memory.
 */
#ifndef FM_BACKEND_H
#define FM_BACKEND_H

#include <stdbool.h>
#include <stdint.h>

#include "control.h"
#include "core/core.h"

#define FM_BACKEND_VERSION 1u
#define FM_BACKEND_FRAMES_MAX 512u        /* so many frames there are at most, and so many transfers at once */

/* What all of one process's chain share. */
struct fm_chain {
    char *frames;                     /* address of frame 0 */
    struct fm_pool_ledger *ledger;
    struct fm_counters *count;
    char *pool;                       /* mem: the mapped pool */
    int pool_fd;                      /* file: the open file, in the engine's descriptor table */
    uint32_t file_io;                 /* enum fm_file_io */
    struct fm_pool_server *servers;        /* by number */
    bool nbd_is_tended;               /* nbd: its tender runs */
    bool rdma_is_tended;              /* so does rdma's */
    uint64_t pool_bytes;
    const char *full;                 /* what to say when no space could be granted; NULL: there is space, or was no try */
    uint64_t full_errno;
    bool (*thread)(void (*run)(void *), void *arg);   /* start a thread of the engine's */
    void (*done)(struct fm_io *io);   /* the top of the chain */
    void (*say)(int level, const char *text, uint64_t number);
    void (*gate_in)(void);            /* a thread of the chain's own is about to pass a transfer on: waits while a fork goes on */
    void (*gate_out)(void);
};

struct fm_backend {
    uint32_t size;                    /* sizeof(struct fm_backend) */
    uint32_t version;                 /* FM_BACKEND_VERSION */
    const char *name;
    bool (*open)(struct fm_backend *b);
    void (*submit)(struct fm_backend *b, struct fm_io *io);
    void (*ended)(struct fm_backend *b, struct fm_io *io);
    bool (*grant)(struct fm_backend *b, uint32_t extent);   /* space for an extent; may wait.  False: there is none */
    bool (*trim)(struct fm_backend *b, uint32_t extent);    /* give it back; never waits: see pool_ledger.h */
    struct fm_backend *next;          /* towards the bytes; NULL at the backend */
    struct fm_backend *up;            /* towards the core; NULL at the top */
    struct fm_chain *chain;
    const struct fm_filter_config *config;
    uint32_t number;                  /* of the server that it speaks to, and of the span of extents that lies there */
    uint64_t word[8];                 /* state of its own */
    struct fm_io *head, *tail;        /* transfers in hand */
    fm_lock lock;
};

/* Builds the chain that the control segment describes, outermost filter first.  NULL: one of them can't be opened. */
struct fm_backend *fm_chain_open(struct fm_chain *chain, const struct fm_control *control);

/* Fills in what a backend has no opinion on. */
void fm_backend_defaults(struct fm_backend *b);

/* The default of ended(), for filters that have looked at the transfer and pass it on. */
void fm_backend_ended_up(struct fm_backend *b, struct fm_io *io);

/* file.c: is this one of the backend's own mappings? */
bool fm_file_mapped(uint64_t start);

extern const struct fm_backend fm_backend_mem, fm_backend_file, fm_backend_servers, fm_backend_nbd, fm_backend_rdma;
extern const struct fm_backend fm_filter_checksum, fm_filter_stats, fm_filter_delay, fm_filter_error;

static inline char *fm_io_bytes(const struct fm_backend *b, const struct fm_io *io)
{
    return b->chain->frames + (uint64_t)io->frame * FM_PAGE_BYTES;
}

#endif
