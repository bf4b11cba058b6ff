/* probe.c - see probe.h.  Must not leave a descriptor open, and must not print. */
#include "probe.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "control.h"

/* Newer than the oldest kernel headers that we build with. */
#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif
#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif

static int by_syscall(int flags)
{
    return (int)syscall(SYS_userfaultfd, flags | O_CLOEXEC | O_NONBLOCK);
}

static int by_device(void)
{
    int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    if (device < 0)
        return -1;
    int fd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
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

int fm_word_swap(uint32_t *word, uint32_t from, uint32_t to)
{
    return __atomic_compare_exchange_n(word, &from, to, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
}

uint64_t fm_word_read(uint64_t *word)
{
    return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}
