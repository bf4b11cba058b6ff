/* core.h - the core: what state each page is in, and what may be done with it.
 *
 * A pure state machine.  It knows no sockets, no userfaultfd, no threads and no
 * clock: faults, completions and events go in; what has to be done comes out
 * through struct fm_ops.  Two things implement those operations: the engine
 * (native/engine, the real kernel) and the simulator (native/tests/sim*.c).
 *
 * Locks.  Every call that is not an event may run on any thread.  Around each piece of
 * work on a block the core calls ops->enter() and takes the block's lock; while it is
 * inside it calls only operations marked "quick", which never wait for an event to be
 * read.  Events (fm_core_removed, _unmapped, _remapped) are applied by the one thread that
 * reads them, with the world lock held exclusively, so nobody is inside any block.
 * Order: world, block, then one of frames | queue | streams | blocks; never two blocks.
 *
 * Pages are numbers (address >> 12).  A run never crosses a block of 2 MiB.
 */
#ifndef FM_CORE_H
#define FM_CORE_H

#include <stdbool.h>
#include <stdint.h>

#include "control.h"
#include "lock.h"
#include "pool_ledger.h"

#define FM_BLOCK_PAGES 512u
#define FM_FRAME_NONE 0xffffffffu
#define FM_FRAMES_MAX 4096u
#define FM_WINDOW_MAX 32u
#define FM_STREAMS 16u
#define FM_PAGE_NONE UINT64_MAX
/* Owner of a frame whose page waits in limbo (see events.c). */
#define FM_LIMBO_BIT (1ull << 60)

enum fm_state {
    FM_FRESH = 0,     /* never written, discarded while not resident, or all zeros when it left */
    FM_RESIDENT,      /* mapped in the program */
    FM_LEAVING,       /* a move or a copy out is under way */
    FM_STAGED,        /* moved out; its frame is still here */
    FM_REMOTE,        /* only in the pool */
    FM_ARRIVING,      /* a fetch is under way */
    FM_LOST           /* no copy is left: poisoned */
};

enum fm_flag_bits {
    FM_QUEUED = 1,        /* the eviction queue has an entry for it */
    FM_DISCARDED = 2,     /* the program threw it away: missing means zeros.  Sticky, because the
                           * kernel zaps after the event was read, however late that is */
    FM_WAITING = 4,       /* a fault waits for the operation under way */
    FM_HASHED = 8,        /* hash[] is that of the bytes in slot[] */
    FM_ZAPPING = 16,      /* discarded while it may have been there, and not known to have gone since: if it left
                           * now, the zap would miss it and the old bytes would come back */
    FM_KEEP = 32,         /* never evict: thread control block, TLS, locked */
    FM_MARKER = 64,       /* staged at the end of a window: touching it starts the next */
    FM_DROPPING = 128,    /* our own drop is under way: its REMOVE event is not the program's */
    FM_PUT_BACK = 1024,   /* became resident while the books were being copied for a fork: the child may not have it */
    FM_FOUND = 256,       /* was there at adoption and has not left since: it may have been freed (MADV_FREE) before
                           * we looked on, so missing means zeros */
    FM_PINNED = 512,      /* the program asked for it: never evict until it says otherwise */
    FM_LAZY = 2048        /* resident, and the kernel was told that it may take it as long as nobody has written to it since
                           * (drop.c): missing means that it did, so the bytes are those in slot[], or zeros without one */
};

/* 32 bytes of engine memory for each managed page, rounded up: 16 KiB a block. */
struct fm_block {
    uint64_t page;                    /* of the first page; FM_LIMBO_BIT set in limbo */
    struct fm_block *next;            /* all blocks (or the free ones, or limbo) */
    fm_lock lock;
    uint32_t extent;                  /* where new slots come from */
    uint32_t zap_turn;                /* fm_core.zap_turn when a page here was last marked FM_ZAPPING */
    uint64_t limbo_mask[FM_BLOCK_PAGES / 64];
    uint8_t state[FM_BLOCK_PAGES];
    uint16_t flags[FM_BLOCK_PAGES];
    uint32_t slot[FM_BLOCK_PAGES];
    uint32_t frame[FM_BLOCK_PAGES];
    uint64_t hash[FM_BLOCK_PAGES][2];
};

