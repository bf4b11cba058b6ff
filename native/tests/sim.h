/* sim.h - the simulator of the core: what its parts share.
 *
 * One process, one thread, one seed.  Every actor (program threads, fault handlers, the reader of events, the
 * evictor, the pool) is a coroutine; each operation of the core may yield at its start and at its end, and then a
 * random other one runs, so that every interleaving that the locks allow can happen.  The kernel is a
 * model: a page's 4 KiB are one version number, 0 being all zeros.  The truth is a table of what each
 * page must read as.  Nothing here may look at a clock or at any other source of chance than sim_rnd().
 *
 *   sim_co.c       coroutines, chance, waiting        sim_program.c  the program's threads, and the truth
 *   sim_kernel.c   the model kernel's page tables     sim_fork.c     forked children (really forked)
 *   sim_ops.c      struct fm_ops over it              sim_check.c    invariants
 *   sim_engine.c   handlers, reader, evictor, pool    sim.c          seeds, phases, the command line
 */
#ifndef FM_SIM_H
#define FM_SIM_H

#include "core/core.h"

#define AS_BLOCKS 5u
#define AS_PAGES (AS_BLOCKS * FM_BLOCK_PAGES)
#define AS_BASE (777ull * FM_BLOCK_PAGES)     /* number of the first page */
#define SIM_FRAMES 96u                        /* most frames of a run */
#define PHYS_MAX 16384u
#define PHYS_NONE 0xffffffffu
#define PHYS_ZERO 0xfffffffeu                 /* the shared zero page */
#define FAULTS_MAX 256u
#define EVENTS_MAX 64u
#define PINS_MAX 8u
#define PINNED_MAX 6u                         /* pages that the program asked for to stay */
#define HELD_MAX 16u
#define CO_MAX 16u
#define THREADS 4u
#define EXTENTS_MAX 24u
#define ARENA_BYTES (8u << 20)
#define BAD_SIZE 4096u

/* Who is who among the coroutines. */
enum { CO_MAIN, CO_READER, CO_HANDLER, CO_HANDLER2, CO_EVICTOR, CO_POOL, CO_POOL2, CO_ADOPTER, CO_CHANCE, CO_THREAD };
#define CO_N (CO_THREAD + THREADS)

typedef bool (*ready_fn)(void *arg);

struct co {
    void *sp;
    ready_fn ready;               /* NULL: can run */
    void *arg;
    void (*run)(uint32_t id);
};

struct phys {
    uint64_t version;
    uint32_t refs;
    uint8_t pins, held;
    bool lazy;                    /* MADV_FREE: the kernel may take it until it is rewritten */
    uint8_t astray;               /* ... but does not yet: see free_page() */
};

enum prot { PROT_RW, PROT_RO, PROT_NO, PROT_RX };

/* What a page must read as. */
enum truth_mode {
    EXACT,                        /* now */
    EITHER,                       /* now or alt: the first look settles it */
    LAZY                          /* now, or zeros from some time on */
};
struct truth {
    uint64_t now, alt;
    uint8_t mode;
    bool window, wrote;           /* a discard is under way, and the page was written meanwhile */
};

enum { ASTRAY_NOW = 1, ASTRAY_FOR_GOOD };

struct pte {
    uint32_t phys;
    uint32_t map;                 /* which mapping; 0: none */
    bool registered, wp, shared, poison;
    uint8_t prot;
    uint8_t busy;                 /* a range operation that has not taken effect yet */
    uint8_t pend;                 /* operations that ended an old use, and whose event was not read yet */
    uint8_t hole;                 /* a wide munmap() covered it while nothing was there; its event was not read yet */
    uint8_t users;                /* threads that access it right now */
    struct truth truth;
};

enum event_kind { EV_REMOVE = 1, EV_UNMAP, EV_REMAP };
struct event {
    uint8_t kind;
    bool read;
    uint64_t page, to, n;
};

enum fault_state { FAULT_NONE, FAULT_UNREAD, FAULT_RETRY_LATER, FAULT_FRAME_LATER };
struct fault {
    uint8_t state;
    uint8_t co;
    uint8_t bits;
    uint64_t page;
    uint64_t seq;
};

/* Shared by parent and children. */
struct family {
    uint64_t slot[EXTENTS_MAX * FM_EXTENT_SLOTS];
    uint32_t procs;
    uint32_t children;            /* alive */
};

enum sim_defect {
    SIM_LOSE_STORE = 1,           /* a store succeeds, and nothing was stored */
    SIM_EARLY_ACK = 2,            /* a store is acknowledged before the frame's bytes are taken */
    SIM_LATE_EVENT = 4,           /* an event is read in one critical section and applied in the next */
    SIM_FORGET_WAKE = 8,
    SIM_LAZY_FRAMES = 16,         /* hash() leaves it to the kernel to take freed pages out of staging */
    SIM_NO_LEDGER_FORK = 32,      /* the child does not count on its parent's slots */
    SIM_WEAK_HASH = 64,           /* all pages have one hash */
    SIM_BLIND = 128,              /* operations go ahead while events are pending */
    SIM_WRONG_SLOT = 256,         /* a run of transfers is off by one at its end */
    SIM_STALE_PRESENT = 512       /* present() says what was true of the page before */
};

