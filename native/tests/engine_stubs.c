/* engine_stubs.c - what engine/uffd.c asks of the rest of the engine, for the tests that link it alone. */
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "engine/engine.h"
#include "engine_stubs.h"

struct fm_engine fm;
int status_when_ended = 1;

void fm_say(int level, const char *text, uint64_t number) { fprintf(stderr, "%d: %s %lu\n", level, text, (unsigned long)number); }
_Noreturn void fm_end_program(void) { _exit(status_when_ended); }
void *fm_heap_take(uint64_t bytes) { return calloc(1, bytes); }
void fm_heap_give(void *p, uint64_t bytes) { (void)bytes, free(p); }
void fm_evictor_ring(void) {}
void fm_sleep_ns(uint64_t ns) { usleep((useconds_t)(ns / 1000)); }
bool fm_region_called(void) { return false; }
bool fm_front_thread_later(uint64_t page) { (void)page; return false; }
uint64_t fm_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}