enum fm_res {
    FM_OK = 0,
    FM_EXIST,      /* it is there already */
    FM_AGAIN,      /* the world is changing: events are pending */
    FM_GONE,       /* no such page or mapping, or the process is going away */
    FM_BUSY,       /* shared since a fork, or pinned */
    FM_REFUSED,    /* not by this way: the protection differs */
    FM_FAIL        /* anything else */
};

enum fm_io_kind { FM_IO_FETCH = 1, FM_IO_STORE = 2 };

/* A transfer between n contiguous frames and n contiguous slots of one extent: the next may be on another server.  Lives
 * inside the first frame. */
struct fm_io {
    uint32_t kind;         /* enum fm_io_kind */
    uint32_t n;
    uint32_t frame;
    uint32_t slot;
    int32_t status;        /* 0, or an errno: for the whole transfer */
    uint32_t tries;
    bool marker;           /* fetch: leave the last page staged */
    bool final;            /* failed, and to try again is of no use: whoever says so has tried for long */
    uint64_t due_ns;       /* the delay filter's */
    uint64_t begun_ns;     /* the stats filter's */
    struct fm_io *next;    /* whoever has it in hand may chain it */
};

enum fm_frame_kind {
    FM_FRAME_EMPTY = 0,    /* no memory behind it: a page can be moved here */
    FM_FRAME_FREE,         /* memory behind it, contents dead */
    FM_FRAME_BUSY,         /* an operation has it in hand */
    FM_FRAME_STAGED,       /* holds a page that can be had from the pool as well: reclaimable */
    FM_FRAME_DEAD,         /* contents dead, but somebody else may read them: drop, never rewrite */
    FM_FRAME_KINDS
};

enum fm_drop_step {
    FM_DROP_BEGUN = 1,     /* about to be freed, or freed just now */
    FM_DROP_FREED          /* it was freed for certain, and whatever event was raised before that has been applied */
};

struct fm_frame {
    uint64_t page;         /* owner (FM_LIMBO_BIT possible) or FM_PAGE_NONE: nobody wants the bytes */
    uint32_t slot;         /* held for a transfer: released when it ends, if the page let go of it */
    uint8_t kind;          /* enum fm_frame_kind */
    uint8_t io;            /* enum fm_io_kind of the transfer under way, or 0 */
    uint8_t copied;        /* filled by the copy path: the program has the page until it is dropped */
    uint8_t dirty;         /* the only copy of the bytes */
    uint8_t dropping;      /* copied, and our own drop of the page is under way: enum fm_drop_step */
    uint8_t slot_orphan;   /* release slot when the transfer ends */
    uint32_t turn;         /* raised at each staging: old entries of the ring are known by it */
    struct fm_io transfer;
};

