/* engine.h - the engine: what ties the core to this process and this kernel.
 *
 * A guest in somebody's house.  Its threads are made by clone(), not by libc; they block every signal and have a
 * descriptor table of their own; they never call malloc, take no lock of libc's, and touch managed memory
 * only through the kernel.  There is one engine per process, `fm`, in memory of its own.
 *
 *   threads.c   raw threads, futexes, the engine's memory     wire.c    the job's socket
 *   uffd.c      the core's operations on the real kernel      adopt.c   which mappings are managed
 *   watch.c     the watcher: adoption, new mappings           evictor.c the evictor's thread
 *   budget.c    this process's memory and its share
 *   fork.c      fork: freeze, child                           say.c     messages
 *   tcbs.c      where threads' control blocks lie            region.c  the Python API's calls
 *   ../fronts/thread.c  the thread that reads the userfaultfd
 */
#ifndef FM_ENGINE_H
#define FM_ENGINE_H

#include <stdbool.h>
#include <stdint.h>

#include "backend.h"
#include "control.h"
#include "core/core.h"
#include "engine/sys.h"

#define FM_FRAMES 512u                 /* staging: 2 MiB, so that it stays in the processor's cache */
#define FM_FORK_UNMAPS 8u
#define FM_PARKED_MAX 1024u
#define FM_STACK_BYTES 65536u
#define FM_THREADS_FEW 24u
#define FM_THREADS_MAX (16u + 5u * FM_POOL_SERVERS_MAX)

/* Engine states, in order. */
enum fm_engine_state {
    FM_ENGINE_NONE = 0,      /* no job, or it could not be joined: the program runs as if we were not here */
    FM_ENGINE_WATCHING,
    FM_ENGINE_ADOPTED
};

/* What the evictor is asked for between two steps; it calls fm_fork_stand_still() when there is any. */
enum fm_freeze {
    FM_FREEZE_FORK = 1,      /* stand still for a fork */
    FM_FREEZE_KEEP = 2       /* threads ask for their control blocks to be kept (tcbs.c) */
};

struct fm_parked {
    uint64_t page;
    uint32_t bits;
    uint64_t since_ns;
};

struct fm_engine {
    /* set once, before any thread */
    char job_name[80];
    uint8_t token[FM_TOKEN_BYTES];
    uint64_t early_defects;            /* those that matter before the control segment is there */
    uint64_t tls_bytes;                /* static TLS of a libc thread */
    char exe[4096];

    uint32_t state;                    /* enum fm_engine_state */
    bool regions_only;                 /* no `farmem run`: what the program asks for is managed, and nothing else */
    uint32_t pid;
    uint32_t slot;
    int sock, statm, maps, pagemap, mem, tasks, rollup, uffd;    /* in the engine's descriptor table */
    struct fm_control *control;
    struct fm_proc *proc;
    void *ledger_base;
    char *pool;                        /* mem: mapped */
    int pool_fd;                       /* file: in the engine's descriptor table */
    uint32_t table_tid;                /* a thread with that table, by which a forked child finds the file */
    uint64_t features;                 /* of the userfaultfd */
    bool pagemap_scan;

    struct fm_core core;
    fm_world world;
    struct fm_chain chain;
    struct fm_backend *backend;
    char *frames;

    /* the engine's own memory: one reservation, handed out from the front */
    char *heap, *heap_next, *heap_ready, *heap_end;
    fm_lock heap_lock;

    /* faults that found no frame */
    fm_lock parked_lock;
    uint32_t parked_n;
    struct fm_parked parked[FM_PARKED_MAX];

    /* the evictor sleeps on bell; freeze: it is asked to stand still, frozen: it does */
    uint32_t bell, evictor_sleeps, freeze, frozen, thaw;     /* freeze: enum fm_freeze */
    /* while a fork copies our books the reader resolves nobody's faults but the forking thread's own */
    uint32_t hold, held, reader_waits, fork_tid;
    uint32_t fork_unmaps_n;            /* UNMAP events since the freeze (those that fit are in fork_unmaps) */
    struct fm_range fork_unmaps[FM_FORK_UNMAPS];
    uint64_t remaps;                   /* REMAP events applied */
    uint32_t io_busy;                  /* stores and fetches under way */
    uint32_t completing;               /* threads that are applying the end of one */
    uint64_t mm_events;                /* UNMAP and REMAP events applied */
    fm_lock own_events;                /* held while an event of our own making (a drop) is on its way */
    uint32_t looking;                  /* somebody wants a moment without such events */
    fm_lock fork_lock;                 /* adoption and fork exclude each other */
    uint32_t fork_slot;
    bool fork_failed;
    int fork_errno;
    uint64_t fork_signals;             /* the forking thread's mask */

    uint32_t child_ready;              /* in the child of a fork: 1 go on, 2 give up */
    fm_lock discards_lock;             /* ranges that were discarded, to be counted again when they have gone */
    uint32_t discards_n;
    struct fm_range discards[64];
    uint32_t threads;
    uint32_t shares_memory;            /* since a fork, with a parent or a child */
    bool keeper;
    bool prepared;                     /* the userfaultfd is open, and held by the supervisor too */
    bool gave_up;                      /* memory is short and can't be managed; said once */
};

