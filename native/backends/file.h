/* file.h - what file.c shares with its two ways to make a transfer: file_uring.c and file_threads.c. */
#ifndef FM_FILE_H
#define FM_FILE_H

#include "backend.h"

/* Transfers that wait for somebody to begin them: fetches first, because a thread of the program waits for each. */
struct fm_file {
    struct fm_backend *b;
    int fd;
    uint32_t way;                     /* file.c's: how transfers are made, once that is known */
    fm_lock lock;                     /* of the queues */
    struct fm_io *head[2], *tail[2];
    uint32_t bell, sleepers;          /* threads: sleep on bell */
    uint32_t trim_bell;
    uint64_t full_until_ns;
    bool told_short;
    uint32_t done_bytes[FM_FRAMES_MAX];   /* of the transfer that begins at this frame */
};

extern struct fm_file fm_file;

/* What is left of a transfer. */
struct fm_file_rest {
    void *memory;
    uint32_t bytes;
    uint64_t at;
};

/* The next transfer, or NULL. */
struct fm_io *fm_file_take(void);
bool fm_file_waits(void);
struct fm_file_rest fm_file_rest(const struct fm_io *io);
/* What the system call on the rest gave.  True: the transfer has ended, its status is set. */
bool fm_file_went(struct fm_io *io, long got);
/* Tell whoever asked for it.  The transfer is not ours from then on. */
void fm_file_ended(struct fm_io *io);

/* file_uring.c: all on one thread, except for fm_uring_ring() */
bool fm_uring_open(void);             /* false: io_uring can't be had here */
_Noreturn void fm_uring_run(void);
void fm_uring_ring(void);             /* something was queued */

/* file_threads.c */
void fm_file_threads_start(void);     /* those beside the calling one */
_Noreturn void fm_file_threads_run(void);
void fm_file_threads_ring(void);

#endif
