/* endless STOP: uses more memory than it may have until the file STOP exists, or it is
 * killed. Says "ready" when it is well under way. Every word that it meets is checked:
 * whatever happens around it, it must have the right bytes, or die. */
#include "safety.h"

#define BYTES (48 * MIB)

int main(int argc, char **argv)
{
    CHECK(argc > 1);
    char *memory = map(BYTES);
    bool said = false;
    pressure_start(BALLAST_BYTES);
    for (uint64_t round = 1; round < 20000; round++) {
        fill(memory, BYTES, round);
        verify(memory, BYTES, round, "endless");
        if (!said && atomic_load(&pressure.sweeps) >= 2) {
            said = true;
            puts("ready");
            fflush(stdout);
        }
        if (said && access(argv[1], F_OK) == 0)
            break;
    }
    pressure_stop();
    puts("ok");
    return 0;
}
