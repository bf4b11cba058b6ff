/* file_threads.c - transfers of file.c by threads that wait for one each: where io_uring is not allowed. */
#include <stddef.h>

#include "engine/sys.h"
#include "file.h"

#define THREADS 8               /* so many transfers are under way at once */

static void transfer(struct fm_io *io)
{
    struct fm_file_rest r;
    long got;
    do {
        r = fm_file_rest(io);
        got = fm_sys(io->kind == FM_IO_FETCH ? SYS_pread64 : SYS_pwrite64, fm_file.fd, r.memory, r.bytes, r.at);
    } while (!fm_file_went(io, got));
    fm_file_ended(io);
}

_Noreturn void fm_file_threads_run(void)
{
    for (;;) {
        uint32_t seen = __atomic_load_n(&fm_file.bell, __ATOMIC_SEQ_CST);
        struct fm_io *io = fm_file_take();
        if (io != NULL) {
            transfer(io);
            continue;
        }
        __atomic_add_fetch(&fm_file.sleepers, 1, __ATOMIC_SEQ_CST);
        fm_futex_wait(&fm_file.bell, seen, -1);
        __atomic_sub_fetch(&fm_file.sleepers, 1, __ATOMIC_SEQ_CST);
    }
}

static void run(void *arg)
{
    (void)arg;
    fm_file_threads_run();
}

void fm_file_threads_start(void)
{
    for (int k = 1; k < THREADS; k++)
        if (!fm_file.b->chain->thread(run, NULL))
            return;              /* the calling one is enough, if slow */
}

void fm_file_threads_ring(void)
{
    __atomic_add_fetch(&fm_file.bell, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&fm_file.sleepers, __ATOMIC_SEQ_CST) > 0)
        fm_futex_wake(&fm_file.bell, 1);
}