struct sim {
    /* chance and time */
    uint64_t rnd[4], seed, steps, deadline, steps_max;
    uint32_t calm;                /* one point in so many yields */
    const char *waiting_for;
    struct co co[CO_MAX];
    uint32_t cur, main, depth;
    bool verbose;
    uint64_t watch;
    uint64_t sim_defects;
    const char *defect_name;

    /* the engine's shell */
    struct fm_core *core;
    struct fm_counters count;
    uint32_t shared, in_core;     /* world lock holders; coroutines inside the core */
    uint32_t freeze;                  /* 1: no eviction, no new operation of the program; 2: no new fetch either */
    bool exclusive, wanted, gate, evictor_idle, stop, adopting;
    uint32_t completing, stalled_pool;
    uint64_t freed_seq;
    struct fault fault[FAULTS_MAX];
    uint32_t faults_n;
    bool blocked[CO_MAX];
    uint64_t blocked_page[CO_MAX];
    struct fm_io *io[SIM_FRAMES];
    uint32_t io_n;

    /* the kernel */
    struct pte pte[AS_PAGES];
    struct phys phys[PHYS_MAX];
    uint32_t phys_free[PHYS_MAX], phys_free_n;
    uint32_t frame[SIM_FRAMES];   /* the phys behind it */
    uint32_t frames_n;
    uint32_t astray_n;            /* pages that the drop under way has met, and should not have */
    int32_t changing;
    struct event *events[EVENTS_MAX];
    uint32_t events_n;
    uint32_t map_next;

    /* the program */
    uint64_t version_next, version_base;
    uint32_t zap_gen, zaps[2];    /* discards under way, by when they began */
    bool pins_on, splice_on, forks_on, faults_on, free_on, starved_on, servers_on;
    uint32_t bad_ppm;
    struct { uint32_t phys; uint64_t page; } pin[PINS_MAX];
    uint32_t held[HELD_MAX];
    uint32_t forks_left;
    struct { uint64_t version; uint32_t n; } bad[BAD_SIZE];

    /* the family */
    struct family *family;
    void *ledger;
    uint64_t ledger_bytes, pool_bytes;
    uint32_t proc;
    struct { int pid, fd; uint32_t proc; } child[2];

    char *arena;
    uint64_t arena_used;
};

extern struct sim S;

/* ---- sim_co.c */
void sim_seed(uint64_t seed);
uint64_t sim_rnd(uint64_t below);
static inline bool sim_chance(uint64_t one_in) { return sim_rnd(one_in) == 0; }
void co_start(uint32_t id, void (*run)(uint32_t id));
void sim_yield(void);
void sim_wait(ready_fn ready, void *arg);     /* until ready(arg) */
void sim_point(void);                         /* yields now and then */
/* What happens to the page that --watch names. */
void sim_trace(const char *what, uint64_t page, uint64_t n, uint64_t detail);
_Noreturn void sim_violation(const char *format, ...) __attribute__((format(printf, 1, 2)));
#define sim_expect(x, ...) ((x) ? (void)0 : sim_violation(__VA_ARGS__))
#define sim_defect(name) ((S.sim_defects & SIM_##name) != 0)

/* ---- sim_kernel.c */
static inline struct pte *pte_of(uint64_t page) { return &S.pte[page - AS_BASE]; }
static inline bool in_space(uint64_t page) { return page >= AS_BASE && page < AS_BASE + AS_PAGES; }
void kernel_init(uint32_t frames);
uint32_t phys_new(uint64_t version);
void phys_put(uint32_t phys);
uint64_t phys_version(uint32_t phys);
void phys_engine_writes(uint32_t phys, uint64_t version);
void kernel_wake(uint64_t page, uint64_t n);
void kernel_fault(uint64_t page, uint32_t bits);         /* the current coroutine blocks until it is woken */
void kernel_zap(struct pte *p);
void kernel_page_out(uint64_t page);                     /* takes it if it is clean, and nobody holds it */
bool kernel_make_writable(uint64_t page);                /* false: it is poisoned, or unmapped */
void kernel_event(enum event_kind kind, uint64_t page, uint64_t to, uint64_t n);  /* queue it, wait until it was read */
bool same_vma(uint64_t a, uint64_t b);
uint32_t event_unread(void);

/* ---- sim_ops.c */
extern const struct fm_ops sim_ops;
void core_in(void);       /* around each call into the core */
void core_out(void);
void bad_note(uint64_t version, bool good);
uint32_t bad_count(uint64_t version);
void sim_free_ends(void);                                /* the last drop has ended: what it left lazy the kernel may take */

/* ---- sim_engine.c */
void engine_start(void);
void world_take(void);
void world_release(void);

/* ---- sim_program.c */
void program_thread(uint32_t id);
void program_read(uint64_t page);
bool program_touchable(uint64_t page);
uint64_t program_page(void);
void program_device_write(void);

/* ---- sim_fork.c */
void program_fork(void);
void child_release(uint32_t k);

/* ---- sim_check.c */
void sim_check(void);

/* ---- sim.c */
void run_phases(uint64_t steps);

#endif
