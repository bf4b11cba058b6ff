/* closefrom range|loop|dup2 early|late: a program that closes every descriptor it finds, or
 * puts its own file over each of them, as daemons and shells do; before memory is short
 * (early) or when pages are already away (late).  Its memory must not care, nor a child's. */
#include "safety.h"

#define BYTES (40 * MIB / SHRINK)

static void close_all(const char *how)
{
    if (strcmp(how, "range") == 0) {
        if (syscall(__NR_close_range, 3u, ~0u, 0u) != 0)
            unsupported("close_range");
    } else if (strcmp(how, "loop") == 0) {
        for (int fd = 3; fd < 4096; fd++)
            close(fd);
    } else {
        int null = open("/dev/null", O_RDWR);
        CHECK(null >= 0);
        for (int fd = 3; fd < 1024; fd++)
            CHECK(fd == null || dup2(null, fd) == fd);
    }
}

int main(int argc, char **argv)
{
    CHECK(argc > 2);
    char *memory = map(BYTES);
    if (strcmp(argv[2], "early") == 0)
        close_all(argv[1]);
    pressure_start(BALLAST_BYTES);
    fill(memory, BYTES, 1);
    size_t away = pressure_until_away(memory, BYTES / 2, 3);
    if (strcmp(argv[2], "late") == 0)
        close_all(argv[1]);
    for (uint64_t round = 1; round < 4; round++) {
        verify(memory, BYTES, round, "after every descriptor was closed");
        fill(memory, BYTES, round + 1);
        pressure_wait(1);
        close_all(argv[1]);
    }
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        close_all(argv[1]);
        verify(memory, BYTES, 4, "child, after every descriptor was closed");
        _exit(0);
    }
    reap_ok(child, "child");
    verify(memory, BYTES, 4, "at the end");
    pressure_stop();
    printf("ok away=%zu\n", away);
    return 0;
}