/* What the core needs done.  ctx is fm_core.ctx.  "done" counts pages from the first on. */
struct fm_ops {
    void (*enter)(void *ctx);         /* world lock, shared */
    void (*leave)(void *ctx);
    /* quick: */
    enum fm_res (*zero)(void *ctx, uint64_t page, uint32_t n, uint32_t *done);
    enum fm_res (*move_in)(void *ctx, uint64_t page, uint32_t frame, uint32_t n, uint32_t *done);
    enum fm_res (*copy_in)(void *ctx, uint64_t page, uint32_t frame, uint32_t n, uint32_t *done); /* FM_FRAME_NONE: zeros */
    enum fm_res (*move_out)(void *ctx, uint64_t page, uint32_t frame, uint32_t n, uint32_t *done);
    enum fm_res (*protect)(void *ctx, uint64_t page, uint32_t n, bool on); /* off wakes */
    /* Only for a page that was touched: where the kernel can't poison it ends the program.  FM_AGAIN as ever: an event
     * that is still to be read may explain the page. */
    enum fm_res (*poison)(void *ctx, uint64_t page);
    void (*wake)(void *ctx, uint64_t page, uint32_t n);
    /* A thread waits for the page, and nothing can be put there before an event has been read: whoever reads events
     * tries again then.  Woken instead it would fault again at once, and the kernel hands out faults before events. */
    void (*later)(void *ctx, uint64_t page);
    /* Bit k of bits: page + k is there.  n <= 512 */
    void (*present)(void *ctx, uint64_t page, uint32_t n, uint64_t *bits);
    enum fm_res (*fill_frames)(void *ctx, uint32_t frame, uint32_t n, uint32_t *done);   /* memory behind empty ones */
    /* The frame's bytes.  All private to us while the frame is BUSY. */
    void (*clear)(void *ctx, uint32_t frame, uint32_t n);
    /* true: all zeros.  It must first rewrite a word of the page: one that the program has freed with MADV_FREE
     * could else be taken by the kernel between the look and the store. */
    bool (*hash)(void *ctx, uint32_t frame, uint64_t hash[2]);
    /* may wait; called outside every lock: */
    bool (*read_page)(void *ctx, uint64_t page, uint32_t frame); /* false: not there */
    /* The kernel may take these pages from now on, until somebody writes to them.  Returns when every event that was raised
     * before they were told so has been read.  Not FM_OK: of a single page, nothing was done and no event raised. */
    enum fm_res (*free_lazily)(void *ctx, uint64_t page, uint32_t n);
    /* Take what may be taken of them, and is private to this process and not pinned.  Raises no event. */
    void (*page_out)(void *ctx, uint64_t page, uint32_t n);
    /* Returns when every event that was raised before the call has been read. */
    void (*settle)(void *ctx);
    /* Write to a page without changing it, whatever its protection: the kernel may not take it any more. */
    enum fm_res (*undo_free)(void *ctx, uint64_t page, uint32_t n);
    /* ... and end its sharing since a fork.  FM_REFUSED: it is not writable. */
    enum fm_res (*unshare)(void *ctx, uint64_t page, uint32_t n);
    void (*drop_frames)(void *ctx, uint32_t frame, uint32_t n);
    void (*submit)(void *ctx, struct fm_io *io);                 /* ends in fm_core_io_done() */
    bool (*grant)(void *ctx, uint32_t extent);                   /* space for an extent; false: there is none */
    /* memory for one block, zeroed; NULL: none to be had */
    struct fm_block *(*block_memory)(void *ctx);
    /* memory for the queue; old is given back (bytes 0: none) */
    void *(*memory)(void *ctx, void *old, uint64_t old_bytes, uint64_t bytes);
    void (*message)(void *ctx, int level, const char *text, uint64_t number);
    void (*frames_freed)(void *ctx);  /* faults parked for want of a frame may be tried again */
};

enum fm_fault_bits {
    FM_FAULT_WRITE = 1,
    FM_FAULT_PROTECTED = 2,
    FM_FAULT_AHEAD = 4    /* nobody has touched it: the program asked for it to be here (fm_core_bring()) */
};

enum fm_fault_result {
    FM_FAULT_DONE = 0,    /* resolved, or the thread was woken to look again */
    FM_FAULT_WAIT,        /* whoever ends the operation under way will wake it */
    FM_FAULT_RETRY,       /* events are pending: read them, then call again */
    FM_FAULT_NO_FRAME,    /* call again after frames_freed */
    FM_FAULT_HERE,        /* ahead of any fault only: it is there */
    FM_FAULT_LOST         /* ... and: it can't be had */
};

struct fm_range {
    uint64_t page, end;
};

/* Sorted, disjoint, merged. */
struct fm_ranges {
    struct fm_range *at;
    uint32_t n, cap;
};

enum fm_advice { FM_ADVICE_NORMAL = 0, FM_ADVICE_SEQUENTIAL, FM_ADVICE_RANDOM, FM_ADVICES };

