/* uffd_api.h - the parts of the userfaultfd and pagemap interfaces that are newer than the headers we build with.
 *
 * Debian 12's kernel headers are those of Linux 6.1; MOVE came with 6.8, POISON with 6.6, PAGEMAP_SCAN with 6.7.
 */
#ifndef FM_UFFD_API_H
#define FM_UFFD_API_H

#include <linux/ioctl.h>
#include <linux/userfaultfd.h>
#include <stdint.h>

#define FM_FEATURE_WP (1ull << 0)
#define FM_FEATURE_EVENT_FORK (1ull << 1)
#define FM_FEATURE_EVENT_REMAP (1ull << 2)
#define FM_FEATURE_EVENT_REMOVE (1ull << 3)
#define FM_FEATURE_EVENT_UNMAP (1ull << 6)
#define FM_FEATURE_POISON (1ull << 14)
#define FM_FEATURE_MOVE (1ull << 16)
#define FM_FEATURES_NEEDED (FM_FEATURE_WP | FM_FEATURE_EVENT_REMAP | FM_FEATURE_EVENT_REMOVE | FM_FEATURE_EVENT_UNMAP)

struct fm_uffdio_move {
    uint64_t dst, src, len, mode;
    int64_t move;
};
#define FM_UFFDIO_MOVE _IOWR(0xAA, 0x05, struct fm_uffdio_move)
#define FM_MOVE_DONTWAKE 1ull

struct fm_uffdio_poison {
    uint64_t start, len, mode;
    int64_t updated;
};
#define FM_UFFDIO_POISON _IOWR(0xAA, 0x08, struct fm_uffdio_poison)

#define FM_USER_MODE_ONLY 1           /* UFFD_USER_MODE_ONLY: a flag of the system call, Linux 5.11 */

#define FM_USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)

struct fm_page_region {
    uint64_t start, end, categories;
};
struct fm_pm_scan_arg {
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
    uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
#define FM_PAGEMAP_SCAN _IOWR('f', 16, struct fm_pm_scan_arg)
#define FM_PAGE_IS_PRESENT (1ull << 3)
#define FM_PAGE_IS_SWAPPED (1ull << 4)

#define FM_MADV_PAGEOUT 21
#define FM_MADV_POPULATE_WRITE 23

#endif
