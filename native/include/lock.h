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

/* The world lock: shared by whoever changes residency, exclusive for the one thread that reads events (and for
 * adoption).  The exclusive side goes first, or a busy evictor would starve it.  It is taken for every read of
 * the userfaultfd, so the uncontended way must not enter the kernel. */
typedef struct {
    uint32_t holders;    /* shared holders, or EXCLUSIVE */
    uint32_t wanted;     /* how many wait to have it exclusively */
    uint32_t sleepers;   /* how many sleep on holders, or are about to */
} fm_world;

#define FM_WORLD_EXCLUSIVE 0x80000000u
#define FM_WORLD_SPINS 200

static inline void fm_world_sleep(fm_world *w, uint32_t seen)
{
    __atomic_add_fetch(&w->sleepers, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&w->holders, __ATOMIC_SEQ_CST) == seen)
        fm_futex_wait(&w->holders, seen, 1000000);
    __atomic_sub_fetch(&w->sleepers, 1, __ATOMIC_SEQ_CST);
}

static inline void fm_world_rouse(fm_world *w)
{
    if (__atomic_load_n(&w->sleepers, __ATOMIC_SEQ_CST) != 0)
        fm_futex_wake(&w->holders, 1 << 30);
}

static inline bool fm_world_try(fm_world *w, uint32_t from, uint32_t to)
{
    return __atomic_compare_exchange_n(&w->holders, &from, to, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED);
}

static inline void fm_world_share(fm_world *w)
{
    for (uint32_t spins = 0;; spins++) {
        uint32_t h = __atomic_load_n(&w->holders, __ATOMIC_RELAXED);
        bool closed = (h & FM_WORLD_EXCLUSIVE) != 0 || __atomic_load_n(&w->wanted, __ATOMIC_ACQUIRE) != 0;
        if (!closed && fm_world_try(w, h, h + 1))
            return;
        if (spins < FM_WORLD_SPINS)
            __builtin_ia32_pause();
        else if (closed)
            fm_world_sleep(w, h);
    }
}

static inline void fm_world_unshare(fm_world *w)
{
    if (__atomic_sub_fetch(&w->holders, 1, __ATOMIC_SEQ_CST) == 0)
        fm_world_rouse(w);
}

static inline void fm_world_take(fm_world *w)
{
    if (fm_world_try(w, 0, FM_WORLD_EXCLUSIVE))
        return;
    __atomic_add_fetch(&w->wanted, 1, __ATOMIC_SEQ_CST);
    for (uint32_t spins = 0; !fm_world_try(w, 0, FM_WORLD_EXCLUSIVE); spins++) {
        uint32_t h = __atomic_load_n(&w->holders, __ATOMIC_RELAXED);
        if (spins < FM_WORLD_SPINS)
            __builtin_ia32_pause();
        else if (h != 0)
            fm_world_sleep(w, h);
    }
    __atomic_sub_fetch(&w->wanted, 1, __ATOMIC_SEQ_CST);
}

static inline void fm_world_release(fm_world *w)
{
    __atomic_store_n(&w->holders, 0, __ATOMIC_SEQ_CST);
    fm_world_rouse(w);
}

#endif