struct fm_stream {
    uint64_t next;        /* the first page not yet asked for */
    uint32_t window;
    uint32_t used;        /* clock of the last use, for replacement */
};

#define FM_TABLE_BITS 13
#define FM_TABLE_SIZE (1u << FM_TABLE_BITS)

struct fm_core {
    const struct fm_ops *ops;
    void *ctx;
    struct fm_counters *count;
    struct fm_pool_ledger ledger;
    uint64_t defects;
    uint32_t evict_mode;
    bool can_move;             /* UFFDIO_MOVE is there */
    bool can_poison;           /* so is UFFDIO_POISON; without it ops->poison ends the program */
    bool copying;              /* the books are being copied for a fork */
    bool frames_shared;        /* vmsplice and the like were seen: never rewrite a frame */
    uint32_t overdraft;        /* > 0: the evictor itself may be waiting for a fault, so zeros are given over budget */

    int64_t local_pages;       /* pages that we account for: resident managed, and frames with memory */
    int64_t limit_pages;       /* ... and how many there may be */
    int64_t remote_pages;
    int64_t pinned_pages;        /* FM_PINNED, whether they are here or not */

    /* blocks.c: two levels over 47-bit addresses */
    struct fm_block **table[FM_TABLE_SIZE];
    fm_lock blocks_lock;
    struct fm_block *blocks, *blocks_free, *limbo;
    uint64_t blocks_made;
    /* Blocks between these were discarded before they had a record: pages there count as FM_DISCARDED and FM_ZAPPING */
    uint64_t hull_first, hull_end;
    uint32_t zap_turn;           /* how often fm_core_zaps_done() was called */

    /* ranges.c: changed with the world held exclusively */
    struct fm_ranges managed;    /* registered, as far as the events that were read tell */
    struct fm_ranges debts;      /* mapped anew before the event that ends the old mapping was read */
    struct fm_ranges arrivals;   /* what was moved in over such a one: whole ranges, as long as any of it is owed */

    /* frames.c */
    fm_lock frames_lock;
    uint32_t frames_n;
    uint32_t kind_n[FM_FRAME_KINDS];
    uint64_t bits[FM_FRAME_KINDS][FM_FRAMES_MAX / 64];   /* of EMPTY, FREE and DEAD ones */
    struct { uint32_t frame, turn; } staged[FM_FRAMES_MAX * 2];
    uint32_t staged_head, staged_tail;
    struct fm_frame frame[FM_FRAMES_MAX];

    /* queue.c: runs of resident pages in the order in which they came */
    fm_lock queue_lock;
    uint64_t *queue;
    uint64_t queue_cap, queue_head, queue_tail;

    /* streams.c */
    fm_lock streams_lock;
    struct fm_stream stream[FM_STREAMS];
    uint32_t stream_clock;
    struct fm_ranges advised[FM_ADVICES];

    /* drop.c: copied pages whose store is acknowledged and that must now be dropped */
    fm_lock drops_lock;
    uint32_t drops[FM_FRAMES_MAX];
    uint32_t drops_n;
    uint32_t stayed;             /* the evictor's: pages in a row that did not leave though they were dropped */
    struct fm_range freeing;     /* where it drops just now: changed with the world shared, by the evictor alone */
    uint64_t own_events;         /* bit k: the event of our own drop of freeing.page + k is still to come */
    struct fm_ranges astray;     /* where pages from there were moved meanwhile: see undo_astray() */
    uint64_t aside_page;         /* the evictor itself may wait for this page ... */
    uint32_t aside_frame;        /* ... and this frame is for it, once; FM_FRAME_NONE: used, or there is none */

    uint32_t spare;              /* the evictor's: an extent with its space granted, for the next block that needs one */
    uint32_t failed_stores;      /* in a row: none has succeeded since */
};

