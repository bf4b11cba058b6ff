/* signals: a program's signal handlers run on its own threads only, interrupted system
 * calls and evicted signal stacks included. The engine's threads are in the program's
 * process: a signal that is sent to the process may go to any thread that doesn't block it.
 * First all of ours block SIGUSR2: it must stay pending until one of ours unblocks it.
 * Then timers at a high rate, with handlers on their own stacks, which are evicted. Last,
 * a thread in sigwait gets what is sent to the process. */
#include "safety.h"
#include <sys/time.h>

#define BYTES (32 * MIB / SHRINK)
#define WORKERS 3
#define STACK_BYTES (MIB)

static _Atomic int ours[WORKERS + 3];
static _Atomic long alarms, profs, strangers, users;
static _Atomic int stranger;
static atomic_int stop;
static char *memory;

static void enlist(int place)
{
    atomic_store(&ours[place], (int)syscall(SYS_gettid));
}

static void handler(int signal)
{
    int kept = errno, me = (int)syscall(SYS_gettid);
    bool known = false;
    for (size_t i = 0; i < sizeof ours / sizeof *ours; i++)
        known = known || atomic_load(&ours[i]) == me;
    if (!known) {
        atomic_store(&stranger, me);
        atomic_fetch_add(&strangers, 1);
    }
    atomic_fetch_add(signal == SIGALRM ? &alarms : signal == SIGPROF ? &profs : &users, 1);
    errno = kept;
}

static void install(int signal, int flags)
{
    struct sigaction action = {.sa_handler = handler, .sa_flags = flags | SA_RESTART};
    sigfillset(&action.sa_mask);
    CHECK(sigaction(signal, &action, NULL) == 0);
}

static void no_strangers(const char *when)
{
    if (atomic_load(&strangers) != 0)
        die("%s: a handler ran on thread %d, which is not the program's", when, atomic_load(&stranger));
}

static void *worker(void *argument)
{
    size_t me = (size_t)argument, share = BYTES / WORKERS / PAGE * PAGE;
    char *mine = memory + me * share;
    enlist((int)me);
    stack_t stack = {.ss_sp = map(STACK_BYTES), .ss_size = STACK_BYTES};
    CHECK(sigaltstack(&stack, NULL) == 0);
    sigset_t timers;
    sigemptyset(&timers);
    sigaddset(&timers, SIGALRM);
    sigaddset(&timers, SIGPROF);
    pthread_sigmask(SIG_UNBLOCK, &timers, NULL);
    uint64_t seed = me;
    do {
        fill(mine, share, ++seed);
        pressure_wait(1);
        verify(mine, share, seed, "while signals arrive");
    } while (!atomic_load(&stop));
    pthread_sigmask(SIG_BLOCK, &timers, NULL);
    return NULL;
}

static void *waiter(void *argument)
{
    sigset_t wanted;
    int got;
    enlist(WORKERS);
    sigemptyset(&wanted);
    sigaddset(&wanted, SIGUSR1);
    for (long i = 0; i < (long)argument; i++)
        CHECK(sigwait(&wanted, &got) == 0 && got == SIGUSR1);
    return NULL;
}

static void pending_phase(void)
{
    sigset_t one, pending;
    sigemptyset(&one);
    sigaddset(&one, SIGUSR2);
    install(SIGUSR2, 0);
    kill(getpid(), SIGUSR2);
    pressure_wait(2);
    no_strangers("signal that all our threads block");
    CHECK(atomic_load(&users) == 0 && sigpending(&pending) == 0 && sigismember(&pending, SIGUSR2) == 1);
    pthread_sigmask(SIG_UNBLOCK, &one, NULL);
    for (int i = 0; i < 1000 && atomic_load(&users) == 0; i++)
        pause_us(1000);
    pthread_sigmask(SIG_BLOCK, &one, NULL);
    CHECK(atomic_load(&users) == 1);
    no_strangers("signal unblocked");
}

static void timer_phase(int flags, long wanted)
{
    pthread_t ids[WORKERS];
    struct itimerval fast = {{0, 1000}, {0, 1000}}, off = {{0, 0}, {0, 0}};
    install(SIGALRM, flags);
    install(SIGPROF, flags);
    atomic_store(&stop, 0);
    atomic_store(&alarms, 0);
    for (size_t i = 0; i < WORKERS; i++)
        CHECK(pthread_create(&ids[i], NULL, worker, (void *)i) == 0);
    CHECK(setitimer(ITIMER_REAL, &fast, NULL) == 0 && setitimer(ITIMER_PROF, &fast, NULL) == 0);
    while (atomic_load(&alarms) < wanted)
        pause_us(1000);
    CHECK(setitimer(ITIMER_REAL, &off, NULL) == 0 && setitimer(ITIMER_PROF, &off, NULL) == 0);
    atomic_store(&stop, 1);
    for (size_t i = 0; i < WORKERS; i++)
        CHECK(pthread_join(ids[i], NULL) == 0);
    no_strangers("timers");
}

static void sigwait_phase(long count)
{
    pthread_t id;
    CHECK(pthread_create(&id, NULL, waiter, (void *)count) == 0);
    for (long i = 0; i < count; i++) {
        sigset_t pending;
        CHECK(kill(getpid(), SIGUSR1) == 0);
        for (bool taken = false; !taken; pause_us(1000))
            taken = sigpending(&pending) == 0 && sigismember(&pending, SIGUSR1) == 0;
    }
    CHECK(pthread_join(id, NULL) == 0);
}

int main(void)
{
    sigset_t blocked;
    sigemptyset(&blocked);
    sigaddset(&blocked, SIGUSR1);
    sigaddset(&blocked, SIGUSR2);
    sigaddset(&blocked, SIGALRM);
    sigaddset(&blocked, SIGPROF);
    CHECK(pthread_sigmask(SIG_BLOCK, &blocked, NULL) == 0);
    enlist(WORKERS + 1);
    memory = map(BYTES);
    pressure_start(BALLAST_BYTES);
    pressure_wait(2);
    pending_phase();
    timer_phase(SA_ONSTACK, 800);
    timer_phase(0, 400);
    install(SIGUSR1, 0); /* must never run: sigwait takes it */
    atomic_store(&users, 0);
    sigwait_phase(50);
    CHECK(atomic_load(&users) == 0);
    no_strangers("sigwait");
    pressure_stop();
    puts("ok");
    return 0;
}
