/* slow_child FOLDER: a daemon that a busy machine keeps from its first steps. The parent stops its child right after the
 * fork and ends; whoever runs the test lets the child go on. Then it uses more memory than it may have, and checks it. */
#include "safety.h"

#define BYTES (96 * MIB)

int main(int argc, char **argv)
{
    CHECK(argc > 1);
    pid_t child = fork();
    CHECK(child >= 0);
    if (child > 0) {
        CHECK(kill(child, SIGSTOP) == 0);
        char path[4096];
        snprintf(path, sizeof path, "%s/child", argv[1]);
        FILE *file = fopen(path, "w");
        CHECK(file != NULL && fprintf(file, "%d", child) > 0 && fclose(file) == 0);
        _exit(0);
    }
    char *memory = map(BYTES);
    for (uint64_t round = 1; round < 4; round++) {
        fill(memory, BYTES, round);
        verify(memory, BYTES, round, "slow child");
    }
    puts("ok");
    return 0;
}