/* ---- core.c */
/* The caller has zeroed core and set ops, ctx, count, ledger, defects, evict_mode, can_move, can_poison. */
void fm_core_init(struct fm_core *c, uint32_t frames);
void fm_core_io_done(struct fm_core *c, struct fm_io *io);
/* Adoption: these registered pages may be there already (each is looked at again). */
void fm_core_found(struct fm_core *c, uint64_t page, uint32_t n);
/* Never evict these (they come back by themselves when touched). */
void fm_core_keep(struct fm_core *c, uint64_t page, uint64_t n);
/* Pages that were discarded and have gone by now no longer count as local. */
void fm_core_recount(struct fm_core *c, uint64_t page, uint64_t n);
/* Every discard whose event was applied before the last call of this has been carried out by now.  Without
 * these calls pages that were freed and are still there (MADV_FREE) are never evicted. */
void fm_core_zaps_done(struct fm_core *c);
/* From now on others may be reading frames behind our back (vmsplice ...): never rewrite one again. */
void fm_core_share_frames(struct fm_core *c);

/* ---- fault.c */
enum fm_fault_result fm_core_fault(struct fm_core *c, uint64_t page, uint32_t bits);

/* See to it that page is here, and at most n - 1 of those behind it with it.  Call it until it says FM_FAULT_HERE. */
enum fm_fault_result fm_core_bring(struct fm_core *c, uint64_t page, uint32_t n);

/* ---- evict.c */
enum fm_evict_result {
    FM_EVICT_DONE = 0,      /* did what was asked */
    FM_EVICT_NOTHING,       /* no page can leave now */
    FM_EVICT_RETRY,         /* events are pending */
    FM_EVICT_FULL           /* the pool is full */
};
/* Move out up to n pages (staging is filled first). */
enum fm_evict_result fm_core_evict(struct fm_core *c, uint32_t n);
/* Move out what can be of n pages from page on, whoever's turn it is.  *done: how many were dealt with; NOTHING means
 * that no frame was empty. */
enum fm_evict_result fm_core_evict_range(struct fm_core *c, uint64_t page, uint32_t n, uint32_t *done);
/* Make the oldest staged pages REMOTE, so that n more frames are free.  How many were made. */
uint32_t fm_core_reclaim(struct fm_core *c, uint32_t n);
/* Give back the memory of up to n free frames (reclaiming staged ones).  How many. */
uint32_t fm_core_shrink(struct fm_core *c, uint32_t n);

/* ---- asked.c: what a program asks for its pages; on the evictor's thread */
struct fm_tally {
    uint64_t resident, moving, remote, fresh, lost, pinned;    /* pages; moving: staged, leaving or arriving */
    uint64_t first_lost;                                       /* FM_PAGE_NONE: none is */
};
void fm_core_tally(struct fm_core *c, uint64_t page, uint64_t n, struct fm_tally *t);
/* False: no memory for their records (what was pinned by then stays so). */
bool fm_core_pin(struct fm_core *c, uint64_t page, uint64_t n);
void fm_core_unpin(struct fm_core *c, uint64_t page, uint64_t n);
/* Are pages of the range here that were dropped, and that the kernel would not take then? */
bool fm_core_stayed(struct fm_core *c, uint64_t page, uint64_t n);
/* Staged pages of the range become REMOTE.  False: some are still on their way. */
bool fm_core_leave_staging(struct fm_core *c, uint64_t page, uint64_t n);

/* ---- events.c: with the world held exclusively */
void fm_core_managed(struct fm_core *c, uint64_t page, uint64_t n);   /* registered with us from now on */
void fm_core_removed(struct fm_core *c, uint64_t page, uint64_t n);
void fm_core_unmapped(struct fm_core *c, uint64_t page, uint64_t n);
void fm_core_remapped(struct fm_core *c, uint64_t from, uint64_t to, uint64_t n);

/* ---- ranges.c */
void fm_ranges_add(struct fm_core *c, struct fm_ranges *r, uint64_t page, uint64_t end);
void fm_ranges_cut(struct fm_core *c, struct fm_ranges *r, uint64_t page, uint64_t end);
/* As a range of its own: what was there is cut, neighbours stay apart. */
void fm_ranges_put(struct fm_core *c, struct fm_ranges *r, uint64_t page, uint64_t end);
/* The first piece of r within [page, end); false: none. */
bool fm_ranges_next(const struct fm_ranges *r, uint64_t page, uint64_t end, struct fm_range *piece);

