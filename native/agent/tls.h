/* tls.h - farmem-tls: TLS for the NBD connections of one job to one server, in a process of its own.
 *
 * Engine threads can host no TLS library, and few kernels have TLS. So an engine connects to our Unix socket and speaks plain
 * NBD; for each such connection we make one to the server, begin TLS there (NBD_OPT_STARTTLS), and pass on bytes both ways.
 * One thread; nothing here waits but epoll. The library is OpenSSL 3: Python's ssl, which speaks TLS on the control channel,
 * is the same, so both judge a certificate alike and name what is wrong with it alike.
 */
#ifndef FM_TLS_H
#define FM_TLS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>

#include <openssl/ssl.h>

#define TLS_BUFFER_BYTES (256u << 10)     /* each way: two of the engine's windows */
#define TLS_REASON_BYTES 512

/* The server, and what we show it. */
struct tls_server {
    SSL_CTX *context;
    const char *host;                 /* must stand in its certificate */
    const char *name;                 /* what messages call it */
    const char *folder;               /* of the certificates, for messages */
    struct sockaddr_storage address;
    socklen_t address_bytes;
};

struct tls_buffer {
    unsigned char *bytes;
    size_t start, end;
};

struct tls_connection;
struct tls_end {                      /* one of a connection's two sockets */
    struct tls_connection *of;
    int fd;                           /* -1: closed */
    uint32_t watched;                 /* what epoll was told; 0: nothing, and for the server's it is not in there */
};

enum tls_state { TLS_CONNECTING, TLS_GREETING, TLS_ASKING, TLS_HANDSHAKE, TLS_RELAY, TLS_OVER };

struct tls_connection {
    const struct tls_server *to;
    enum tls_state state;
    struct tls_end client, server;
    SSL *ssl;
    struct tls_buffer up, down;       /* client to server, server to client */
    unsigned char said[20];           /* what the server says before TLS */
    size_t said_bytes;
    unsigned char flags[4];           /* what we answered to its greeting, and the client must answer as well */
    size_t flags_bytes;               /* how many of them the client has */
    bool client_ended, server_ended;  /* no more bytes come from there */
    bool told_server;                 /* that no more come from us */
    bool broken;                      /* nothing can be sent to the server any more */
    bool answered;                    /* something has come through TLS */
    bool read_blocked_by_write, write_blocked;
    bool busy;                        /* there may be more to do though no socket has anything new */
    uint64_t give_up_ns;              /* when it must have got as far as TLS_RELAY */
    struct tls_connection *next, **at;
};

/* tls_context.c. NULL: *reason says why. */
SSL_CTX *tls_context(const char *folder, char *reason);
SSL *tls_session(const struct tls_server *server);                     /* that trusts nobody but this host; NULL: no memory */
void tls_why(const struct tls_server *server, SSL *ssl, char *reason); /* why its handshake, or a read after it, has failed */

/* tls_connection.c */
struct tls_connection *tls_accept(const struct tls_server *server, int client_fd);     /* NULL: no memory, no descriptor */
void tls_step(struct tls_connection *c, bool hung_up);  /* whenever a socket has something, or c->busy; may end in TLS_OVER */
void tls_give_up(struct tls_connection *c);
void tls_free(struct tls_connection *c);
uint32_t tls_wanted_of_client(const struct tls_connection *c);
uint32_t tls_wanted_of_server(const struct tls_connection *c);
uint64_t tls_now_ns(void);

/* tls_loop.c. Until nobody holds the leash's other end and no connection is left. */
int tls_serve(const struct tls_server *server, int listener, int leash);
void tls_failed(const char *what, const char *hint);   /* told once, until something has gone well */
void tls_went_well(void);

#endif
