/* preload.h - what the files that interpose calls share. */
#ifndef FM_PRELOAD_H
#define FM_PRELOAD_H

#include <errno.h>

#define EXPORT __attribute__((visibility("default")))

/* shim.c: from now on somebody else may be reading pages that have left the program. */
void fm_frames_are_shared(void);

/* What libc makes of a system call's result. */
static inline long fm_libc_result(long r)
{
    if (r < 0 && r > -4096) {
        errno = (int)-r;
        return -1;
    }
    return r;
}

#endif
