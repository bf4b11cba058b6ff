/* sim_fork.c - fork, for real: the child of the simulator is the child of the program.
 *
 * The parent stands still in the way in which the engine will make it: the evictor is idle, no transfer is under way,
 * no event is pending, no page is only in a frame; but a fault handler may be anywhere.  The child makes
 * the books its own, lives for a while beside or after a stretch of its parent's life, and checks every byte.
 * Only one process of the family runs at a time, so that a seed stays a seed.
 */
#include <errno.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "sim.h"

static bool quiet(void)
{
    return S.evictor_idle && S.io_n == 0 && S.completing == S.stalled_pool && S.changing == 0 && S.events_n == 0 &&
           S.core->limbo == NULL && !S.exclusive && !S.gate && !S.adopting;
}

static bool dirty_frames(void)
{
    for (uint32_t f = 0; f < S.frames_n; f++) {
        const struct fm_frame *fr = &S.core->frame[f];
        if (fr->dirty && fr->page != FM_PAGE_NONE)
            return true;
    }
    return S.core->drops_n > 0;
}

static bool freeze(void)
{
    S.freeze = 1;
    for (uint32_t tries = 0; tries < 400; tries++) {
        sim_yield();
        if (S.evictor_idle)
            S.freeze = 2;
        if (!quiet())
            continue;
        if (!dirty_frames())
            return true;
        core_in();
        fm_core_evict(S.core, 0);
        core_out();
    }
    return false;
}

static void forget_parent(void)
{
    for (uint32_t k = 0; k < PINS_MAX; k++)
        S.pin[k].phys = PHYS_NONE;
    for (uint32_t k = 0; k < HELD_MAX; k++)
        S.held[k] = PHYS_NONE;
    for (uint32_t k = 0; k < PHYS_MAX; k++)
        S.phys[k].pins = S.phys[k].held = 0;
    for (uint32_t f = 0; f < SIM_FRAMES; f++)
        S.frame[f] = PHYS_NONE;
    memset(S.fault, 0, sizeof S.fault);
    memset(S.blocked, 0, sizeof S.blocked);
    S.faults_n = S.io_n = S.completing = S.stalled_pool = S.events_n = S.shared = S.in_core = S.freeze = 0;
    S.changing = 0;
    S.zaps[0] = S.zaps[1] = 0;
    S.exclusive = S.wanted = S.gate = S.evictor_idle = S.stop = S.adopting = false;
    for (uint32_t k = 0; k < AS_PAGES; k++) {
        struct pte *p = &S.pte[k];
        p->users = p->busy = p->pend = 0;
        p->wp = false;
        p->truth.window = p->truth.wrote = false;    /* what was LAZY stays so: it may have been freed before */
    }
    memset(S.child, 0, sizeof S.child);
}

_Noreturn static void child_lives(uint32_t proc, int wait_fd)
{
    char go;
    uint32_t me = S.cur;
    S.depth++;
    S.proc = proc;
    S.version_base = (uint64_t)proc << 44;
    S.deadline = 0;
    forget_parent();
    fm_pool_ledger_view(&S.core->ledger, S.ledger, proc);
    memset(S.co, 0, sizeof S.co);
    S.cur = S.main = me;
    if (wait_fd >= 0 && read(wait_fd, &go, 1) != 1)
        _exit(1);                 /* the parent has failed */
    fm_core_forked(S.core);
    engine_start();
    S.co[me] = (struct co){ .sp = NULL };
    run_phases(sim_chance(2) ? 0 : 500 + sim_rnd(3000));
    fflush(stdout);
    _exit(0);
}

static void child_ends(uint32_t k)
{
    int status = 0;
    while (waitpid(S.child[k].pid, &status, 0) < 0 && errno == EINTR)
        continue;
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0)
        _exit(1);                 /* it has said why */
    fm_pool_ledger_reap(S.ledger, S.child[k].proc, 0);
    S.child[k].pid = 0;
    S.family->children--;
}

/* A child that was held back lives now; its parent waits. */
void child_release(uint32_t k)
{
    if (S.child[k].pid == 0)
        return;
    if (S.child[k].fd >= 0) {
        ssize_t wrote = write(S.child[k].fd, "", 1);
        sim_expect(wrote == 1, "the child can't be released");
        close(S.child[k].fd);
    }
    child_ends(k);
}

void program_fork(void)
{
    uint32_t k = 0;
    int fd[2] = { -1, -1 };
    while (k < 2 && S.child[k].pid != 0)
        k++;
    if (k == 2 || S.depth >= 2 || S.freeze != 0 || S.family->procs + 1 >= FM_PROCS_MAX)
        return;
    S.forks_left--;
    if (!freeze()) {
        S.freeze = 0;
        return;
    }
    uint32_t proc = ++S.family->procs;
    if (!sim_defect(NO_LEDGER_FORK))
        fm_pool_ledger_fork(&S.core->ledger, proc);
    for (uint32_t p = 0; p < AS_PAGES; p++) {
        uint32_t phys = S.pte[p].phys;
        if (phys != PHYS_NONE && phys != PHYS_ZERO && S.phys[phys].pins == 0)
            S.pte[p].shared = true;
    }
    bool hold = sim_chance(2);
    if (hold && pipe(fd) != 0)
        sim_violation("no pipe: %s", strerror(errno));
    fflush(stdout);
    int pid = fork();
    sim_expect(pid >= 0, "no fork: %s", strerror(errno));
    if (pid == 0) {
        if (hold)
            close(fd[1]);
        child_lives(proc, fd[0]);
    }
    if (hold)
        close(fd[0]);
    S.family->children++;
    S.child[k].pid = pid;
    S.child[k].fd = fd[1];
    S.child[k].proc = proc;
    S.freeze = 0;
    if (!hold)
        child_release(k);
}
