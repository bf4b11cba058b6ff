/* slice.h - how a thread of farmem's asks to be chosen soon when it wakes.
 *
 * The engine's threads and the supervisor run briefly, and the program waits for them: a short slice makes the scheduler
 * choose them soon, at no greater share of the processor. Linux 6.12 and newer; before, it says no.
 */
#ifndef FM_SLICE_H
#define FM_SLICE_H

#include <sched.h>
#include <stdint.h>

#include "engine/sys.h"

#define FM_SLICE_NS 100000ull

static inline void fm_run_soon(void)
{
    struct {
        uint32_t size, policy;
        uint64_t flags;
        int32_t nice;
        uint32_t priority;
        uint64_t runtime, deadline, period;
    } a;
    if (fm_sys(SYS_sched_getattr, 0, &a, sizeof a, 0) != 0 || a.policy != SCHED_OTHER)
        return;
    a.runtime = FM_SLICE_NS;
    fm_sys(SYS_sched_setattr, 0, &a, 0);
}

#endif
