/* sim.c - farmem-sim: the seeds, the phases of a run, and the command line.
 *
 * A run is a stretch of chance, then a calm end in which nothing fails any more: every thread must get on,
 * and every byte is looked at.  A seed decides everything, the kind of the run included.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "sim.h"

#define DRAIN_STEPS 4000000ull

struct named { const char *name; uint64_t core, sim; };
static const struct named defects[] = {
    { "copy_pinned", FM_DEFECT_COPY_PINNED, 0 },
    { "ignore_remove", FM_DEFECT_IGNORE_REMOVE, 0 },
    { "remove_is_fresh", FM_DEFECT_REMOVE_IS_FRESH, 0 },
    { "ignore_unmap", FM_DEFECT_IGNORE_UNMAP, 0 },
    { "ignore_remap", FM_DEFECT_IGNORE_REMAP, 0 },
    { "reuse_shared_frames", FM_DEFECT_REUSE_SHARED_FRAMES, 0 },
    { "drop_unread", FM_DEFECT_DROP_UNREAD, 0 },
    { "drop_by_address", FM_DEFECT_DROP_BY_ADDRESS, 0 },
    { "skip_store", FM_DEFECT_SKIP_STORE, 0 },
    { "no_hash_check", FM_DEFECT_NO_HASH_CHECK, 0 },
    { "skip_zapping", FM_DEFECT_SKIP_ZAPPING, 0 },
    { "skip_limbo", FM_DEFECT_SKIP_LIMBO, 0 },
    { "lose_store", 0, SIM_LOSE_STORE },
    { "early_ack", 0, SIM_EARLY_ACK },
    { "late_event", 0, SIM_LATE_EVENT },
    { "forget_wake", 0, SIM_FORGET_WAKE },
    { "lazy_frames", 0, SIM_LAZY_FRAMES },
    { "no_ledger_fork", 0, SIM_NO_LEDGER_FORK },
    { "weak_hash", 0, SIM_WEAK_HASH },
    { "blind", 0, SIM_BLIND },
    { "wrong_slot", 0, SIM_WRONG_SLOT },
    { "stale_present", 0, SIM_STALE_PRESENT },
};
#define DEFECTS_N (sizeof defects / sizeof defects[0])

struct options {
    uint64_t seed, steps, seeds, watch;
    bool seeded, verbose;
    const struct named *defect;
};

/* ---- one run */

static bool nobody_in_core(void *arg)
{
    (void)arg;
    return S.in_core == 0;
}

static void check_now(void)
{
    S.gate = true;
    S.waiting_for = "the core to come to rest";
    sim_wait(nobody_in_core, NULL);
    sim_check();
    S.gate = false;
}

static bool all_rest(void)
{
    for (uint32_t k = CO_THREAD; k < CO_N; k++)
        if (S.co[k].sp != NULL && k != S.cur && (S.blocked[k] || S.co[k].ready == NULL || S.pte[0].pend > 0))
            return false;
    return S.faults_n == 0 && S.io_n == 0 && S.events_n == 0 && S.changing == 0 && S.completing == 0;
}

static void drain(void)
{
    S.stop = true;
    S.faults_on = false;
    S.core->ledger.shut = 0;
    S.waiting_for = "the threads, when nothing fails any more";
    S.deadline = S.steps + DRAIN_STEPS;
    if (S.core->limit_pages < 40)
        S.core->limit_pages = 40;
    while (!all_rest()) {
        if (sim_chance(40))
            check_now();
        sim_yield();
    }
}

static void read_everything(void)
{
    for (uint64_t p = AS_BASE; p < AS_BASE + AS_PAGES; p++) {
        if (pte_of(p)->map == 0)
            continue;
        S.waiting_for = "a page that must be readable at the end";
        if (S.verbose)
            printf("  reading page %llu\n", (unsigned long long)(p - AS_BASE));
        S.deadline = S.steps + DRAIN_STEPS;
        pte_of(p)->prot = pte_of(p)->prot == PROT_NO ? PROT_RO : pte_of(p)->prot;
        program_read(p);
    }
}

