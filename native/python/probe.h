/* probe.h - small things that the Python side needs from C: asking the kernel what
 * it allows, and changing shared words atomically.
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
#define FM_PROBE_FEATURE_WP 0x1
#define FM_PROBE_FEATURE_EVENT_REMAP 0x4
#define FM_PROBE_FEATURE_EVENT_REMOVE 0x8
#define FM_PROBE_FEATURE_EVENT_UNMAP 0x40
#define FM_PROBE_FEATURE_SIGBUS 0x80
#define FM_PROBE_FEATURE_POISON 0x4000
#define FM_PROBE_FEATURE_WP_ASYNC 0x8000
#define FM_PROBE_FEATURE_MOVE 0x10000
/* Find out how a userfaultfd that sees kernel faults can be had.  Keeps no
 * descriptor. */
void fm_probe_userfaultfd(struct fm_probe *probe);

/* What `farmem doctor` tries besides, one by one. */
enum fm_probe_call {
    FM_CALL_USER_MODE = 1,      /* a userfaultfd for user-mode faults alone */
    FM_CALL_DEVICE = 2,         /* a userfaultfd from /dev/userfaultfd */
    FM_CALL_PAGEMAP_SCAN = 3,   /* which pages are there, in one call */
    FM_CALL_POPULATE_WRITE = 4, /* making pages private after a fork */
    FM_CALL_CLOSE_RANGE = 5,
    FM_CALL_MEMFD = 6,          /* memory that a job shares, sealed against execution */
    FM_CALL_PIDFD = 7,
    FM_CALL_IO_URING = 8
};
/* Try one: 0, or the errno.  Changes nothing and keeps no descriptor; a seccomp filter
 * may kill whoever calls. */
int32_t fm_probe_call(uint32_t call);
/* Compare-and-swap on a word of the control segment; 1: swapped. */
int fm_word_swap(uint32_t *word, uint32_t from, uint32_t to);
/* Read a word that another process stores last, after what belongs to it. */
uint64_t fm_word_read(uint64_t *word);
/* Store a word that other processes read at any time. */
void fm_word_write(uint64_t *word, uint64_t value);
/* Ask the scheduler to choose the calling thread soon when it wakes. */
void fm_choose_soon(void);
/* cdef ends */

#endif
