/* backend_host.h - what tests of a backend have instead of an engine: a clock, threads, the gate, and what is said. */
#ifndef FM_BACKEND_HOST_H
#define FM_BACKEND_HOST_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "backend.h"
#include "engine/sys.h"

#define AWAIT_NS 60000000000ull

extern atomic_uint gates;                                  /* how many are inside */
extern atomic_uint said;                                   /* how many messages, and the last */
extern char last_said[FM_MESSAGE_BYTES];

bool test_thread(void (*run)(void *), void *arg);
void say(int level, const char *text, uint64_t number);
void gate_in(void);
void gate_out(void);
void await(atomic_uint *what, uint32_t n);                 /* at least so many, or the test has failed */

#endif
