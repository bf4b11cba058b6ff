/* backend_host.c - see backend_host.h. */
#include "backend_host.h"

#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "check.h"

atomic_uint gates, said;
char last_said[FM_MESSAGE_BYTES];

uint64_t fm_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

void fm_sleep_ns(uint64_t ns) { usleep((useconds_t)(ns / 1000)); }

struct start {
    void (*run)(void *);
    void *arg;
};

static void *run_thread(void *at)
{
    struct start s = *(struct start *)at;
    free(at);
    s.run(s.arg);
    return NULL;
}

bool test_thread(void (*run)(void *), void *arg)
{
    pthread_t id;
    struct start *s = malloc(sizeof *s);
    *s = (struct start){ run, arg };
    return pthread_create(&id, NULL, run_thread, s) == 0 && pthread_detach(id) == 0;
}

void say(int level, const char *text, uint64_t number)
{
    (void)level, (void)number;
    snprintf(last_said, sizeof last_said, "%s", text);
    atomic_fetch_add(&said, 1);
}

void gate_in(void) { atomic_fetch_add(&gates, 1); }
void gate_out(void) { atomic_fetch_sub(&gates, 1); }

void await(atomic_uint *what, uint32_t n)
{
    uint64_t begin = fm_now_ns();
    while (atomic_load(what) < n) {
        CHECK(fm_now_ns() - begin < AWAIT_NS);
        sched_yield();
    }
}