void run_phases(uint64_t steps)
{
    uint64_t end = S.steps + steps;
    while (S.steps < end) {
        sim_yield();
        if (sim_chance(40))
            check_now();
        if (sim_chance(2000))
            child_release((uint32_t)sim_rnd(2));
    }
    drain();
    check_now();
    read_everything();
    S.deadline = S.steps + DRAIN_STEPS;
    check_now();
    child_release(0);
    child_release(1);
    check_now();
    S.deadline = 0;
}

static void *map_shared(uint64_t bytes)
{
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) {
        fprintf(stderr, "farmem-sim: no memory: %s\n", strerror(errno));
        exit(1);
    }
    return p;
}

/* What kind of run it is. */
static void draw_kind(struct fm_core *c)
{
    static const uint32_t calms[] = { 1, 2, 4, 16 };
    S.calm = calms[sim_rnd(4)];
    uint64_t way = sim_rnd(5);
    c->can_move = c->can_poison = way != 0;
    c->evict_mode = way == 1 ? FM_EVICT_COPY : FM_EVICT_AUTO;
    S.pins_on = way > 1 && sim_chance(2);
    S.splice_on = sim_chance(4);
    S.forks_on = sim_chance(2);
    S.forks_left = S.forks_on ? 3 : 0;
    S.free_on = sim_chance(2);
    S.starved_on = sim_chance(8);
    S.faults_on = sim_chance(2);
    S.bad_ppm = (uint32_t)sim_rnd(20000);
    c->limit_pages = 12 + (int64_t)sim_rnd(200);
    uint64_t extents = sim_chance(4) ? 1 + sim_rnd(6) : EXTENTS_MAX;
    S.pool_bytes = extents * FM_EXTENT_SLOTS * FM_PAGE_BYTES;
    S.servers_on = extents > 1 && S.seed % 3 == 0;      /* not drawn: old seeds shall mean what they meant */
}

static bool ledger_init(void)
{
    uint32_t extents = (uint32_t)(S.pool_bytes / (FM_EXTENT_SLOTS * FM_PAGE_BYTES)), some = extents / 3 + 1;
    if (!S.servers_on)
        return fm_pool_ledger_init(S.ledger, S.pool_bytes) == 0;
    return fm_pool_ledger_init_empty(S.ledger, S.pool_bytes) == 0 && fm_pool_ledger_add(S.ledger, some) == 0 &&
           fm_pool_ledger_add(S.ledger, extents - some) == 1;
}

static bool trimmed(void *ctx, uint32_t extent)
{
    (void)ctx;
    for (uint32_t s = 0; s < FM_EXTENT_SLOTS; s++)
        S.family->slot[extent * FM_EXTENT_SLOTS + s] = ~0ull;
    return true;
}

static void run_seed(uint64_t seed, const struct options *o)
{
    const struct named *defect = o->defect;
    char *arena = S.arena;
    uint64_t arena_used = S.arena_used;
    struct fm_core *core = S.core;
    memset(&S, 0, sizeof S);
    memset(arena, 0, arena_used);
    memset(core, 0, sizeof *core);
    S.arena = arena;
    S.core = core;
    S.seed = seed;
    S.steps_max = o->steps;
    S.verbose = o->verbose;
    S.watch = o->watch != 0 ? AS_BASE + o->watch : 0;
    S.defect_name = defect != NULL ? defect->name : NULL;
    S.sim_defects = defect != NULL ? defect->sim : 0;
    sim_seed(seed);
    core->ops = &sim_ops;
    core->count = &S.count;
    core->defects = defect != NULL ? defect->core : 0;
    draw_kind(core);
    S.family = map_shared(sizeof *S.family);
    S.ledger_bytes = fm_pool_ledger_bytes(S.pool_bytes);
    S.ledger = map_shared(S.ledger_bytes);
    sim_expect(ledger_init(), "no ledger");
    fm_pool_ledger_view(&core->ledger, S.ledger, 0);
    core->ledger.trim = trimmed;
    kernel_init(8 + (uint32_t)sim_rnd(SIM_FRAMES - 7));
    fm_core_init(core, S.frames_n);
    S.cur = S.main = CO_MAIN;
    engine_start();
    S.waiting_for = "anything";
    run_phases(o->steps);
    munmap(S.family, sizeof *S.family);
    munmap(S.ledger, S.ledger_bytes);
}

