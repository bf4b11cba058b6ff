/* probe.c - see probe.h.  Must not leave a descriptor open, and must not print. */
#include "probe.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "control.h"
#include "engine/slice.h"
#include "engine/uffd_api.h"

/* Newer than the oldest kernel headers that we build with. */
#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif
#define FM_MFD_NOEXEC_SEAL 8u
#define IO_URING_PARAMS_BYTES 120

_Static_assert(FM_PROBE_FEATURE_WP == FM_FEATURE_WP && FM_PROBE_FEATURE_EVENT_REMAP == FM_FEATURE_EVENT_REMAP &&
               FM_PROBE_FEATURE_EVENT_REMOVE == FM_FEATURE_EVENT_REMOVE &&
               FM_PROBE_FEATURE_EVENT_UNMAP == FM_FEATURE_EVENT_UNMAP &&
               FM_PROBE_FEATURE_SIGBUS == UFFD_FEATURE_SIGBUS && FM_PROBE_FEATURE_POISON == FM_FEATURE_POISON &&
               FM_PROBE_FEATURE_MOVE == FM_FEATURE_MOVE, "the features, once more for Python");

static int by_syscall(int flags)
{
    return (int)syscall(SYS_userfaultfd, flags | O_CLOEXEC | O_NONBLOCK);
}

static int by_device(void)
{
    int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    if (device < 0)
        return -1;
    int fd = ioctl(device, FM_USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
    int saved_errno = errno;
    close(device);
    errno = saved_errno;
    return fd;
}

/* The API ioctl tells what the kernel has, whatever was asked for. */
static uint64_t features_of(int fd)
{
    struct uffdio_api api = {.api = UFFD_API};
    return ioctl(fd, UFFDIO_API, &api) == 0 ? api.features : 0;
}

void fm_probe_userfaultfd(struct fm_probe *probe)
{
    memset(probe, 0, sizeof *probe);
    int fd = by_syscall(0);
    if (fd >= 0) {
        probe->way = FM_UFFD_SYSCALL;
    } else {
        probe->syscall_errno = errno;
        fd = by_device();
        if (fd >= 0)
            probe->way = FM_UFFD_DEVICE;
        else
            probe->device_errno = errno;
    }
    if (fd < 0) {
        fd = by_syscall(UFFD_USER_MODE_ONLY);
        probe->user_mode_only = fd >= 0;
    }
    if (fd >= 0) {
        probe->features = features_of(fd);
        close(fd);
    }
}

/* ---- one call at a time --------------------------------------------------------------------------------- */

static int pagemap_scan(void)
{
    char page[1] = { 0 };
    uint64_t start = (uint64_t)page / FM_PAGE_BYTES * FM_PAGE_BYTES;
    struct fm_page_region region;
    struct fm_pm_scan_arg arg = { .size = sizeof arg, .start = start, .end = start + FM_PAGE_BYTES,
                                  .vec = (uint64_t)&region, .vec_len = 1,
                                  .category_anyof_mask = FM_PAGE_IS_PRESENT, .return_mask = FM_PAGE_IS_PRESENT };
    int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (pagemap < 0)
        return -1;
    int r = ioctl(pagemap, FM_PAGEMAP_SCAN, &arg);
    int saved_errno = errno;
    close(pagemap);
    errno = saved_errno;
    return r;
}

static int populate_write(void)
{
    void *page = mmap(NULL, FM_PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED)
        return -1;
    int r = madvise(page, FM_PAGE_BYTES, FM_MADV_POPULATE_WRITE);
    int saved_errno = errno;
    munmap(page, FM_PAGE_BYTES);
    errno = saved_errno;
    return r;
}

/* As job.py makes it: Linux before 6.3 does not know the seal, and needs none. */
static int memfd(void)
{
    int fd = (int)syscall(SYS_memfd_create, "farmem-probe", MFD_CLOEXEC | MFD_ALLOW_SEALING | FM_MFD_NOEXEC_SEAL);
    if (fd < 0 && errno == EINVAL)
        fd = (int)syscall(SYS_memfd_create, "farmem-probe", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    return fd;
}

static int io_uring(void)
{
    char params[IO_URING_PARAMS_BYTES] = { 0 };
    return (int)syscall(SYS_io_uring_setup, 1, params);
}

/* A flag that no kernel knows: EINVAL says that there is such a call, and it closes nothing. */
static int close_range_there(void)
{
    int r = (int)syscall(SYS_close_range, ~0u, ~0u, 1u << 31);
    return r < 0 && errno == EINVAL ? 0 : r;
}

/* The result, closed if it is a descriptor. */
static int32_t tried(int fd)
{
    if (fd < 0)
        return errno;
    close(fd);
    return 0;
}

int32_t fm_probe_call(uint32_t call)
{
    switch (call) {
    case FM_CALL_USER_MODE: return tried(by_syscall(UFFD_USER_MODE_ONLY));
    case FM_CALL_DEVICE: return tried(by_device());
    case FM_CALL_PAGEMAP_SCAN: return pagemap_scan() < 0 ? errno : 0;
    case FM_CALL_POPULATE_WRITE: return populate_write() < 0 ? errno : 0;
    case FM_CALL_CLOSE_RANGE: return close_range_there() < 0 ? errno : 0;
    case FM_CALL_MEMFD: return tried(memfd());
    case FM_CALL_PIDFD: return tried((int)syscall(SYS_pidfd_open, getpid(), 0));
    case FM_CALL_IO_URING: return tried(io_uring());
    default: return EINVAL;
    }
}

/* ---- words of shared memory ----------------------------------------------------------------------------- */

int fm_word_swap(uint32_t *word, uint32_t from, uint32_t to)
{
    return __atomic_compare_exchange_n(word, &from, to, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
}

uint64_t fm_word_read(uint64_t *word)
{
    return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

void fm_word_write(uint64_t *word, uint64_t value)
{
    __atomic_store_n(word, value, __ATOMIC_RELEASE);
}

void fm_choose_soon(void) { fm_run_soon(); }