extern struct fm_engine fm;

/* ../preload/shim.c */
bool fm_join(const char *job, const char *defects);       /* "NAME:TOKEN"; starts the watcher */

/* threads.c */
bool fm_thread_start(void (*run)(void *), void *arg);
void *fm_heap_take(uint64_t bytes);                        /* zeroed, page-aligned; NULL: none left */
void fm_heap_give(void *p, uint64_t bytes);
bool fm_heap_open(void);
bool fm_own_memory(uint64_t page);
bool fm_own_span(uint32_t k, uint64_t *start, uint64_t *end);   /* the k-th piece of our memory; false: there is none */
void fm_threads_reset(void);
void fm_keeper_start(void);

/* say.c */
void fm_say(int level, const char *text, uint64_t number);
struct fm_part {
    const char *text;
    uint64_t number;
};
void fm_say_parts(int level, const struct fm_part *part, uint32_t n);   /* texts and numbers in turn; the last text only */
_Noreturn void fm_end_program(void);
uint32_t fm_put_number(char *to, uint32_t at, uint64_t n, uint32_t base);   /* to has FM_MESSAGE_BYTES, or enough; the new end */

/* wire.c */
bool fm_wire_join(uint32_t slot);
bool fm_wire_refused(void);            /* fm_wire_join() failed because the supervisor said no, not for want of one */
bool fm_wire_hold(void);
bool fm_wire_pool_of_parent(void);     /* in the child of a fork without a supervisor */
bool fm_wire_alive(void);

/* uffd.c */
extern const struct fm_ops fm_engine_ops;
bool fm_uffd_open(void);
bool fm_uffd_register(uint64_t start, uint64_t end);
bool fm_uffd_changing(void);
void fm_uffd_quiet_begin(void);        /* no events of our own from now on, to look at the address space */
void fm_uffd_quiet_end(void);
enum fm_res fm_uffd_meaning(long err);

/* adopt.c */
bool fm_prepare(void);                 /* what takes long of an adoption, ahead of it; false: not now */
bool fm_adopt(void);                   /* false: it can't be done, and has been said */
bool fm_adopt_scan(void);              /* mappings that have appeared since; false: try again, the world is changing */
bool fm_adopt_forked(uint32_t slot);   /* in the child of a fork; false: it can't go on */
enum fm_res fm_adopt_range(uint64_t start, uint64_t end);   /* a region; FM_AGAIN: the world is changing */
void fm_managed_advise(int advice);
bool fm_mapped(uint64_t start, uint64_t end);   /* is any mapping there? */

/* tcbs.c */
void fm_keep_thread(uint64_t tcb);     /* the only one that runs on the program's threads */
void fm_tcb_note(uint64_t tcb);
bool fm_tcb_next(uint32_t *at, uint64_t *start, uint64_t *end);   /* iterates: addresses that must not be evicted */
void fm_tcbs_keep(void);
void fm_tcbs_answer(void);
void fm_tcbs_reset(void);

/* watch.c */
void fm_watch_main(void *arg);
void fm_watch_loop(void);
uint64_t fm_watch_look(void);
bool fm_watch_adopt(void);             /* now, short of memory or not; false: it can't be done */
bool fm_descriptors_open(void);

/* budget.c */
struct fm_usage {
    int64_t anonymous_pages;           /* here, as the kernel counts them for this process alone */
    int64_t local_pages;               /* ... less the part that other processes of the job count, at the last look */
    int64_t worst_pages;               /* ... less what they can be relied on to count still */
};
struct fm_usage fm_usage(void);
void fm_usage_reset(void);
void fm_tell_when_over(int64_t over, int64_t unmanaged);
/* This process's part of the job's budget: all that the others leave while all fits, by need when it does not.  mine:
 * what it needs, here and in the pool. */
uint64_t fm_budget_share(uint64_t mine);

/* evictor.c */
void fm_evictor_main(void *arg);
void fm_evictor_ring(void);
void fm_park(uint64_t page, uint32_t bits, uint64_t since_ns);

/* region.c */
bool fm_region_serve(void);            /* evictor: one step of each call; true: look again before sleeping */
bool fm_region_called(void);           /* is there any? */
bool fm_region_starved(void);          /* ... that waits for a frame? */
void fm_region_watch(uint64_t wait_ns);   /* watcher: sleeps, and serves calls */
void fm_region_joined(void);
void fm_region_forked(bool managed);

/* ../fronts/thread.c */
void fm_front_thread_main(void *arg);
bool fm_front_thread_later(uint64_t page);   /* false: this is not the reader, or its list is full */
void fm_front_thread_hold(void);       /* returns when the reader stands still */
void fm_front_thread_go_on(void);

/* fork.c */
void fm_fork_prepare(void);
void fm_fork_prepare_libc(void);          /* ... for libc's fork(), which walks its streams in the child */
void fm_fork_parent(void);
void fm_fork_child(void);
void fm_fork_stand_still(void);           /* evictor: does what fm.freeze asks for */
void fm_fork_gate_in(void);               /* around what other threads than the reader change in the books */
void fm_fork_gate_out(void);
bool fm_fork_sleeps(void);                /* the forking thread waits for somebody, so it is not copying now */

#endif
