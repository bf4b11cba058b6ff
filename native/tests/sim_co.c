/* sim_co.c - coroutines and chance.
 *
 * A step is one decision of who runs next.  Coroutines that wait for something are not chosen until it is there.
 */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "fm_assert.h"
#include "sim.h"

#define STACK_BYTES (128u << 10)

struct sim S;
static char stacks[CO_MAX][STACK_BYTES] __attribute__((aligned(64)));

static uint64_t splitmix(uint64_t *x)
{
    uint64_t z = (*x += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

void sim_seed(uint64_t seed)
{
    for (int i = 0; i < 4; i++)
        S.rnd[i] = splitmix(&seed);
}

static uint64_t rotate(uint64_t x, int k) { return x << k | x >> (64 - k); }

/* xoshiro256++ */
uint64_t sim_rnd(uint64_t below)
{
    uint64_t *s = S.rnd, r = rotate(s[0] + s[3], 23) + s[0], t = s[1] << 17;
    s[2] ^= s[0];
    s[3] ^= s[1];
    s[1] ^= s[2];
    s[0] ^= s[3];
    s[2] ^= t;
    s[3] = rotate(s[3], 45);
    return (uint64_t)(((unsigned __int128)r * below) >> 64);
}

/* Saves what the ABI says a call preserves, and goes on where `to` stopped. */
__attribute__((naked, noinline)) static void co_switch(void **from __attribute__((unused)), void *to __attribute__((unused)))
{
    __asm__("pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
            "movq %rsp, (%rdi)\n\tmovq %rsi, %rsp\n\t"
            "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\tret");
}

static void co_entry(void)
{
    S.co[S.cur].run(S.cur);
    sim_violation("a coroutine has ended");
}

void co_start(uint32_t id, void (*run)(uint32_t id))
{
    void **sp = (void **)(stacks[id] + STACK_BYTES);
    *--sp = NULL;                     /* keeps the stack aligned as a call would */
    *--sp = (void *)co_entry;
    for (int i = 0; i < 6; i++)
        *--sp = NULL;
    S.co[id] = (struct co){ .sp = sp, .run = run };
}

/* What holds things up is mostly to be seen here. */
static void stuck(void)
{
    const struct fm_core *c = S.core;
    uint32_t state[8] = { 0 }, marked[9] = { 0 };
    for (const struct fm_block *b = c->blocks; b != NULL; b = b->next)
        for (uint32_t i = 0; i < FM_BLOCK_PAGES; i++) {
            state[b->state[i]]++;
            for (uint32_t k = 0; k < 9 && b->state[i] == FM_RESIDENT; k++)
                marked[k] += b->flags[i] >> k & 1;
        }
    fprintf(stderr, "local %lld of %lld, frames", (long long)c->local_pages, (long long)c->limit_pages);
    for (uint32_t k = 0; k < FM_FRAME_KINDS; k++)
        fprintf(stderr, " %u", c->kind_n[k]);
    fprintf(stderr, ", states");
    for (uint32_t k = 0; k < 7; k++)
        fprintf(stderr, " %u", state[k]);
    fprintf(stderr, ", resident with flag");
    for (uint32_t k = 0; k < 9; k++)
        fprintf(stderr, " %u", marked[k]);
    fprintf(stderr, ", queue %llu, faults %u, events %u, changing %d, transfers %u\n",
            (unsigned long long)(c->queue_tail - c->queue_head), S.faults_n, S.events_n, S.changing, S.io_n);
    sim_violation("no progress: waiting for %s", S.waiting_for);
}

static bool can_run(const struct co *c) { return c->ready == NULL || c->ready(c->arg); }

void sim_wait(ready_fn ready, void *arg)
{
    uint32_t me = S.cur, k;
    S.co[me].ready = ready;
    S.co[me].arg = arg;
    for (uint64_t tries = 0;; tries++) {
        if (S.deadline != 0 && (++S.steps > S.deadline || tries > 1000000))
            stuck();
        if (S.deadline == 0 && tries > 10000000)
            sim_violation("nobody can run");
        k = (uint32_t)sim_rnd(CO_N);
        if ((k == me || S.co[k].sp != NULL) && can_run(&S.co[k]))
            break;
    }
    S.steps += S.deadline == 0;
    S.co[k].ready = NULL;
    if (k == me)
        return;
    S.cur = k;
    co_switch(&S.co[me].sp, S.co[k].sp);
}

void sim_yield(void) { sim_wait(NULL, NULL); }

void sim_point(void)
{
    if (sim_chance(S.calm))
        sim_yield();
}

void sim_trace(const char *what, uint64_t page, uint64_t n, uint64_t detail)
{
    if (S.watch < page || S.watch >= page + n)
        return;
    const struct fm_block *b = fm_block_find(S.core, S.watch);
    uint32_t i = (uint32_t)(S.watch % FM_BLOCK_PAGES);
    printf("%8llu %2u %-12s %4llu+%llu %#llx  there %d state %d flags %#x\n", (unsigned long long)S.steps, S.cur, what,
           (unsigned long long)(page - AS_BASE), (unsigned long long)n, (unsigned long long)detail,
           pte_of(S.watch)->phys != PHYS_NONE, b != NULL ? b->state[i] : -1, b != NULL ? b->flags[i] : 0);
}

void sim_violation(const char *format, ...)
{
    va_list args;
    fflush(stdout);
    fprintf(stderr, "VIOLATION: ");
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fprintf(stderr, "\n  at step %llu of seed %llu%s\n  replay: farmem-sim --seed %llu --steps %llu", (unsigned long long)S.steps,
            (unsigned long long)S.seed, S.depth > 0 ? ", in a forked child" : "", (unsigned long long)S.seed,
            (unsigned long long)S.steps_max);
    if (S.defect_name != NULL)
        fprintf(stderr, " --defect %s", S.defect_name);
    fprintf(stderr, "\n");
    if (getenv("FARMEM_SIM_ABORT") != NULL)
        abort();
    _exit(1);
}

_Noreturn void fm_panic(const char *what, const char *file, int line)
{
    sim_violation("assertion failed: %s (%s:%d)", what, file, line);
}

struct futex { uint32_t *word, seen; };
static bool futex_changed(void *arg)
{
    struct futex *f = arg;
    return *f->word != f->seen;
}

void fm_futex_wait(uint32_t *word, uint32_t seen, int64_t timeout_ns)
{
    struct futex f = { word, seen };
    (void)timeout_ns;
    sim_wait(futex_changed, &f);
}

void fm_futex_wake(uint32_t *word, int n)
{
    (void)word;
    (void)n;
}
