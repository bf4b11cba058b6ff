/* forks MODE [COUNT]: a forked child sees all that its parent had, evicted or not, and
 * from then on each has its own.  Without care the child reads zeros where pages were away.
 *   child     a child verifies, rewrites and verifies, while the parent does too
 *   double    fork twice, the middle process goes at once
 *   grand     children of children, all of them verifying
 *   daemon    daemon(3): the parent dies; the verdict goes to the file FORKS_VERDICT
 *   many      COUNT forks in a row, memory discarded and rewritten in between
 *   malloc    fork while other threads allocate; the child allocates, opens files, execs
 *   thread    fork from a thread that is not the first one
 *   grown     the small rest of a mapping grows in place, and is used, before each fork
 *   plain     no fork, for comparison of what is left behind */
#include "safety.h"

#define BYTES (32 * MIB / SHRINK)

static char *memory;
static atomic_int stop;
static _Atomic size_t away_total;

static void prepare(uint64_t seed)
{
    fill(memory, BYTES, seed);
    atomic_fetch_add(&away_total, pressure_until_away(memory, BYTES / 2, 3));
}

/* What a child does with what it got: looks at the end first, then at all, then writes. */
static void child_work(uint64_t seed, uint64_t mine, const char *who)
{
    verify_from(memory + BYTES / 2, BYTES / 2, seed, BYTES / 2 / 8, who);
    verify(memory, BYTES, seed, who);
    fill(memory, BYTES, mine);
    char *more = map(BYTES / 2);
    fill(more, BYTES / 2, mine + 1);
    verify(memory, BYTES, mine, who);
    verify(more, BYTES / 2, mine + 1, who);
    munmap(more, BYTES / 2);
}

static pid_t start(void)
{
    fflush(NULL);
    pid_t pid = fork();
    if (pid < 0)
        die("fork: %s", strerror(errno));
    return pid;
}

static void mode_child(long count)
{
    for (long i = 0; i < count; i++) {
        uint64_t seed = 10 * (uint64_t)i + 1;
        prepare(seed);
        pid_t pid = start();
        if (pid == 0) {
            child_work(seed, 777, "child");
            _exit(0);
        }
        /* The parent writes at once: the child must not see it, nor the parent the child. */
        fill(memory, BYTES / 2, seed + 1);
        verify_from(memory + BYTES / 2, BYTES / 2, seed, BYTES / 2 / 8, "parent, unchanged half");
        reap_ok(pid, "child");
        verify(memory, BYTES / 2, seed + 1, "parent, own half");
        verify_from(memory + BYTES / 2, BYTES / 2, seed, BYTES / 2 / 8, "parent after the child");
    }
}

static void mode_double(long count)
{
    for (long i = 0; i < count; i++) {
        int verdict[2];
        char word = 0;
        uint64_t seed = 10 * (uint64_t)i + 1;
        CHECK(pipe(verdict) == 0);
        prepare(seed);
        pid_t pid = start();
        if (pid == 0) {
            if (start() != 0)
                _exit(0);
            pause_us(100000); /* until the middle one has gone, and some more */
            child_work(seed, 888, "child of a child that has gone");
            CHECK(write(verdict[1], "y", 1) == 1);
            _exit(0);
        }
        close(verdict[1]);
        reap_ok(pid, "the middle process");
        verify(memory, BYTES, seed, "grandparent");
        if (read(verdict[0], &word, 1) != 1 || word != 'y')
            die("the child of the child that has gone did not come to its end");
        close(verdict[0]);
    }
}

static void descend(long depth, uint64_t seed)
{
    if (depth == 0)
        return;
    pid_t pid = start();
    if (pid == 0) {
        verify(memory, BYTES, seed, "descendant");
        fill(memory, BYTES, seed + 1);
        descend(depth - 1, seed + 1);
        verify(memory, BYTES, seed + 1, "descendant, after its own child");
        _exit(0);
    }
    fill(memory, BYTES / 4, seed + 100);
    reap_ok(pid, "descendant");
    verify(memory, BYTES / 4, seed + 100, "ancestor, rewritten");
    verify_from(memory + BYTES / 4, BYTES - BYTES / 4, seed, BYTES / 4 / 8, "ancestor");
    fill(memory, BYTES / 4, seed);
}

static void mode_grand(long count)
{
    prepare(1);
    descend(count, 1);
    verify(memory, BYTES, 1, "at the end");
}

/* The parent has gone when the daemon looks at its memory; nobody waits for it. */
static void mode_daemon(long count)
{
    (void)count;
    const char *path = getenv("FORKS_VERDICT");
    char temporary[512];
    CHECK(path != NULL);
    prepare(1);
    CHECK(daemon(1, 1) == 0);
    alarm(60);
    pause_us(300000);
    child_work(1, 999, "daemon");
    snprintf(temporary, sizeof temporary, "%s.new", path);
    FILE *verdict = fopen(temporary, "w");
    CHECK(verdict != NULL && fputs("ok\n", verdict) >= 0 && fclose(verdict) == 0);
    CHECK(rename(temporary, path) == 0);
    _exit(0);
}

