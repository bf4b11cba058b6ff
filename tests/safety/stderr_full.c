/* stderr_full: fills the stderr that it was given, a pipe that nobody reads yet, to the
 * brim, makes it blocking again, and then uses memory. An engine that writes a line to
 * this stderr waits for ever, and with it whoever waits for a page. */
#include "safety.h"

#define BYTES (40 * MIB)

int main(void)
{
    char dots[256];
    memset(dots, '.', sizeof dots);
    int flags = fcntl(2, F_GETFL);
    CHECK(flags >= 0 && fcntl(2, F_SETFL, flags | O_NONBLOCK) == 0);
    while (write(2, dots, sizeof dots) > 0)
        ;
    while (write(2, dots, 1) > 0)
        ;
    CHECK(fcntl(2, F_SETFL, flags) == 0);
    char *memory = map(BYTES);
    pressure_start(BALLAST_BYTES);
    for (uint64_t round = 1; round < 4; round++) {
        fill(memory, BYTES, round);
        pressure_wait(2);
        verify(memory, BYTES, round, "with stderr full");
    }
    pressure_stop();
    puts("ok");
    fflush(stdout);
    return 0;
}