/* ---- the command line */

_Noreturn static void usage(const char *wrong, const char *what)
{
    fprintf(stderr, "farmem-sim: %s%s\n", wrong, what);
    fprintf(stderr, "usage: farmem-sim [--seed N] [--steps N] [--seeds N] [--defect NAME] [--verbose] [--watch PAGE]\n"
                    "       farmem-sim --list-defects\n");
    exit(2);
}

static uint64_t number(const char *option, const char *text)
{
    char *end;
    errno = 0;
    uint64_t n = text != NULL ? strtoull(text, &end, 10) : 0;
    if (text == NULL || *text < '0' || *text > '9' || *end != 0 || errno != 0)
        usage("a number must follow ", option);
    return n;
}

static const struct named *find_defect(const char *name)
{
    for (uint32_t k = 0; name != NULL && k < DEFECTS_N; k++)
        if (strcmp(defects[k].name, name) == 0)
            return &defects[k];
    usage("there is no such defect (--list-defects shows them): ", name != NULL ? name : "(none given)");
}

static void parse(struct options *o, char **argv)
{
    for (int k = 1; argv[k] != NULL; k++) {
        if (strcmp(argv[k], "--verbose") == 0) {
            o->verbose = true;
        } else if (strcmp(argv[k], "--list-defects") == 0) {
            for (uint32_t d = 0; d < DEFECTS_N; d++)
                printf("%s\n", defects[d].name);
            exit(0);
        } else if (strcmp(argv[k], "--seed") == 0) {
            o->seed = number("--seed", argv[++k]);
            o->seeded = true;
        } else if (strcmp(argv[k], "--steps") == 0) {
            o->steps = number("--steps", argv[++k]);
        } else if (strcmp(argv[k], "--seeds") == 0) {
            o->seeds = number("--seeds", argv[++k]);
        } else if (strcmp(argv[k], "--watch") == 0) {
            o->watch = number("--watch", argv[++k]);
        } else if (strcmp(argv[k], "--defect") == 0) {
            o->defect = find_defect(argv[++k]);
        } else {
            usage("unknown option ", argv[k]);
        }
    }
}

int main(int argc, char **argv)
{
    struct options o = { .steps = 20000, .seeds = 1 };
    uint64_t steps = 0;
    (void)argc;
    parse(&o, argv);
    if (!o.seeded) {
        int fd = open("/dev/urandom", O_RDONLY | O_CLOEXEC);
        if (fd < 0 || read(fd, &o.seed, sizeof o.seed) != sizeof o.seed)
            usage("no random seed: give one with --seed", "");
        close(fd);
        o.seed &= (1ull << 40) - 1;
    }
    S.arena = calloc(1, ARENA_BYTES);
    S.core = calloc(1, sizeof *S.core);
    if (S.arena == NULL || S.core == NULL)
        usage("no memory", "");
    for (uint64_t k = 0; k < o.seeds; k++) {
        if (o.verbose)
            printf("seed %llu\n", (unsigned long long)(o.seed + k));
        run_seed(o.seed + k, &o);
        steps += S.steps;
    }
    printf("%llu seeds from %llu on, %llu steps, no violation\n", (unsigned long long)o.seeds, (unsigned long long)o.seed,
           (unsigned long long)steps);
    return 0;
}
