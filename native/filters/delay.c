/* delay.c - a filter that makes a near backend look far: a round-trip time and a cap on bandwidth.
 *
 * A transfer is handed down when its time has come, by a thread of the filter's own.  The cap is
 * one wire that all transfers share: each begins when the one before it is through.
 * params: rtt_ns, bytes_per_second (0: no cap).
 */
#include <stddef.h>

#include "backend.h"
#include "engine/sys.h"

enum { BUSY_UNTIL_NS = 0, PENDING = 1 };
#define SPIN_BELOW_NS 60000u          /* a sleep in the kernel is no more exact than this */

static struct fm_io *due(struct fm_backend *b, uint64_t now, uint64_t *next_ns)
{
    struct fm_io *io;
    fm_lock_take(&b->lock);
    io = b->head;
    if (io != NULL && io->due_ns > now) {
        *next_ns = io->due_ns - now;
        io = NULL;
    } else if (io != NULL) {
        b->head = io->next;
        b->word[PENDING]--;
        *next_ns = 0;
    } else {
        *next_ns = UINT64_MAX;
    }
    fm_lock_drop(&b->lock);
    return io;
}

static void delay_run(void *arg)
{
    struct fm_backend *b = arg;
    for (;;) {
        uint64_t next_ns;
        uint32_t *bell = (uint32_t *)&b->word[PENDING];
        struct fm_io *io = due(b, fm_now_ns(), &next_ns);
        if (io != NULL) {
            b->chain->gate_in();
            b->next->submit(b->next, io);
            b->chain->gate_out();
        } else if (next_ns == UINT64_MAX) {
            fm_futex_wait(bell, 0, -1);
        } else if (next_ns > SPIN_BELOW_NS) {
            fm_sleep_ns(next_ns - SPIN_BELOW_NS);
        }
    }
}

static bool delay_open(struct fm_backend *b) { return b->chain->thread(delay_run, b); }

static void delay_submit(struct fm_backend *b, struct fm_io *io)
{
    uint64_t rate = b->config->params[1], bytes = (uint64_t)io->n * FM_PAGE_BYTES, now = fm_now_ns();
    fm_lock_take(&b->lock);
    uint64_t begin = b->word[BUSY_UNTIL_NS] > now ? b->word[BUSY_UNTIL_NS] : now;
    if (rate > 0)
        begin += bytes * 1000000000ull / rate;
    b->word[BUSY_UNTIL_NS] = begin;
    io->due_ns = begin + b->config->params[0];
    io->next = NULL;
    if (b->head == NULL)
        b->head = io;
    else
        b->tail->next = io;
    b->tail = io;
    b->word[PENDING]++;
    fm_lock_drop(&b->lock);
    fm_futex_wake((uint32_t *)&b->word[PENDING], 1);
}

const struct fm_backend fm_filter_delay = {
    .size = sizeof(struct fm_backend),
    .version = FM_BACKEND_VERSION,
    .name = "delay",
    .open = delay_open,
    .submit = delay_submit,
};
