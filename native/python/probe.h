/* probe.h - small things that the Python side needs from C: asking the kernel for
 * a userfaultfd, and changing shared words atomically.
 *
 * Linked into farmem._native only; the engine has its own ways.
 */
#ifndef FM_PROBE_H
#define FM_PROBE_H

#include <stdint.h>

/* cdef begins */
struct fm_probe {
    uint32_t way;             /* enum fm_uffd_way; FM_UFFD_NONE: not to be had */
    uint32_t user_mode_only;  /* 1: refused in full, but user-mode faults could be had */
    uint64_t features;        /* UFFD_FEATURE_ bits that the kernel has */
    int32_t syscall_errno;    /* why the system call failed, or 0 */
    int32_t device_errno;     /* why /dev/userfaultfd failed, or 0 */
};
#define FM_PROBE_FEATURE_MOVE 0x10000
/* Find out how a userfaultfd that sees kernel faults can be had.  Keeps no
 * descriptor. */
void fm_probe_userfaultfd(struct fm_probe *probe);
/* Compare-and-swap on a word of the control segment; 1: swapped. */
int fm_word_swap(uint32_t *word, uint32_t from, uint32_t to);
/* Read a word that another process stores last, after what belongs to it. */
uint64_t fm_word_read(uint64_t *word);
/* cdef ends */

#endif