/* ---- fork.c */
/* In the child, before anything else: every lock is free, every frame empty, and each page that was
 * on its way is settled by whether the child has it.  The child counts on the same slots. */
void fm_core_forked(struct fm_core *c);

/* From now on a fork may copy the books, page by page while they change.  With the world shared. */
void fm_core_copying(struct fm_core *c, bool on);

/* ---- within the core */
struct fm_block *fm_block_find(struct fm_core *c, uint64_t page);   /* NULL: all FRESH */
struct fm_block *fm_block_get(struct fm_core *c, uint64_t page);    /* made when needed; NULL: no memory */
struct fm_block *fm_block_of_owner(struct fm_core *c, uint64_t owner);
void fm_block_free(struct fm_core *c, struct fm_block *b);          /* events only */
void fm_block_enter(struct fm_core *c, struct fm_block *b);
void fm_block_leave(struct fm_core *c, struct fm_block *b);

/* For a look without the lock that guards what is looked at: a hint, to be verified inside.  The thread sanitizer is
 * told that this is meant. */
#define FM_UNLOCKED_LOOK __attribute__((noinline, no_sanitize("thread")))
uint64_t fm_owner_unlocked(const struct fm_frame *fr);
static inline uint32_t fm_frames_of(const struct fm_core *c, enum fm_frame_kind kind)
{
    return __atomic_load_n(&c->kind_n[kind], __ATOMIC_RELAXED);
}

uint32_t fm_frames_take(struct fm_core *c, enum fm_frame_kind kind, uint32_t want, uint32_t *first);
void fm_frames_put(struct fm_core *c, uint32_t first, uint32_t n, enum fm_frame_kind kind);
void fm_frame_stage(struct fm_core *c, uint32_t f);
bool fm_frame_unstage(struct fm_core *c, uint32_t f);      /* into hand (BUSY); false: somebody has it */
uint32_t fm_frame_oldest(struct fm_core *c);               /* of the staged; still staged; FM_FRAME_NONE */

void fm_queue_push(struct fm_core *c, uint64_t page, uint32_t n);
bool fm_queue_pop(struct fm_core *c, uint64_t *page, uint32_t *n);
uint64_t fm_queue_entries(struct fm_core *c);
void fm_queue_unpop(struct fm_core *c, uint64_t page, uint32_t n);

/* Within b's lock: may b[i] leave? */
bool fm_slot_grant(struct fm_core *c, struct fm_block *b, uint32_t i);
/* b[i] is dirty: give it a slot that nobody shares; it stays without one if there is none. */
void fm_slot_assign(struct fm_core *c, struct fm_block *b, uint32_t i);
/* Events only: nothing of the block is in its extent any more, so its space can go back. */
void fm_extent_give_up(struct fm_core *c, struct fm_block *b);
/* Outside every lock: have an extent at hand, near those of page's neighbours, whose space is granted; false: the pool
 * is full. */
bool fm_spare_ready(struct fm_core *c, uint64_t page);

/* The window for a fault on page: how many pages from it on (>= 1). */
uint32_t fm_stream_plan(struct fm_core *c, uint64_t page);
void fm_stream_advise(struct fm_core *c, uint64_t page, uint64_t end, enum fm_advice advice);
/* Only `got` of the `planned` pages from page on were taken. */
void fm_stream_took(struct fm_core *c, uint64_t page, uint32_t planned, uint32_t got);
/* A marker was touched: what to fetch next.  0: nothing. */
uint32_t fm_stream_ahead(struct fm_core *c, uint64_t page, uint64_t *from);

