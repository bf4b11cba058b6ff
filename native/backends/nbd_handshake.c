/* nbd_handshake.c - how a connection to an NBD server begins: fixed newstyle, and NBD_OPT_GO for one export.
 *
 * Nothing is negotiated that we don't need: no structured replies; TLS is an agent's business (native/agent).  Every field
 * that is read is checked; the socket has a time limit, and so is the number of things that a server may say here.
 * farmem/nbd.py asked the same before the program started, so what fails here has changed since.
 */
#include <errno.h>
#include <stddef.h>
#include <sys/socket.h>

#include "engine/sys.h"
#include "nbd.h"

#define MAGIC_SERVER 0x4e42444d41474943ull     /* "NBDMAGIC" */
#define MAGIC_OPTION 0x49484156454f5054ull     /* "IHAVEOPT" */
#define MAGIC_REPLY 0x0003e889045565a9ull
#define FIXED_NEWSTYLE 1u
#define NO_ZEROES 2u
#define OPT_GO 7u
#define REP_ACK 1u
#define REP_INFO 3u
#define REP_ERROR 0x80000000u
#define REP_TLS_REQD 0x80000005u
#define REP_UNKNOWN 0x80000006u
#define INFO_EXPORT 0u
#define INFO_BLOCK_SIZE 3u
#define REPLIES_MAX 32
#define REPLY_BYTES_MAX 8192u                  /* an error's text may be that long */
#define WINDOW_BYTES (FM_WINDOW_MAX * FM_PAGE_BYTES)

struct hello {
    uint64_t magic, option;
    uint16_t flags;
} __attribute__((packed));

struct option {
    uint64_t magic;
    uint32_t option, bytes, name_bytes;
} __attribute__((packed));

struct option_end {
    uint16_t infos, block_size;
} __attribute__((packed));

struct option_reply {
    uint64_t magic;
    uint32_t option, kind, bytes;
} __attribute__((packed));

union info {
    char any[256];
    struct {
        uint16_t kind;
        uint64_t bytes;
        uint16_t flags;
    } __attribute__((packed)) export;
    struct {
        uint16_t kind;
        uint32_t least, preferred, most;
    } __attribute__((packed)) block;
};

static bool receive_all(int fd, void *to, uint64_t bytes)
{
    for (uint64_t got = 0; got < bytes;) {
        long r = fm_sys(SYS_recvfrom, fd, (char *)to + got, bytes - got, 0, NULL, NULL);
        if (r == 0 || (r < 0 && r != -EINTR))
            return false;
        got += r > 0 ? (uint64_t)r : 0;
    }
    return true;
}

static bool skip(int fd, uint32_t bytes)
{
    char waste[256];
    for (uint32_t n; bytes > 0; bytes -= n) {
        n = bytes < sizeof waste ? bytes : (uint32_t)sizeof waste;
        if (!receive_all(fd, waste, n))
            return false;
    }
    return true;
}

static bool send_all(int fd, const void *from, uint64_t bytes)
{
    for (uint64_t sent = 0; sent < bytes;) {
        long r = fm_sys(SYS_sendto, fd, (const char *)from + sent, bytes - sent, MSG_NOSIGNAL, NULL, 0);
        if (r <= 0 && r != -EINTR)
            return false;
        sent += r > 0 ? (uint64_t)r : 0;
    }
    return true;
}

static bool ask(int fd, const struct fm_pool_server *s, bool no_zeroes)
{
    uint32_t client = __builtin_bswap32(FIXED_NEWSTYLE | (no_zeroes ? NO_ZEROES : 0));
    struct option o = { __builtin_bswap64(MAGIC_OPTION), __builtin_bswap32(OPT_GO),
                        __builtin_bswap32(4 + s->export_bytes + (uint32_t)sizeof(struct option_end)),
                        __builtin_bswap32(s->export_bytes) };
    struct option_end end = { __builtin_bswap16(1), __builtin_bswap16(INFO_BLOCK_SIZE) };
    return s->export_bytes <= sizeof s->export_name && send_all(fd, &client, sizeof client) && send_all(fd, &o, sizeof o) &&
           send_all(fd, s->export_name, s->export_bytes) && send_all(fd, &end, sizeof end);
}

static const char *refusal(uint32_t kind)
{
    switch (kind) {
    case REP_UNKNOWN: return "no longer has our export (was it started anew?)";
    case REP_TLS_REQD: return "wants TLS by now";
    default: return NULL;
    }
}

/* True: go on.  The export is fit for us, or *why is set. */
static bool learn(const union info *i, uint32_t bytes, uint64_t pool_bytes, uint32_t *flags, bool *known, const char **why)
{
    uint16_t kind = bytes >= sizeof kind ? __builtin_bswap16(i->export.kind) : 0xffff;
    if (kind == INFO_EXPORT && bytes == sizeof i->export) {
        *known = true;
        *flags = __builtin_bswap16(i->export.flags);
        if (__builtin_bswap64(i->export.bytes) < pool_bytes)
            *why = "has made our export smaller";
        else if ((*flags & FM_NBD_FLAG_READ_ONLY) != 0)
            *why = "has made our export read-only";
        return true;
    }
    if (kind == INFO_BLOCK_SIZE && bytes == sizeof i->block) {
        if (__builtin_bswap32(i->block.least) > FM_PAGE_BYTES || __builtin_bswap32(i->block.most) < WINDOW_BYTES)
            *why = "takes no requests of 4 to 128 KiB any more";
        return true;
    }
    return kind != INFO_EXPORT && kind != INFO_BLOCK_SIZE && kind != 0xffff;
}

enum fm_nbd_answer fm_nbd_handshake(int fd, const struct fm_pool_server *server, uint64_t pool_bytes, uint32_t *flags,
                                    const char **why)
{
    struct hello h;
    bool known = false;
    *why = NULL;
    if (!receive_all(fd, &h, sizeof h) || __builtin_bswap64(h.magic) != MAGIC_SERVER ||
        __builtin_bswap64(h.option) != MAGIC_OPTION || (__builtin_bswap16(h.flags) & FIXED_NEWSTYLE) == 0 ||
        !ask(fd, server, (__builtin_bswap16(h.flags) & NO_ZEROES) != 0))
        return FM_NBD_LATER;
    for (int k = 0; k < REPLIES_MAX; k++) {
        struct option_reply r;
        union info i;
        if (!receive_all(fd, &r, sizeof r) || __builtin_bswap64(r.magic) != MAGIC_REPLY || __builtin_bswap32(r.option) != OPT_GO)
            return FM_NBD_LATER;
        uint32_t kind = __builtin_bswap32(r.kind), bytes = __builtin_bswap32(r.bytes);
        if (kind == REP_ACK)
            return bytes != 0 || !known ? FM_NBD_LATER : *why != NULL ? FM_NBD_GONE : FM_NBD_READY;
        if ((kind & REP_ERROR) != 0) {
            *why = refusal(kind);
            return *why != NULL ? FM_NBD_GONE : FM_NBD_LATER;
        }
        if (kind != REP_INFO || bytes > REPLY_BYTES_MAX)
            return FM_NBD_LATER;
        uint32_t head = bytes < sizeof i ? bytes : (uint32_t)sizeof i;
        if (!receive_all(fd, &i, head) || !skip(fd, bytes - head) || !learn(&i, bytes, pool_bytes, flags, &known, why))
            return FM_NBD_LATER;
    }
    return FM_NBD_LATER;
}
