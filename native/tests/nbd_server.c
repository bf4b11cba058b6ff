/* nbd_server.c - see nbd_server.h.  A thread for each connection; replies come at once, unless they are to be out of order. */
#include "nbd_server.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include "check.h"

#define HELD_MAX 8u

struct nbd_server server = { .lock = PTHREAD_MUTEX_INITIALIZER };

void server_copy(void *to, const void *from, size_t n)
{
    pthread_mutex_lock(&server.lock);
    memcpy(to, from, n);
    pthread_mutex_unlock(&server.lock);
}

static bool is_how(enum how h) { return atomic_load(&server.how) == (int)h; }

static bool once(enum how h)
{
    int was = (int)h;
    bool mine = atomic_compare_exchange_strong(&server.how, &was, WELL);
    if (mine)
        atomic_fetch_add(&server.misbehaved, 1);
    return mine;
}

static bool get(int fd, void *to, size_t n) { return n == 0 || recv(fd, to, n, MSG_WAITALL) == (ssize_t)n; }
static bool put(int fd, const void *from, size_t n) { return send(fd, from, n, MSG_NOSIGNAL) == (ssize_t)n; }

static bool put_number(int fd, uint64_t value, uint32_t bytes)
{
    unsigned char b[8];
    for (uint32_t k = 0; k < bytes; k++)
        b[k] = (unsigned char)(value >> (8 * (bytes - 1 - k)));
    return put(fd, b, bytes);
}

static uint64_t number_at(const unsigned char *b, uint32_t bytes)
{
    uint64_t value = 0;
    for (uint32_t k = 0; k < bytes; k++)
        value = value << 8 | b[k];
    return value;
}

static bool put_option_reply(int fd, uint32_t kind, uint32_t bytes)
{
    uint64_t magic = once(BAD_REPLY_MAGIC) ? 1 : 0x0003e889045565a9ull;
    return put_number(fd, magic, 8) && put_number(fd, 7, 4) && put_number(fd, kind, 4) && put_number(fd, bytes, 4);
}

static bool put_export(int fd)
{
    uint64_t bytes = is_how(SMALLER) ? POOL_BYTES - 1 : POOL_BYTES;
    uint32_t flags = 1 | FM_NBD_FLAG_SEND_TRIM | (is_how(ONE_CONNECTION) ? 0 : FM_NBD_FLAG_CAN_MULTI_CONN);
    flags |= is_how(READ_ONLY) ? FM_NBD_FLAG_READ_ONLY : 0;
    return put_option_reply(fd, 3, 12) && put_number(fd, 0, 2) && put_number(fd, bytes, 8) && put_number(fd, flags, 2);
}

static bool shake_hands(int fd)
{
    unsigned char head[4 + 16 + 4], name[256];
    if (!put_number(fd, once(BAD_HELLO) ? 5 : 0x4e42444d41474943ull, 8) || !put_number(fd, 0x49484156454f5054ull, 8) ||
        !put_number(fd, 3, 2) || !get(fd, head, sizeof head))
        return false;
    uint64_t name_bytes = number_at(head + 20, 4), rest = number_at(head + 16, 4) - 4 - name_bytes;
    CHECK(number_at(head, 4) == 3 && number_at(head + 4, 8) == 0x49484156454f5054ull && number_at(head + 12, 4) == 7);
    CHECK(name_bytes == server.there.export_bytes && get(fd, name, name_bytes));
    CHECK(memcmp(name, server.there.export_name, name_bytes) == 0);
    CHECK(rest == 4 && get(fd, name, rest));
    if (once(CLOSES_IN_HANDSHAKE))
        return false;
    if (is_how(UNKNOWN) || is_how(WANTS_TLS)) {
        put_option_reply(fd, is_how(UNKNOWN) ? 0x80000006u : 0x80000005u, 4);
        put(fd, "text", 4);
        return false;
    }
    for (bool endless = once(ENDLESS_INFOS); endless;)
        endless = put_option_reply(fd, 3, 4) && put(fd, "\0\7hm", 4);
    if (once(TOO_LONG_AN_INFO))
        put_option_reply(fd, 3, 0x7fffffff);
    /* An info that is longer than ours, and not known to us: to be passed over. */
    char longer[1000] = { 0, 9 };
    return put_option_reply(fd, 3, sizeof longer) && put(fd, longer, sizeof longer) && (once(NO_INFO) || put_export(fd)) &&
           put_option_reply(fd, 1, 0);
}

struct asked {
    uint16_t kind;
    uint64_t cookie, at;
    uint32_t bytes;
};

