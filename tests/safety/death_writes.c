/* death_writes pipe|socket exit|kill DEATHS: a dying program must not write zeros.
 * A child fills memory, lets most of it be evicted, and then several of its threads write
 * it, each to a pipe (or socket) of its own, straight from the missing pages. Meanwhile the
 * child ends by exit_group, or is killed from outside. When the last copy of a userfaultfd
 * is closed, missing pages read as zeros, even by a write() that is still under way:
 * whatever arrives here must be right, and it may only be too short. Each word tells by
 * itself whether it is right, so it doesn't matter how much arrives of it.
 * The parent, which reads, holds no memory to speak of: nothing of it is ever managed. */
#include "safety.h"
#include <poll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>

#define THREADS 4
#define BYTES (64 * MIB / SHRINK)
#define PIECE (256 * 1024ul)

static uint64_t *words;
static int sinks[THREADS];
static _Atomic size_t written;

static uint64_t self_checking(uint64_t index)
{
    return (index + 1) << 24 | ((index + 1) * 0x9e3779b97f4a7c15ull) >> 40;
}

static bool is_right(uint64_t word)
{
    return word != 0 && word == self_checking((word >> 24) - 1);
}

static void *writer(void *argument)
{
    size_t me = (size_t)argument, share = BYTES / THREADS;
    char *from = (char *)words + me * share;
    for (size_t at = 0; at < share; at += PIECE) {
        ssize_t put = write(sinks[me], from + at, PIECE);
        if (put <= 0)
            break;
        atomic_fetch_add(&written, (size_t)put);
    }
    pause();
    return NULL;
}

/* The child: never returns. */
static void be_written(bool by_exit, size_t until)
{
    struct rlimit none = {0, 0};
    setrlimit(RLIMIT_CORE, &none);
    signal(SIGPIPE, SIG_IGN);
    alarm(60);
    words = map(BYTES);
    for (size_t i = 0; i < BYTES / 8; i++)
        words[i] = self_checking(i);
    pthread_t id;
    for (size_t i = 0; i < THREADS; i++)
        CHECK(pthread_create(&id, NULL, writer, (void *)i) == 0);
    while (atomic_load(&written) < until)
        sched_yield();
    if (by_exit)
        syscall(SYS_exit_group, 0);
    for (;;)
        pause();
}

/* Reads what there is; ends the program with a word about a wrong one. */
static size_t drain(int fd, char *carry, size_t *carried)
{
    static uint64_t buffer[PIECE / 8 + 1];
    char *bytes = (char *)buffer;
    memcpy(bytes, carry, *carried);
    ssize_t got = read(fd, bytes + *carried, PIECE);
    if (got <= 0)
        return 0;
    size_t all = *carried + (size_t)got;
    for (size_t i = 0; i < all / 8; i++)
        if (!is_right(buffer[i]))
            die("a dying program wrote a wrong byte: want a word of the pattern, got %016" PRIx64, buffer[i]);
    *carried = all % 8;
    memcpy(carry, bytes + all - *carried, *carried);
    return (size_t)got;
}

static void make_sinks(bool sockets, int sources[THREADS])
{
    for (int i = 0; i < THREADS; i++) {
        int pair[2];
        CHECK((sockets ? socketpair(AF_UNIX, SOCK_STREAM, 0, pair) : pipe(pair)) == 0);
        sources[i] = pair[0];
        sinks[i] = pair[1];
        fcntl(pair[0], F_SETFD, FD_CLOEXEC);
    }
}

/* One death, and all that was heard from it. */
static size_t one_death(bool sockets, bool by_exit, size_t until, char **argv)
{
    int sources[THREADS];
    size_t heard = 0, carried[THREADS] = {0};
    char carry[THREADS][8], numbers[THREADS + 1][24];
    make_sinks(sockets, sources);
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        /* By exec, so that the child is a process like any other, not a fork's copy. */
        prctl(PR_SET_PDEATHSIG, SIGKILL); /* should the reader fail, nobody is left writing */
        char *args[THREADS + 5] = {argv[0], (char *)"child", argv[2], numbers[THREADS]};
        for (int i = 0; i < THREADS; i++) {
            snprintf(numbers[i], sizeof numbers[i], "%d", sinks[i]);
            args[4 + i] = numbers[i];
        }
        snprintf(numbers[THREADS], sizeof numbers[THREADS], "%zu", until);
        execv("/proc/self/exe", args);
        die("exec: %s", strerror(errno));
    }
    struct pollfd polled[THREADS];
    for (int i = 0; i < THREADS; i++) {
        close(sinks[i]);
        polled[i] = (struct pollfd){.fd = sources[i], .events = POLLIN};
    }
    for (int open_ones = THREADS; open_ones > 0;) {
        CHECK(poll(polled, THREADS, -1) > 0);
        for (int i = 0; i < THREADS; i++) {
            size_t got = polled[i].fd >= 0 && polled[i].revents ? drain(sources[i], carry[i], &carried[i]) : 1;
            heard += polled[i].fd >= 0 && polled[i].revents ? got : 0;
            if (got == 0) {
                polled[i].fd = -1;
                open_ones--;
            }
        }
        if (!by_exit && heard >= until)
            kill(child, SIGKILL);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child);
    if (by_exit ? !WIFEXITED(status) || WEXITSTATUS(status) != 0 : !WIFSIGNALED(status) || WTERMSIG(status) != SIGKILL)
        die("the child ended in a way of its own: status %x", status);
    for (int i = 0; i < THREADS; i++)
        close(sources[i]);
    return heard;
}

int main(int argc, char **argv)
{
    CHECK(argc > 3);
    if (strcmp(argv[1], "child") == 0) {
        CHECK(argc == 4 + THREADS);
        for (int i = 0; i < THREADS; i++)
            sinks[i] = (int)number(argc, argv, 4 + i, -1);
        be_written(strcmp(argv[2], "exit") == 0, (size_t)number(argc, argv, 3, 0));
    }
    bool sockets = strcmp(argv[1], "socket") == 0, by_exit = strcmp(argv[2], "exit") == 0;
    long deaths = number(argc, argv, 3, 10);
    size_t heard = 0;
    uint64_t state = 20240229;
    for (long i = 0; i < deaths; i++)
        heard += one_death(sockets, by_exit, MIB + random_next(&state) % (4 * MIB), argv);
    CHECK(heard > 0);
    printf("ok heard=%zu\n", heard);
    return 0;
}
