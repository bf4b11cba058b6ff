/* idle [MIB]: fills memory, says "ready", and touches it no more until it is told: each line on
 * stdin has every word checked, and is answered with "right". At the end of stdin all is
 * checked once more. Memory that nobody touches must go when the budget is lowered. */
#include "safety.h"

int main(int argc, char **argv)
{
    size_t bytes = (size_t)number(argc, argv, 1, 96) * MIB;
    char line[64];
    void *memory = map(bytes);
    fill(memory, bytes, 5);
    puts("ready");
    fflush(stdout);
    while (fgets(line, sizeof line, stdin) != NULL) {
        verify(memory, bytes, 5, "idle");
        puts("right");
        fflush(stdout);
    }
    verify(memory, bytes, 5, "idle at the end");
    puts("ok");
    return 0;
}
