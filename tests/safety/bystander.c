/* bystander STOP: fills memory, has it sent away by touching other memory, says "ready", and from
 * then on touches none of what is away until the file STOP exists. Whatever becomes of the pool
 * meanwhile is nothing to it. */
#include "safety.h"

#define BYTES (48 * MIB)

int main(int argc, char **argv)
{
    static const char ready[] = "ready\n", ok[] = "ok\n";
    struct timespec moment = {.tv_nsec = 20000000};
    CHECK(argc > 1);
    char *memory = map(BYTES), *other = map(BYTES);
    fill(memory, BYTES, 1);
    fill(other, BYTES, 2);
    CHECK(write(1, ready, sizeof ready - 1) == sizeof ready - 1);
    while (access(argv[1], F_OK) != 0)
        nanosleep(&moment, NULL);
    CHECK(write(1, ok, sizeof ok - 1) == sizeof ok - 1);
    _exit(0);
}
