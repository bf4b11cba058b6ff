/* control.h - the control segment: the one layout that the engine (C), the
 * supervisor and the command line (Python, through cffi) all share.
 *
 * Everything below "cdef begins" must be parsable by cffi's cdef(): plain
 * structs, enums and integer #defines, no macros with arguments.  The segment is
 * a memfd; nobody holds a lock in it across processes: every field that two sides
 * write is changed with atomic instructions only.  Sizes in bytes, times in ns.
 * This header must not be changed without raising FM_CONTROL_VERSION.
 */
#ifndef FM_CONTROL_H
#define FM_CONTROL_H

#include <stdint.h>

/* cdef begins */
#define FM_CONTROL_MAGIC 0x6d656d726166
#define FM_CONTROL_VERSION 7
#define FM_PAGE_BYTES 4096
#define FM_PROCS_MAX 1024
#define FM_MESSAGES_MAX 256
#define FM_MESSAGE_BYTES 240
#define FM_FILTERS_MAX 8
#define FM_SECRET_BYTES 192
#define FM_TOKEN_BYTES 16
#define FM_POOL_EXPORT_BYTES 1024
#define FM_POOL_SERVERS_MAX 32

/* Counters of one process; the names are the names in --stats.  Only that
 * process's engine writes them. */
struct fm_counters {
    uint64_t faults_fresh;            /* first touch of a page that holds nothing */
    uint64_t faults_fetch;            /* the page was in the pool */
    uint64_t faults_rescue;           /* the page was still in staging */
    uint64_t faults_wait;             /* an operation on the page was under way */
    uint64_t faults_write_protect;    /* a write met a page that was being copied out */
    uint64_t faults_spurious;         /* the page was there already */
    uint64_t faults_lost;             /* the page is lost: SIGBUS */
    uint64_t pages_fetched;           /* read from the pool, prefetched ones included */
    uint64_t pages_prefetched;        /* fetched (or moved in) ahead of a fault */
    uint64_t pages_prefetched_used;   /* ... and known to have been touched (markers) */
    uint64_t pages_evicted;           /* left the program: moved or copied out */
    uint64_t pages_moved_out;
    uint64_t pages_copied_out;
    uint64_t pages_stored;            /* written to the pool */
    uint64_t pages_dropped_clean;     /* the pool had the same bytes already */
    uint64_t pages_dropped_zero;      /* all zeros: nothing to keep */
    uint64_t pages_zeroed;            /* given to the program as zeros */
    uint64_t pages_discarded;         /* thrown away by the program while not resident */
    uint64_t pages_pinned;            /* refusals: the page is pinned and stays */
    uint64_t pages_unshared;          /* shared since a fork, made private to evict */
    uint64_t pages_lost;
    uint64_t bytes_in;
    uint64_t bytes_out;
    uint64_t fetch_retries;           /* a bad hash or a failed read: read once more */
    uint64_t store_errors;            /* a failed write: the page stays local */
    uint64_t stall_ns;                /* time that faults waited for the engine */
    uint64_t events_remove;
    uint64_t events_unmap;
    uint64_t events_remap;
    uint64_t forks;
    uint64_t pool_fetches;            /* the stats filter's: fetches that ended, of a page or of several */
    uint64_t pool_fetch_ns;           /* ... and how long they took together */
    uint64_t pool_stores;
    uint64_t pool_store_ns;
    uint64_t engine_bytes;            /* memory of the engine itself */
    uint64_t managed_bytes;           /* memory ranges registered with us */
    uint64_t peak_local_bytes;
    uint64_t transfers_uring;         /* file: transfers that ended, by io_uring ... */
    uint64_t transfers_threads;       /* ... and by a thread that waits for each */
    uint64_t pool_connections_lost;   /* nbd, rdma: how often one ended, and was made anew */
    uint64_t pool_silent_ns;          /* nbd, rdma: how long the server was waited for that did not answer */
};

enum fm_proc_state {
    FM_PROC_FREE = 0,
    FM_PROC_FORKING = 1,              /* reserved by a parent for the child of a fork */
    FM_PROC_LIVE = 2,                 /* watched */
    FM_PROC_ADOPTED = 3,              /* memory was short: managed */
    FM_PROC_DEAD = 4                  /* gone; the supervisor is cleaning up */
};

/* A slot of the ledger. */
struct fm_proc {
    uint32_t state;                   /* enum fm_proc_state, changed by compare-and-swap */
    uint32_t pid;
    uint32_t parent_slot;
    uint32_t adopted;                 /* 1: it may hold slots of the pool, so the supervisor must reap it */
    uint64_t local_bytes;             /* anonymous memory that is here, staging included */
    uint64_t remote_bytes;            /* pages that are only in the pool */
    uint64_t need_bytes;              /* both, where memory is shared since a fork at its worst: divides the budget */
    uint32_t fork_verdict;            /* of the parent on a child: enum fm_verdict */
    uint32_t fork_unmaps_n;           /* ranges unmapped while the fork went on, for the child to settle */
    uint64_t fork_unmaps[16];         /* start and end of each */
    uint64_t pad[2];
    struct fm_counters counters;
};