/* Inside the block of a page, made when needed; NULL: no memory. */
struct fm_block *fm_block_enter_made(struct fm_core *c, uint64_t page);
void fm_page_resident(struct fm_core *c, struct fm_block *b, uint32_t i, uint32_t n);
/* Missing means zeros from now on, and nothing that is there may leave before the kernel has zapped it. */
void fm_page_discarded(struct fm_core *c, struct fm_block *b, uint32_t i);
/* A page that counts as local turned out to be missing, and that means zeros. */
void fm_page_gone(struct fm_core *c, struct fm_block *b, uint32_t i);
/* It turned out to be missing: FRESH or REMOTE from now on.  False: it should be there, or an event is still to be read. */
bool fm_page_missing(struct fm_core *c, struct fm_block *b, uint32_t i);
/* Of a page's flags only those in keep survive. */
void fm_flags_cut(struct fm_core *c, struct fm_block *b, uint32_t i, uint16_t keep);
/* Forget all about a page: its slot, its frame; FRESH.  Flags in keep survive. */
void fm_page_forget(struct fm_core *c, struct fm_block *b, uint32_t i, uint16_t keep);
/* A staged page that can be had from the pool becomes REMOTE; false: it can't be, or somebody has its frame in hand. */
bool fm_page_reclaim(struct fm_core *c, struct fm_block *b, uint32_t i);
void fm_slot_detach(struct fm_core *c, struct fm_block *b, uint32_t i);
/* Put n pages from frames back into the program, as resident; how many; *res says why it stopped. */
uint32_t fm_install(struct fm_core *c, struct fm_block *b, uint32_t i, uint32_t frame, uint32_t n, enum fm_res *res);
void fm_charge(struct fm_core *c, int64_t pages);
void fm_state_set(struct fm_core *c, struct fm_block *b, uint32_t i, enum fm_state s);
void fm_unprotect(struct fm_core *c, struct fm_block *b, uint32_t i);
/* The copy of frame f's page is of no use: the page stays in the program. */
void fm_copy_undo(struct fm_core *c, struct fm_block *b, uint32_t i, uint32_t f);
/* Is frame f still that of a page on its way out?  If so: inside its block.  An orphan is put back. */
struct fm_block *fm_enter_leaving(struct fm_core *c, uint32_t f);
/* Frame f holds the copy of a page that can be had from the pool by now: the evictor drops the page. */
void fm_drop_later(struct fm_core *c, uint32_t f);
void fm_run_drops(struct fm_core *c);
/* Have one of the operations that write to a page of the program's done to it, outside every lock. */
enum fm_res fm_write_to(struct fm_core *c, uint64_t page, enum fm_res (*op)(void *ctx, uint64_t page, uint32_t n), bool must);
void fm_page_lost(struct fm_core *c, struct fm_block *b, uint32_t i);
/* A run of frames with memory behind them, in hand: free ones, or made, or reclaimed.  How many (0: none now). */
uint32_t fm_frames_for_fetch(struct fm_core *c, uint32_t want, uint32_t *first);
/* What it means if a page that should be there is missing.  If neither, it's our bug. */
static inline bool fm_missing_means_remote(const struct fm_block *b, uint32_t i)
{
    return (b->flags[i] & FM_LAZY) != 0 && b->slot[i] != FM_SLOT_NONE;
}
static inline bool fm_missing_means_zeros(const struct fm_block *b, uint32_t i)
{
    return (b->flags[i] & (FM_DISCARDED | FM_FOUND | FM_LAZY)) != 0 && !fm_missing_means_remote(b, i);
}
static inline bool fm_in_limbo(const struct fm_block *b) { return (b->page & FM_LIMBO_BIT) != 0; }

/* Is the slot behind this one its neighbour in a transfer too? */
static inline bool fm_slots_go_on(uint32_t slot, uint32_t next)
{
    return next == slot + 1 && next % FM_EXTENT_SLOTS != 0;
}

#define fm_defect(c, name) (__builtin_expect(((c)->defects & FM_DEFECT_##name) != 0, 0))
#define fm_add(counter, n) ((void)__atomic_add_fetch(&(counter), (uint64_t)(n), __ATOMIC_RELAXED))

#endif