static bool get_request(int fd, struct asked *a)
{
    unsigned char head[28];
    if (!get(fd, head, sizeof head))
        return false;
    *a = (struct asked){ (uint16_t)number_at(head + 6, 2), number_at(head + 8, 8), number_at(head + 16, 8),
                         (uint32_t)number_at(head + 24, 4) };
    CHECK(number_at(head, 4) == 0x25609513u && number_at(head + 4, 2) == 0 && a->at + a->bytes <= POOL_BYTES);
    if (a->kind == 4) {
        pthread_mutex_lock(&server.lock);
        memset(server.bytes + a->at, 0, a->bytes);
        pthread_mutex_unlock(&server.lock);
        atomic_fetch_add(&server.trimmed_bytes, a->bytes);
        atomic_fetch_add(&server.trims, 1);
    }
    if (a->kind != 1)
        return true;
    static _Thread_local char data[FM_WINDOW_MAX * FM_PAGE_BYTES];
    if (!get(fd, data, a->bytes))
        return false;
    server_copy(server.bytes + a->at, data, a->bytes);
    return true;
}

static bool put_reply(int fd, const struct asked *a)
{
    uint64_t magic = once(BAD_MAGIC) ? 0x12345678u : once(STRUCTURED) ? 0x668e33efu : 0x67446698u, cookie = a->cookie;
    uint32_t error = is_how(SAYS_EIO) ? EIO : is_how(SAYS_STRANGE_ERROR) ? 4711 : once(SHUTS_DOWN) ? 108 : 0;
    char rubbish[100];
    memset(rubbish, 0xa5, sizeof rubbish);
    if (once(CLOSES))
        return false;
    if (once(WRONG_COOKIE))
        cookie ^= 1ull << 40;
    if (once(COOKIE_ZERO))
        cookie = 0;
    if (once(COOKIE_OF_ANOTHER))
        cookie = (cookie & ~0xffffull) | ((cookie + 1) & 0xffff);
    if (once(HALF_A_REPLY))
        return put_number(fd, magic, 4) && put_number(fd, error, 4) && false;
    if (!put_number(fd, magic, 4) || !put_number(fd, error, 4) || !put_number(fd, cookie, 8))
        return false;
    if (a->kind != 0 || error != 0)
        return true;
    if (once(OTHER_BYTES_FIRST))
        return put(fd, rubbish, sizeof rubbish) && false;
    static _Thread_local char data[FM_WINDOW_MAX * FM_PAGE_BYTES];
    server_copy(data, server.bytes + a->at, a->bytes);
    if (once(HALF_THE_DATA))
        return put(fd, data, a->bytes / 2) && false;
    return put(fd, data, a->bytes);
}

static bool answer(int fd, struct asked *held, uint32_t *n)
{
    struct timeval quick = { .tv_usec = 20000 }, slow = { 0 };
    bool keep = is_how(OUT_OF_ORDER);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, keep ? &quick : &slow, sizeof quick);
    char peek;
    ssize_t r = recv(fd, &peek, 1, MSG_PEEK);
    if (r == 0 || (r < 0 && errno != EAGAIN))
        return false;
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &slow, sizeof slow);
    if (r == 1 && !get_request(fd, &held[*n]))
        return false;
    *n += r == 1;
    if (is_how(SILENT)) {
        *n = 0;
        return true;
    }
    if (keep && r == 1 && *n < HELD_MAX)
        return true;
    while (*n > 0)
        if (!put_reply(fd, &held[--*n]))
            return false;
    return true;
}

static void serve_one(void *arg)
{
    int fd = (int)(intptr_t)arg;
    struct asked held[HELD_MAX];
    uint32_t n = 0;
    if (shake_hands(fd)) {
        atomic_fetch_add(&server.connections, 1);
        while (answer(fd, held, &n))
            continue;
    }
    close(fd);
}

static void serve_all(void *arg)
{
    (void)arg;
    for (;;) {
        int fd = accept4(server.listener, NULL, NULL, SOCK_CLOEXEC);
        CHECK(fd >= 0 && test_thread(serve_one, (void *)(intptr_t)fd));
    }
}

void server_open(uint64_t timeout_ns)
{
    struct sockaddr_un a = { .sun_family = AF_UNIX };
    server.bytes = mmap(NULL, POOL_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    server.listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    snprintf(a.sun_path, sizeof a.sun_path, "/tmp/farmem-test-nbd-%d", (int)getpid());
    unlink(a.sun_path);
    CHECK(server.bytes != MAP_FAILED && bind(server.listener, (struct sockaddr *)&a, sizeof a) == 0);
    memcpy(server.there.address, &a, sizeof a);
    server.there.address_bytes = sizeof a;
    server.there.timeout_ns = timeout_ns;
    snprintf(server.there.name, sizeof server.there.name, "the-test:1");
    server.there.export_bytes = (uint32_t)snprintf(server.there.export_name, sizeof server.there.export_name, "a secret");
    CHECK(listen(server.listener, 16) == 0 && test_thread(serve_all, NULL));
}

void server_stops_listening(void)
{
    struct sockaddr_un a;
    memcpy(&a, server.there.address, sizeof a);
    unlink(a.sun_path);
}