enum fm_verdict { FM_VERDICT_NONE = 0, FM_VERDICT_GO = 1, FM_VERDICT_STOP = 2 };

enum fm_level { FM_LEVEL_DEBUG = 0, FM_LEVEL_INFO = 1, FM_LEVEL_WARNING = 2, FM_LEVEL_ERROR = 3 };

/* Messages: a writer takes ticket = message_next++ and fills
 * messages[ticket % FM_MESSAGES_MAX], storing seq = ticket + 1 last.  A reader that
 * is late loses the oldest. */
struct fm_message {
    uint64_t seq;
    uint32_t pid;
    uint32_t level;
    char text[240];                   /* FM_MESSAGE_BYTES, always ends with 0 */
};

enum fm_filter_kind {
    FM_FILTER_NONE = 0,
    FM_FILTER_CHECKSUM = 1,           /* no parameters */
    FM_FILTER_STATS = 2,              /* no parameters */
    FM_FILTER_DELAY = 3,              /* rtt_ns, bytes_per_second (0: no cap) */
    FM_FILTER_ERROR = 4               /* fetch, store, corrupt: chances in parts per million; armed by a file */
};
struct fm_filter_config {
    uint32_t kind;                    /* enum fm_filter_kind; the first is the outermost */
    uint32_t pad;
    uint64_t params[8];               /* delay: rtt_ns, bytes_per_second; error: fetch_ppm, store_ppm, corrupt_ppm, seed */
    char path[184];                   /* error: active only while this file exists; empty: always */
};

enum fm_evict_mode { FM_EVICT_AUTO = 0, FM_EVICT_COPY = 2 };

/* Named defects: each takes out one fix, so that the tests can prove that they
 * would notice.  Bits of control.defects; never set outside the tests. */
enum fm_defect {
    FM_DEFECT_NO_DUPLICATE = 1,           /* the supervisor gets no duplicate of the userfaultfd */
    FM_DEFECT_COPY_PINNED = 2,            /* a page that MOVE refuses as busy is copied and dropped */
    FM_DEFECT_IGNORE_REMOVE = 4,          /* REMOVE events are read and not applied */
    FM_DEFECT_REMOVE_IS_FRESH = 8,        /* REMOVE of a resident page makes it FRESH, not DISCARDED */
    FM_DEFECT_IGNORE_UNMAP = 16,
    FM_DEFECT_IGNORE_REMAP = 32,
    FM_DEFECT_SHARE_DESCRIPTORS = 64,     /* the engine lives in the program's descriptor table */
    FM_DEFECT_IGNORE_FORK = 128,          /* no fork handlers, no MADV_DONTFORK */
    FM_DEFECT_ADOPT_TLS = 256,            /* thread control blocks and TLS are evicted like the rest */
    FM_DEFECT_LOG_TO_STDERR = 512,        /* messages are written to the program's stderr */
    FM_DEFECT_OPEN_SIGNALS = 1024,        /* engine threads take the program's signals */
    FM_DEFECT_REUSE_SHARED_FRAMES = 2048, /* frames are rewritten though vmsplice was used */
    FM_DEFECT_DROP_UNREAD = 4096,         /* the copy path drops without write-protection */
    FM_DEFECT_SKIP_STORE = 8192,          /* a dirty page counts as clean */
    FM_DEFECT_NO_HASH_CHECK = 16384,      /* fetched bytes are not verified */
    FM_DEFECT_SKIP_ZAPPING = 32768,       /* a discarded page may be evicted before the kernel has zapped it */
    FM_DEFECT_SKIP_LIMBO = 65536,         /* a mapping moved onto one that is still in the books replaces it */
    FM_DEFECT_BELIEVE_MOVE = 131072,      /* what UFFDIO_MOVE says it did is not confirmed */
    FM_DEFECT_DROP_BY_ADDRESS = 262144,   /* the copy path drops whatever is at the page's address */
    FM_DEFECT_TRUST_THE_DEAD = 524288     /* an unchanged page is dropped though the server of its copy is gone */
};

enum fm_server_kind { FM_SERVER_NONE = 0, FM_SERVER_NBD = 1, FM_SERVER_RDMA = 2 };
/* What the supervisor knows of a lease that has ended. */
enum fm_server_end {
    FM_SERVER_GONE = 1,               /* with what was stored there */
    FM_SERVER_GIVEN_BACK = 2          /* nothing was */
};

