/* check.h - what the C tests share: a check that says what does not hold, and where. */
#ifndef FM_CHECK_H
#define FM_CHECK_H

#include <stdio.h>
#include <stdlib.h>

#define CHECK(x) ((x) ? (void)0 : (fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #x), exit(1)))

#endif
