/* nbd.h - what the parts of the NBD client share: nbd.c (requests), nbd_tender.c (deadlines, words, space given back),
 * nbd_connection.c (sending and receiving) and nbd_handshake.c (how a connection begins). */
#ifndef FM_NBD_H
#define FM_NBD_H

#include "backend.h"
#include "talk.h"

#define FM_NBD_CONNECTIONS 4u
#define FM_NBD_TRIM 0u                       /* the place of the one TRIM under way; behind it the others', by first frame */
#define FM_NBD_REQUESTS (FM_BACKEND_FRAMES_MAX + 1u)
#define FM_NBD_IO_TRIM 3u                    /* as io->kind, beside enum fm_io_kind */

/* What the protocol calls by numbers. */
enum {
    FM_NBD_FLAG_READ_ONLY = 1 << 1,
    FM_NBD_FLAG_SEND_TRIM = 1 << 5,
    FM_NBD_FLAG_CAN_MULTI_CONN = 1 << 8
};

struct fm_nbd_request {
    struct fm_io *io;                 /* NULL: none */
    uint64_t cookie;                  /* 0: it waits to be sent */
    uint64_t since_ns;                /* when it was asked for: the deadline counts from here, however often it is sent */
    uint32_t connection;
    uint32_t sent;                    /* to its last byte: no reply may come before that */
};

enum fm_nbd_state { FM_NBD_DOWN = 0, FM_NBD_UP, FM_NBD_CLOSING };

struct fm_nbd;

struct fm_nbd_connection {
    struct fm_nbd *server;
    int32_t fd;                       /* used by others than its reader while they hold sending */
    uint32_t state;                   /* enum fm_nbd_state; changed inside the server's lock */
    uint32_t sending;                 /* 1: somebody sends on it, which never takes long */
    uint32_t blocked;                 /* the kernel takes no more for now: the tender goes on */
    uint32_t in_flight;
    struct fm_nbd_request *out;       /* half sent */
    uint32_t out_bytes;
    uint64_t give_up_ns;              /* closing: how long its last replies are waited for */
};

/* A server, or rather an export. */
struct fm_nbd {
    struct fm_backend *b;
    struct fm_pool_server *server;
    const struct fm_pool_span *span;  /* its extents */
    fm_lock lock;                     /* of the queues, the requests and the states */
    struct fm_io *head[2], *tail[2];  /* fetches first: a thread of the program waits for each */
    struct fm_nbd_connection connection[FM_NBD_CONNECTIONS];
    uint64_t cookies;
    uint32_t outstanding;             /* requests, sent or not */
    uint32_t up;                      /* connections */
    uint32_t used;                    /* something was asked of it: it has threads, and connections are made */
    uint32_t started;                 /* the first connection's thread */
    uint64_t down_since_ns;           /* while none is up: since when nothing was answered */
    uint32_t gone;                    /* what was stored there can't be had any more */
    uint32_t flags;                   /* of the export; 0: not known yet */
    uint32_t trim_bell, trim_done;
    uint32_t trimmer;                 /* there is one */
    struct fm_talk talk;
    uint32_t requests_n;              /* none was ever at a place behind it */
    struct fm_nbd_request request[FM_NBD_REQUESTS];
};

/* By the server's number. */
extern struct fm_nbd fm_nbd[FM_POOL_SERVERS_MAX];

/* What is read by those who hold nothing, as a hint or to be looked at again. */
static inline uint32_t fm_nbd_load(const uint32_t *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
static inline void fm_nbd_store(uint32_t *p, uint32_t value) { __atomic_store_n(p, value, __ATOMIC_SEQ_CST); }
static inline bool fm_nbd_gone(const struct fm_nbd *n) { return fm_nbd_load(&n->gone) != 0; }

/* nbd.c */
struct fm_nbd_request *fm_nbd_take(struct fm_nbd_connection *c);      /* the next to be sent on c, or NULL */
bool fm_nbd_has_work(const struct fm_nbd_connection *c);
struct fm_nbd_request *fm_nbd_claim(struct fm_nbd_connection *c, uint64_t cookie);    /* NULL: nothing on c bears it */
void fm_nbd_end(struct fm_nbd_connection *c, struct fm_nbd_request *r, int32_t status);
void fm_nbd_came_up(struct fm_nbd_connection *c, uint32_t flags);
void fm_nbd_went_down(struct fm_nbd_connection *c);                   /* what was in flight on c is sent again */
bool fm_nbd_closing(struct fm_nbd_connection *c);                     /* false: it was not up any more */
bool fm_nbd_hopeless(const struct fm_nbd *n, uint64_t now);
bool fm_nbd_expired(const struct fm_nbd_request *r, const struct fm_nbd *n, uint64_t now);
uint64_t fm_nbd_oldest(const struct fm_nbd *n, uint64_t now);         /* since when the oldest request waits */
struct fm_io *fm_nbd_take_due(struct fm_nbd *n, uint64_t now);        /* a list, out of the books */
void fm_nbd_fail_all(struct fm_nbd *n, struct fm_io *io);
void fm_nbd_begin(struct fm_nbd *n);                                  /* have threads make connections, if there are none yet */

/* nbd_tender.c */
bool fm_nbd_tend(struct fm_nbd *n);                                   /* from now on; false: no thread can be had */
void fm_nbd_ring(void);                                               /* the tender */
void fm_nbd_say_lost(struct fm_nbd *n);
void fm_nbd_is_gone(struct fm_nbd *n, const char *why);
bool fm_nbd_trim_later(struct fm_nbd *n);                             /* false: nobody will */

/* nbd_connection.c */
bool fm_nbd_start(struct fm_nbd_connection *c);
void fm_nbd_pump(struct fm_nbd_connection *c);                        /* send what waits, as far as the kernel takes it */
void fm_nbd_hold(struct fm_nbd_connection *c);                        /* sending */
void fm_nbd_release(struct fm_nbd_connection *c);

/* nbd_handshake.c */
enum fm_nbd_answer { FM_NBD_READY = 0, FM_NBD_LATER, FM_NBD_GONE };
/* On a new socket.  FM_NBD_GONE: trying again is of no use, *why says why. */
enum fm_nbd_answer fm_nbd_handshake(int fd, const struct fm_pool_server *server, uint64_t pool_bytes, uint32_t *flags,
                                    const char **why);

#endif