/* Where a part of a pool elsewhere is, and how it is spoken to.  Its number is that of the span of extents that lie there
 * (pool_ledger.h), which is made when all of this is filled in.  RDMA: the socket of the job's agent, and as the export what lets
 * an engine in there (struct fm_rdma_pass). */
struct fm_pool_server {
    uint64_t timeout_ns;              /* a request that is not answered within it has failed */
    uint32_t address_bytes;           /* of address: a struct sockaddr of any family */
    uint32_t export_bytes;            /* of export_name */
    uint32_t gone;                    /* enum fm_server_end; 0: as far as the supervisor knows it is there */
    uint32_t kind;                    /* enum fm_server_kind */
    uint32_t down;                    /* an engine has waited for it in vain, and uses nothing more of it for now */
    uint32_t pad;
    uint8_t address[128];
    char name[128];                   /* what messages call the server; always ends with 0 */
    char export_name[1024];           /* FM_POOL_EXPORT_BYTES; may be a secret (a lease's token): never said, never logged */
};

struct fm_control {
    uint64_t magic;
    uint32_t version;
    uint32_t bytes;                   /* sizeof(struct fm_control) */
    uint32_t procs_max;
    uint32_t flags;                   /* enum fm_flag */
    uint64_t budget_bytes;            /* of the job; may change while it runs */
    uint64_t pool_bytes;              /* capacity of the pool, a multiple of 2 MiB */
    uint64_t defects;                 /* enum fm_defect */
    uint32_t evict_mode;              /* enum fm_evict_mode */
    uint32_t backend;                 /* enum fm_backend_kind */
    uint32_t filters;                 /* how many of filter[] are used */
    uint32_t userfaultfd_way;         /* enum fm_uffd_way: how `farmem run` found it can be had */
    uint32_t procs_high;              /* no slot from this one on was ever used */
    uint32_t file_io;                 /* enum fm_file_io */
    uint32_t pool_grows;              /* 1: the supervisor gets more of it before it is full */
    uint32_t pad;
    uint64_t pool_stored_pages;       /* slots in use now, all processes */
    uint64_t pool_peak_pages;
    uint64_t message_next;
    uint8_t secret[192];              /* FM_SECRET_BYTES, for XXH3 */
    struct fm_filter_config filter[8];
    struct fm_pool_server pool_servers[32];   /* FM_POOL_SERVERS_MAX */
    struct fm_message messages[256];
    struct fm_proc procs[1024];
};

enum fm_flag {
    FM_FLAG_NO_PINNED_IO = 1,         /* the user vouches that no page is pinned (Linux before 6.8) */
    FM_FLAG_POOL_DIRECT = 2           /* file: opened for direct I/O */
};

enum fm_backend_kind { FM_BACKEND_MEM = 1, FM_BACKEND_FILE = 2, FM_BACKEND_SERVERS = 3 };
enum fm_file_io { FM_FILE_IO_AUTO = 0, FM_FILE_IO_URING = 1, FM_FILE_IO_THREADS = 2 };   /* auto: io_uring if it can be had */
enum fm_uffd_way {
    FM_UFFD_NONE = 0,
    FM_UFFD_SYSCALL = 1,
    FM_UFFD_DEVICE = 2,
    FM_UFFD_USER_MODE = 3             /* for regions alone: a system call that meets a missing page fails with EFAULT */
};

/* What travels on the job's socket (abstract, SOCK_SEQPACKET).  FARMEM_JOB in the
 * environment is "NAME:TOKEN" (the token in hex); the socket's address is "\0" NAME.
 * (`farmem stat` and `farmem set` ask on it too, in JSON: farmem/answers.py.) */
enum fm_wire_kind {
    FM_WIRE_HELLO = 1,                /* engine: token, slot (FM_SLOT_ANY, or the one reserved by a parent) */
    FM_WIRE_WELCOME = 2,              /* supervisor: slot; with descriptors: control, pool ledger, pool */
    FM_WIRE_HOLD = 3,                 /* engine, with its userfaultfd: to be held until the process has gone */
    FM_WIRE_REFUSED = 4               /* supervisor: wrong token or version, or the ledger is full */
};
#define FM_SLOT_ANY 0xffffffff
struct fm_wire {
    uint64_t magic;                   /* FM_CONTROL_MAGIC */
    uint32_t version;                 /* FM_CONTROL_VERSION */
    uint32_t kind;                    /* enum fm_wire_kind */
    uint32_t pid;                     /* in the engine's own pid namespace: for messages; SO_PEERCRED decides */
    uint32_t slot;
    uint8_t token[16];                /* FM_TOKEN_BYTES */
};
/* cdef ends */

#endif
