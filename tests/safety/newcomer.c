/* newcomer GO: fills memory, has it sent away by filling more, says "ready", and waits for the file GO. Then
 * it fills other memory, and checks every word of that, twice over; what it had before it does not touch. */
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
    char *fresh = map(BYTES);
    fill(fresh, BYTES, 3);
    verify(fresh, BYTES, 3, "filled since");
    verify(fresh, BYTES, 3, "filled since, again");
    CHECK(write(1, ok, sizeof ok - 1) == sizeof ok - 1);
    _exit(0);
}