static void mode_many(long count)
{
    uint64_t seeds[8];
    size_t part = BYTES / 8;
    for (size_t k = 0; k < 8; k++)
        fill(memory + k * part, part, seeds[k] = k + 1);
    pressure_wait(2);
    for (long i = 0; i < count; i++) {
        size_t k = (size_t)i % 8;
        CHECK(madvise(memory + k * part, part, MADV_DONTNEED) == 0);
        if (i % 2 == 0)
            fill(memory + k * part, part, seeds[k] = 1000 + (uint64_t)i);
        pid_t pid = start();
        if (pid == 0) {
            if (i % 2 != 0)
                verify_zero(memory + k * part, part, "child, discarded part");
            verify(memory + (k + 5) % 8 * part, part, seeds[(k + 5) % 8], "child, another part");
            _exit(0);
        }
        reap_ok(pid, "one of many children");
        if (i % 2 != 0)
            fill(memory + k * part, part, seeds[k] = 1000 + (uint64_t)i);
    }
    for (size_t k = 0; k < 8; k++)
        verify(memory + k * part, part, seeds[k], "after many forks");
}

/* Allocates without end, with small and big blocks, so that malloc's locks are busy. */
static void *allocate(void *argument)
{
    uint64_t state = 101 + (uintptr_t)argument;
    while (!atomic_load(&stop)) {
        size_t bytes = 64 + random_next(&state) % (random_next(&state) % 16 ? 4096 : MIB);
        char *p = malloc(bytes);
        CHECK(p != NULL);
        memset(p, 0x5a, bytes);
        free(p);
    }
    return NULL;
}

static void child_of_threads(uint64_t seed, bool by_exec)
{
    for (size_t i = 1; i < 200; i++) {
        char *p = malloc(i * 1000);
        CHECK(p != NULL);
        memset(p, (int)i, i * 1000);
        free(p);
    }
    FILE *self = fopen("/proc/self/stat", "r");
    char line[64];
    CHECK(self != NULL && fgets(line, sizeof line, self) != NULL && fclose(self) == 0);
    verify(memory, BYTES, seed, "child of a program with threads");
    if (by_exec) {
        execl("/bin/true", "true", (char *)NULL);
        die("exec of /bin/true: %s", strerror(errno));
    }
    _exit(0);
}

static void mode_malloc(long count)
{
    pthread_t ids[3];
    prepare(1);
    for (size_t i = 0; i < 3; i++)
        CHECK(pthread_create(&ids[i], NULL, allocate, (void *)i) == 0);
    for (long i = 0; i < count; i++) {
        pid_t pid = start();
        if (pid == 0)
            child_of_threads(1, i % 2 == 1);
        reap_ok(pid, "child of a program with threads");
        pressure_wait(1);
    }
    atomic_store(&stop, 1);
    for (size_t i = 0; i < 3; i++)
        CHECK(pthread_join(ids[i], NULL) == 0);
    verify(memory, BYTES, 1, "parent with threads");
}

static void *fork_here(void *argument)
{
    (void)argument;
    pid_t pid = start();
    if (pid == 0) {
        child_work(1, 666, "child of another thread");
        exit(0);
    }
    reap_ok(pid, "child of another thread");
    return NULL;
}

static void mode_thread(long count)
{
    prepare(1);
    for (long i = 0; i < count; i++) {
        pthread_t a, b;
        CHECK(pthread_create(&a, NULL, fork_here, NULL) == 0);
        CHECK(pthread_create(&b, NULL, fork_here, NULL) == 0);
        CHECK(pthread_join(a, NULL) == 0 && pthread_join(b, NULL) == 0);
        verify(memory, BYTES, 1, "parent, whose other threads forked");
    }
}

/* Alone in its neighbourhood, and small: what is left of it would not be worth managing by itself. */
static void mode_grown(long count)
{
    const size_t large = 4 * MIB, small = 64 << 10, grown = 128 << 10;
    char *place = map(3 * large) + large;
    munmap(place - large, large);
    munmap(place + large, large);
    fill(place, large, 1);
    prepare(1);
    pressure_until_away(place, large, 3);
    munmap(place + small, large - small);
    for (long i = 0; i < count; i++) {
        CHECK(mremap(place, small, grown, 0) == place);
        fill(place, grown, (uint64_t)i + 2);
        pid_t pid = start();
        if (pid == 0) {
            verify(place, grown, (uint64_t)i + 2, "child, of a mapping that had grown");
            _exit(0);
        }
        reap_ok(pid, "child");
        verify(place, grown, (uint64_t)i + 2, "parent, of a mapping that has grown");
        CHECK(mremap(place, grown, small, 0) == place);
    }
}

static void mode_plain(long count)
{
    for (long i = 0; i < count; i++) {
        prepare((uint64_t)i + 1);
        verify(memory, BYTES, (uint64_t)i + 1, "without any fork");
    }
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*run)(long count);
        long count;
    } modes[] = {{"child", mode_child, 3},   {"double", mode_double, 2}, {"grand", mode_grand, 3},
                 {"daemon", mode_daemon, 1}, {"many", mode_many, 200},   {"malloc", mode_malloc, 6},
                 {"thread", mode_thread, 2}, {"grown", mode_grown, 5},   {"plain", mode_plain, 2}};
    CHECK(argc > 1);
    for (size_t i = 0; i < sizeof modes / sizeof *modes; i++) {
        if (strcmp(modes[i].name, argv[1]) != 0)
            continue;
        memory = map(BYTES);
        pressure_start(BALLAST_BYTES);
        modes[i].run(number(argc, argv, 2, modes[i].count));
        pressure_stop();
        printf("ok away=%zu\n", away_total);
        return 0;
    }
    die("no such mode: %s", argv[1]);
}
