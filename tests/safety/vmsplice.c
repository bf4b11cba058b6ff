/* vmsplice pipe|zerocopy [ROUNDS]: others may still be reading a page that has been evicted.
 * Pages are lent to pipes (vmsplice) or to the network (MSG_ZEROCOPY, over loopback, more
 * than the receiver takes at once), then evicted, while much else comes and goes in the
 * frames that this sets free. What comes out at the other end must be what the program
 * lent: it never changed it. */
#include "safety.h"
#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>

#ifndef SO_ZEROCOPY
#define SO_ZEROCOPY 60
#endif
#ifndef MSG_ZEROCOPY
#define MSG_ZEROCOPY 0x4000000
#endif
#define PIPES 16
#define PIPE_BYTES (256 * 1024ul)
#define BYTES (PIPES * PIPE_BYTES)
#define SEND_BYTES (2 * MIB)

static uint64_t incoming[8192];

/* Reads `bytes` from fd and checks them against the pattern from word `first` on. */
static void expect(int fd, size_t bytes, uint64_t seed, size_t first, const char *what)
{
    char *into = (char *)incoming;
    while (bytes > 0) {
        size_t have = 0, wanted = bytes < sizeof incoming ? bytes : sizeof incoming;
        while (have < wanted) {
            ssize_t got = read(fd, into + have, wanted - have);
            if (got <= 0)
                die("%s: read: %s", what, got < 0 ? strerror(errno) : "end of file");
            have += (size_t)got;
        }
        verify_from(incoming, wanted, seed, first, what);
        first += wanted / 8;
        bytes -= wanted;
    }
}

static size_t by_pipe(char *memory, uint64_t seed)
{
    int ends[PIPES][2];
    size_t lent[PIPES] = {0};
    fill(memory, BYTES, seed);
    for (int i = 0; i < PIPES; i++) {
        CHECK(pipe(ends[i]) == 0);
        fcntl(ends[i][1], F_SETPIPE_SZ, (int)PIPE_BYTES);
        struct iovec part = {memory + (size_t)i * PIPE_BYTES, PIPE_BYTES};
        ssize_t put = vmsplice(ends[i][1], &part, 1, SPLICE_F_NONBLOCK);
        if (put <= 0)
            unsupported("vmsplice");
        lent[i] = (size_t)put;
    }
    size_t away = pressure_until_away(memory, BYTES, 4);
    pressure_wait(2);
    for (int i = 0; i < PIPES; i++) {
        expect(ends[i][0], lent[i], seed, (size_t)i * PIPE_BYTES / 8, "from the pipe");
        close(ends[i][0]);
        close(ends[i][1]);
    }
    verify(memory, BYTES, seed, "what was lent to pipes");
    return away;
}

static void connect_both(int *sender, int *receiver)
{
    int listener = socket(AF_INET, SOCK_STREAM, 0), small = 64 * 1024, big = 8 * (int)MIB, one = 1;
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t size = sizeof at;
    CHECK(listener >= 0 && setsockopt(listener, SOL_SOCKET, SO_RCVBUF, &small, sizeof small) == 0);
    CHECK(bind(listener, (struct sockaddr *)&at, sizeof at) == 0 && listen(listener, 1) == 0);
    CHECK(getsockname(listener, (struct sockaddr *)&at, &size) == 0);
    *sender = socket(AF_INET, SOCK_STREAM, 0);
    CHECK(*sender >= 0);
    setsockopt(*sender, SOL_SOCKET, SO_SNDBUF, &big, sizeof big);
    setsockopt(*sender, SOL_SOCKET, SO_SNDBUFFORCE, &big, sizeof big);
    if (setsockopt(*sender, SOL_SOCKET, SO_ZEROCOPY, &one, sizeof one) != 0)
        unsupported("SO_ZEROCOPY");
    CHECK(connect(*sender, (struct sockaddr *)&at, sizeof at) == 0);
    *receiver = accept(listener, NULL, NULL);
    CHECK(*receiver >= 0);
    close(listener);
}

static size_t by_socket(char *memory, uint64_t seed)
{
    int sender, receiver;
    size_t sent = 0;
    connect_both(&sender, &receiver);
    fill(memory, SEND_BYTES, seed);
    while (sent < SEND_BYTES) {
        ssize_t put = send(sender, memory + sent, SEND_BYTES - sent, MSG_ZEROCOPY | MSG_DONTWAIT);
        if (put < 0 && (errno == EAGAIN || errno == ENOBUFS))
            break;
        CHECK(put > 0);
        sent += (size_t)put;
    }
    if (sent < SEND_BYTES / 8)
        unsupported("lending enough with MSG_ZEROCOPY");
    size_t away = pressure_until_away(memory, SEND_BYTES, 4);
    pressure_wait(2);
    expect(receiver, sent, seed, 0, "from the socket");
    verify(memory, SEND_BYTES, seed, "what was lent to a socket");
    close(sender);
    close(receiver);
    return away;
}

int main(int argc, char **argv)
{
    CHECK(argc > 1);
    long rounds = number(argc, argv, 2, 3);
    size_t away = 0;
    char *memory = map(BYTES);
    pressure_start(BALLAST_BYTES);
    pressure_wait(1);
    for (long round = 0; round < rounds; round++) {
        uint64_t seed = 50 + (uint64_t)round;
        away += strcmp(argv[1], "pipe") == 0 ? by_pipe(memory, seed) : by_socket(memory, seed);
    }
    pressure_stop();
    printf("ok away=%zu\n", away);
    return 0;
}
