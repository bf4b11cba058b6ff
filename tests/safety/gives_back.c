/* gives_back FOLDER: has far more memory than its budget, gives it back in every way, and so
 * does a child that is killed. Says each step, and goes on when FOLDER/STEP is there: in
 * between somebody looks how much space the pool takes. */
#include "safety.h"

#define BYTES (64 * MIB)

static const char *folder;

static void step(const char *name)
{
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    puts(name);
    fflush(stdout);
    while (access(path, F_OK) != 0)
        pause_us(5000);
}

static void child_with_memory(int ready)
{
    void *memory = map(2 * BYTES);
    fill(memory, 2 * BYTES, 3);
    CHECK(write(ready, "x", 1) == 1);
    for (;;)
        pause();
}

int main(int argc, char **argv)
{
    int ends[2], status;
    char byte;
    CHECK(argc > 1 && pipe(ends) == 0);
    folder = argv[1];
    char *one = map(BYTES), *two = map(BYTES);
    fill(one, BYTES, 1);
    fill(two, BYTES, 2);
    step("away");
    CHECK(madvise(two, BYTES, MADV_DONTNEED) == 0);
    step("discarded");
    verify(one, BYTES, 1, "kept");
    verify_zero(two, BYTES, "discarded");
    CHECK(munmap(one, BYTES) == 0 && munmap(two, BYTES) == 0);
    step("unmapped");
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0)
        child_with_memory(ends[1]);
    CHECK(read(ends[0], &byte, 1) == 1);
    step("child");
    CHECK(kill(child, SIGKILL) == 0 && waitpid(child, &status, 0) == child);
    step("killed");
    puts("ok");
    return 0;
}
