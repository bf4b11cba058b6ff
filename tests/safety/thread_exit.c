/* thread_exit [THREADS [ROUNDS]]: threads that sleep until everything of theirs that can be
 * evicted has been, and then go. What a thread needs to end (its control block, thread-local
 * storage, rseq area, robust mutex list, stack) lies in anonymous memory like the program's
 * data; some of it is read by the kernel, or waited on by pthread_join. Stacks are of the
 * usual kind, and big ones of the program's own. Some threads end by the system call itself,
 * straight out of their sleep: then nobody but the kernel touches their control block before
 * it has to write there, when the thread can no longer wait for a page. Thread-local variables, mutexes and
 * condition variables in TLS and on stacks must hold what was put there. */
#include "safety.h"
#include <linux/futex.h>

#define OWN_STACK_BYTES (2 * MIB)
#define TLS_WORDS 4096

static __thread uint64_t tls_words[TLS_WORDS];
static __thread pthread_mutex_t tls_robust;
static pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t opened = PTHREAD_COND_INITIALIZER;
static pthread_mutex_t abandoned[64];
static int round_now, ready;
static _Atomic uint32_t raw_gate;
static pthread_key_t key;

static void at_exit_of_thread(void *value)
{
    verify(value, 64 * 8, 42, "thread-specific data at exit");
    verify(tls_words, sizeof tls_words, 42, "TLS at exit");
}

/* Touches neither TLS nor the control block: no libc call but system calls that succeed. */
static void end_straight_from_sleep(uint32_t seen)
{
    while (atomic_load(&raw_gate) == seen)
        syscall(SYS_futex, &raw_gate, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
    syscall(SYS_exit, 0);
}

static void *sleeper(void *argument)
{
    size_t me = (size_t)argument;
    uint64_t on_stack[2048];
    pthread_mutexattr_t robust;
    fill(tls_words, sizeof tls_words, 42);
    fill(on_stack, sizeof on_stack, 43 + me);
    pthread_mutexattr_init(&robust);
    pthread_mutexattr_setrobust(&robust, PTHREAD_MUTEX_ROBUST);
    CHECK(pthread_mutex_init(&tls_robust, &robust) == 0);
    CHECK(pthread_mutex_lock(&tls_robust) == 0);
    pthread_setspecific(key, tls_words);
    size_t mine = me / 4; /* of four threads one abandons a mutex: by returning, or from its sleep */
    bool abandons = me % 4 == 2 + mine % 2 && mine < 64 && pthread_mutex_lock(&abandoned[mine]) == 0;
    pthread_mutex_lock(&gate);
    int round = round_now;
    uint32_t raw_round = atomic_load(&raw_gate);
    ready++;
    if (me % 2 == 1) {
        pthread_mutex_unlock(&gate);
        pthread_setspecific(key, NULL); /* libc won't end this thread, so it won't clean up */
        end_straight_from_sleep(raw_round);
    }
    while (round_now == round)
        pthread_cond_wait(&opened, &gate);
    pthread_mutex_unlock(&gate);
    verify(on_stack, sizeof on_stack, 43 + me, "on the stack");
    verify(tls_words, sizeof tls_words, 42, "TLS");
    CHECK(pthread_mutex_unlock(&tls_robust) == 0);
    return abandons ? NULL : argument;
}

/* Threads with stacks that the program made itself: plain anonymous memory. */
static void start(pthread_t *id, size_t i, char *stack)
{
    pthread_attr_t how;
    CHECK(pthread_attr_init(&how) == 0);
    if (stack != NULL)
        CHECK(pthread_attr_setstack(&how, stack, OWN_STACK_BYTES) == 0);
    CHECK(pthread_create(id, &how, sleeper, (void *)i) == 0);
    pthread_attr_destroy(&how);
}

static void one_round(size_t threads, pthread_t *ids, char *stacks, size_t own_stacks)
{
    ready = 0;
    for (size_t i = 0; i < threads; i++)
        start(&ids[i], i, i < own_stacks ? stacks + i * OWN_STACK_BYTES : NULL);
    for (int seen = 0; seen < (int)threads; pause_us(500)) {
        pthread_mutex_lock(&gate);
        seen = ready;
        pthread_mutex_unlock(&gate);
    }
    pressure_wait(4);
    pthread_mutex_lock(&gate);
    round_now++;
    pthread_cond_broadcast(&opened);
    pthread_mutex_unlock(&gate);
    atomic_fetch_add(&raw_gate, 1);
    syscall(SYS_futex, &raw_gate, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
    for (size_t i = 0; i < threads; i++) {
        void *result;
        CHECK(pthread_join(ids[i], &result) == 0);
        if (i % 2 == 0) /* the others had no way to return anything */
            CHECK(result == (void *)i || result == NULL);
    }
    for (size_t i = 0; i * 4 + 3 < threads && i < 64; i++) {
        int got = pthread_mutex_lock(&abandoned[i]);
        if (got != EOWNERDEAD)
            die("a robust mutex of a thread that has gone: want EOWNERDEAD, got %d", got);
        CHECK(pthread_mutex_consistent(&abandoned[i]) == 0 && pthread_mutex_unlock(&abandoned[i]) == 0);
    }
}

/* Many short lives: created and joined at once while pages go and come. */
static void *brief(void *argument)
{
    tls_words[7] = (uint64_t)(uintptr_t)argument;
    return (void *)(uintptr_t)tls_words[7];
}

int main(int argc, char **argv)
{
    size_t threads = (size_t)number(argc, argv, 1, 100), own_stacks = threads / 8;
    long rounds = number(argc, argv, 2, 2);
    pthread_t *ids = calloc(threads, sizeof *ids);
    CHECK(ids != NULL && pthread_key_create(&key, at_exit_of_thread) == 0);
    pthread_mutexattr_t robust;
    pthread_mutexattr_init(&robust);
    pthread_mutexattr_setrobust(&robust, PTHREAD_MUTEX_ROBUST);
    for (int i = 0; i < 64; i++)
        CHECK(pthread_mutex_init(&abandoned[i], &robust) == 0);
    char *stacks = map((own_stacks + 1) * OWN_STACK_BYTES);
    pressure_start(BALLAST_BYTES);
    pressure_wait(1);
    for (long i = 0; i < rounds; i++)
        one_round(threads, ids, stacks, own_stacks);
    for (size_t i = 0; i < 300; i++) {
        void *result;
        CHECK(pthread_create(&ids[0], NULL, brief, (void *)i) == 0);
        CHECK(pthread_join(ids[0], &result) == 0 && result == (void *)i);
    }
    pressure_stop();
    puts("ok");
    return 0;
}
