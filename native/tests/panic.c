/* panic.c - what a failed fm_assert() does in the C tests and in the simulator:
 * say which, and abort.  Weak, so that a test of assertions can bring its own. */
#include <stdio.h>
#include <stdlib.h>

#include "fm_assert.h"

__attribute__((weak)) _Noreturn void fm_panic(const char *what, const char *file, int line)
{
    fprintf(stderr, "assertion failed: %s (%s:%d)\n", what, file, line);
    abort();
}
