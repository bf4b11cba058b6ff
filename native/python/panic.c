/* panic.c - what a failed fm_assert() does in the Python extension and in agents: say
 * which, and abort.  libfarmem.so has its own. */
#include <stdio.h>
#include <stdlib.h>

#include "fm_assert.h"

_Noreturn void fm_panic(const char *what, const char *file, int line)
{
    fprintf(stderr, "farmem: internal error: %s does not hold (%s:%d)\n", what, file, line);
    abort();
}
