/* nbd_server.h - an NBD server for test_nbd.c, which follows the protocol or breaks it where it is told to. */
#ifndef FM_NBD_SERVER_H
#define FM_NBD_SERVER_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "backend_host.h"
#include "backends/nbd.h"

#define EXTENTS 8u
#define EXTENT_BYTES (FM_EXTENT_SLOTS * (uint64_t)FM_PAGE_BYTES)
#define POOL_BYTES (EXTENTS * EXTENT_BYTES)

enum how {
    WELL,
    /* once, and well from then on: */
    BAD_MAGIC,
    STRUCTURED,           /* a structured reply, which was not negotiated */
    WRONG_COOKIE,
    COOKIE_ZERO,
    COOKIE_OF_ANOTHER,    /* in its place in the table, but of another request */
    OTHER_BYTES_FIRST,    /* rubbish where the data belongs, then the end */
    HALF_A_REPLY,
    HALF_THE_DATA,
    CLOSES,
    SHUTS_DOWN,           /* ESHUTDOWN, as a server says before it ends */
    BAD_HELLO,            /* the handshake: */
    BAD_REPLY_MAGIC,
    ENDLESS_INFOS,
    TOO_LONG_AN_INFO,
    NO_INFO,              /* ACK without saying what the export is */
    CLOSES_IN_HANDSHAKE,
    /* until told otherwise: */
    OUT_OF_ORDER,
    SILENT,
    SAYS_EIO,
    SAYS_STRANGE_ERROR,
    ONE_CONNECTION,
    UNKNOWN,
    WANTS_TLS,
    SMALLER,
    READ_ONLY
};

struct nbd_server {
    pthread_mutex_t lock;     /* of the bytes */
    char *bytes;
    int listener;
    struct fm_pool_server there;   /* how to reach it */
    atomic_int how;
    atomic_uint connections, trims, misbehaved;
    atomic_ulong trimmed_bytes;
};

extern struct nbd_server server;

/* Listens on a Unix socket. */
void server_open(uint64_t timeout_ns);
void server_stops_listening(void);
/* To or from its bytes. */
void server_copy(void *to, const void *from, size_t n);

#endif
