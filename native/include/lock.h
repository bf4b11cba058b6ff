/* lock.h - a futex lock of 32 bits and the reader-writer lock around the events.
 *
 * Ours, because pthread's locks live in a libc whose state a forked child or the
 * program may hold.  No fairness, no recursion; a waiter sleeps in the kernel.
 */
#ifndef FM_LOCK_H
#define FM_LOCK_H

#include <stdbool.h>
#include <stdint.h>

void fm_futex_wait(uint32_t *word, uint32_t seen, int64_t timeout_ns);   /* < 0: no limit */
void fm_futex_wake(uint32_t *word, int n);

/* 0 free, 1 held, 2 held and somebody sleeps */
typedef struct { uint32_t word; } fm_lock;

static inline void fm_lock_take(fm_lock *l)
{
    uint32_t was = 0;
    if (__atomic_compare_exchange_n(&l->word, &was, 1, false, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED))
        return;
    for (int i = 0; i < 100; i++) {
        was = 0;
        if (__atomic_load_n(&l->word, __ATOMIC_RELAXED) == 0 &&
            __atomic_compare_exchange_n(&l->word, &was, 1, false, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED))
            return;
        __builtin_ia32_pause();
    }
    while (__atomic_exchange_n(&l->word, 2, __ATOMIC_ACQUIRE) != 0)
        fm_futex_wait(&l->word, 2, -1);
}

static inline void fm_lock_drop(fm_lock *l)
{
    if (__atomic_exchange_n(&l->word, 0, __ATOMIC_RELEASE) == 2)
        fm_futex_wake(&l->word, 1);
}

/* The world lock: shared by whoever changes residency, exclusive for the one thread
 * that reads events.  That thread goes first, or a busy evictor would starve it. */
typedef struct {
    uint32_t holders;    /* shared holders; bit 31: exclusive */
    uint32_t wanted;     /* the exclusive side waits */
} fm_world;

#define FM_WORLD_EXCLUSIVE 0x80000000u

static inline void fm_world_share(fm_world *w)
{
    for (;;) {
        uint32_t h = __atomic_load_n(&w->holders, __ATOMIC_RELAXED);
        if ((h & FM_WORLD_EXCLUSIVE) != 0) {
            fm_futex_wait(&w->holders, h, -1);
            continue;
        }
        if (__atomic_load_n(&w->wanted, __ATOMIC_ACQUIRE) != 0) {
            fm_futex_wait(&w->wanted, 1, 1000000);
            continue;
        }
        if (__atomic_compare_exchange_n(&w->holders, &h, h + 1, false, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED))
            return;
    }
}

static inline void fm_world_unshare(fm_world *w)
{
    uint32_t left = __atomic_sub_fetch(&w->holders, 1, __ATOMIC_RELEASE);
    if (left == 0 && __atomic_load_n(&w->wanted, __ATOMIC_ACQUIRE) != 0)
        fm_futex_wake(&w->holders, 1 << 30);
}

static inline void fm_world_take(fm_world *w)
{
    uint32_t none = 0;
    if (__atomic_compare_exchange_n(&w->holders, &none, FM_WORLD_EXCLUSIVE, false, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED))
        return;
    __atomic_store_n(&w->wanted, 1, __ATOMIC_SEQ_CST);
    for (;;) {
        uint32_t h = 0;
        if (__atomic_compare_exchange_n(&w->holders, &h, FM_WORLD_EXCLUSIVE, false, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED))
            break;
        fm_futex_wait(&w->holders, h, 1000000);
    }
    __atomic_store_n(&w->wanted, 0, __ATOMIC_RELEASE);
    fm_futex_wake(&w->wanted, 1 << 30);
}

static inline void fm_world_release(fm_world *w)
{
    __atomic_store_n(&w->holders, 0, __ATOMIC_RELEASE);
    fm_futex_wake(&w->holders, 1 << 30);
}

#endif
