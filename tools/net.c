/* net.c - what `make bench-net` holds farmem against, and what it measures farmem with.
 *
 *     net serve                    a bare TCP server on loopback; prints its port, ends with its stdin
 *     net ping PORT BYTES COUNT    asks it for BYTES, COUNT times, one after the other
 *     net stream PORT BYTES        has it send BYTES in one go
 *     net touch ORDER MIB COUNT    touches MIB of memory a page at a time: random or sequential
 *
 * `ping` and `stream` are the least that a fetch over TCP can cost: a request of 28 bytes, an answer with 16
 * more than were asked for (as in NBD), and nothing else.  `touch` knows nothing of farmem: it fills its memory, then
 * reads COUNT pages with the clock on, and says how long they took and whether each held what it should.
 * One line of JSON goes to stdout.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define REQUEST_BYTES 28u
#define HEAD_BYTES 16u
#define PAGE_BYTES 4096u
#define CHUNK_BYTES (1u << 18)

static char chunk[CHUNK_BYTES];

static _Noreturn void fail(const char *what)
{
    fprintf(stderr, "net: %s: %s\n", what, strerror(errno));
    exit(1);
}

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * UINT64_C(1000000000) + (uint64_t)t.tv_nsec;
}

static bool send_all(int fd, const void *from, uint64_t bytes)
{
    for (uint64_t sent = 0; sent < bytes;) {
        ssize_t n = send(fd, (const char *)from + sent, bytes - sent, MSG_NOSIGNAL);
        if (n <= 0)
            return false;
        sent += (uint64_t)n;
    }
    return true;
}

static bool receive_all(int fd, void *to, uint64_t bytes)
{
    return recv(fd, to, bytes, MSG_WAITALL) == (ssize_t)bytes;
}

/* ---- the bare server */

static void *answer(void *arg)
{
    int fd = (int)(intptr_t)arg;
    char request[REQUEST_BYTES];
    while (receive_all(fd, request, sizeof request)) {
        uint64_t left;
        memcpy(&left, request, sizeof left);
        for (uint64_t n; left > 0; left -= n) {
            n = left < CHUNK_BYTES ? left : CHUNK_BYTES;
            if (!send_all(fd, chunk, n))
                break;
        }
    }
    close(fd);
    return NULL;
}

static void *accept_all(void *arg)
{
    int listener = (int)(intptr_t)arg, one = 1;
    for (;;) {
        pthread_t thread;
        int fd = accept(listener, NULL, NULL);
        if (fd < 0)
            fail("accept");
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        if (pthread_create(&thread, NULL, answer, (void *)(intptr_t)fd) != 0)
            fail("thread");
        pthread_detach(thread);
    }
    return NULL;
}

static int serve(void)
{
    struct sockaddr_in at = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    socklen_t bytes = sizeof at;
    pthread_t thread;
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    if (listener < 0 || bind(listener, (struct sockaddr *)&at, bytes) != 0 || listen(listener, 8) != 0 ||
        getsockname(listener, (struct sockaddr *)&at, &bytes) != 0)
        fail("listen");
    printf("%d\n", ntohs(at.sin_port));
    fflush(stdout);
    if (pthread_create(&thread, NULL, accept_all, (void *)(intptr_t)listener) != 0)
        fail("thread");
    while (read(0, chunk, 1) > 0)
        continue;
    return 0;
}

/* ---- its clients */

static int dial(const char *port)
{
    struct sockaddr_in at = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    int fd = socket(AF_INET, SOCK_STREAM, 0), one = 1;
    at.sin_port = htons((uint16_t)atoi(port));
    if (fd < 0 || connect(fd, (struct sockaddr *)&at, sizeof at) != 0)
        fail("connect");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    return fd;
}

static void ask(int fd, uint64_t bytes)
{
    char request[REQUEST_BYTES] = { 0 };
    memcpy(request, &bytes, sizeof bytes);
    if (!send_all(fd, request, sizeof request))
        fail("send");
}

static int ping(const char *port, uint64_t bytes, uint64_t count)
{
    int fd = dial(port);
    bytes += HEAD_BYTES;
    if (bytes > CHUNK_BYTES || count == 0)
        return 2;
    uint64_t began_ns = now_ns();
    for (uint64_t k = 0; k < count; k++) {
        ask(fd, bytes);
        if (!receive_all(fd, chunk, bytes))
            fail("receive");
    }
    printf("{\"ns\": %.1f}\n", (double)(now_ns() - began_ns) / (double)count);
    return 0;
}

static int stream(const char *port, uint64_t bytes)
{
    int fd = dial(port);
    uint64_t began_ns = now_ns();
    ask(fd, bytes);
    for (uint64_t got = 0; got < bytes;) {
        ssize_t n = recv(fd, chunk, CHUNK_BYTES, 0);
        if (n <= 0)
            fail("receive");
        got += (uint64_t)n;
    }
    printf("{\"bytes_per_s\": %.0f}\n", (double)bytes * 1e9 / (double)(now_ns() - began_ns));
    return 0;
}

/* ---- memory */

static uint64_t mix(uint64_t x)
{
    x = (x ^ (x >> 32)) * UINT64_C(0xd6e8feb86659fd93);
    x = (x ^ (x >> 32)) * UINT64_C(0xd6e8feb86659fd93);
    return x ^ (x >> 32);
}

static int touch(bool is_random, uint64_t mib, uint64_t count)
{
    uint64_t pages = mib << 8, words = PAGE_BYTES / sizeof(uint64_t), bad = 0;
    uint64_t *memory = mmap(NULL, mib << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        fail("mmap");
    madvise(memory, mib << 20, MADV_NOHUGEPAGE);
    for (uint64_t page = 0; page < pages; page++)
        for (uint64_t k = 0; k < words; k++)
            memory[page * words + k] = mix(page * words + k + 1);
    uint64_t began_ns = now_ns();
    for (uint64_t k = 0; k < count; k++) {
        uint64_t page = is_random ? (uint64_t)(((unsigned __int128)mix(k * 2 + 1) * pages) >> 64) : k % pages;
        bad += memory[page * words] != mix(page * words + 1);
    }
    printf("{\"ns\": %llu, \"bad\": %llu}\n", (unsigned long long)(now_ns() - began_ns), (unsigned long long)bad);
    return bad != 0;
}

int main(int argc, char **argv)
{
    const char *mode = argc > 1 ? argv[1] : "";
    if (strcmp(mode, "serve") == 0)
        return serve();
    if (strcmp(mode, "ping") == 0 && argc == 5)
        return ping(argv[2], strtoull(argv[3], NULL, 10), strtoull(argv[4], NULL, 10));
    if (strcmp(mode, "stream") == 0 && argc == 4)
        return stream(argv[2], strtoull(argv[3], NULL, 10));
    if (strcmp(mode, "touch") == 0 && argc == 5)
        return touch(strcmp(argv[2], "random") == 0, strtoull(argv[3], NULL, 10), strtoull(argv[4], NULL, 10));
    fprintf(stderr, "usage: net serve | ping PORT BYTES COUNT | stream PORT BYTES | touch random|sequential MIB COUNT\n");
    return 2;
}
