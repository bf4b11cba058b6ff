/* uffd.c - the core's operations on the real kernel.
 *
 * One function says what each error means, for all ioctls.  The quick operations never wait for an event; those
 * that may (madvise on registered memory) are called by the core outside every lock.
 */
#include "engine/uffd_api.h"

#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <sys/mman.h>

#include "engine/engine.h"
#include "engine/hash.h"
#include "fm_assert.h"

#define CHANGING_LOOKS 20u
#define CHANGING_NS 20000

enum fm_res fm_uffd_meaning(long err)
{
    switch (-err) {
    case 0: return FM_OK;
    case EEXIST: return FM_EXIST;
    case EAGAIN: return FM_AGAIN;
    case ENOENT:                     /* the mapping, or the page in it, is not there any more */
    case EFAULT:
    case ESRCH:
    case ENOSPC: return FM_GONE;
    case EBUSY: return FM_BUSY;
    case EINVAL: return FM_REFUSED;
    default: return FM_FAIL;
    }
}

static uint64_t addr(uint64_t page) { return page * FM_PAGE_BYTES; }
static uint64_t frame_addr(uint32_t f) { return (uint64_t)fm.frames + (uint64_t)f * FM_PAGE_BYTES; }

/* An ioctl that stops half-way reports the bytes it did in its own field, and EAGAIN or the error. */
static enum fm_res outcome(long r, int64_t bytes, uint32_t n, uint32_t *done)
{
    *done = bytes > 0 ? (uint32_t)(bytes / FM_PAGE_BYTES) : 0;
    if (r == 0 || *done == n) {
        *done = n;
        return FM_OK;
    }
    return fm_uffd_meaning(bytes < 0 ? bytes : r);
}

static void op_wake(void *ctx, uint64_t page, uint32_t n)
{
    (void)ctx;
    struct uffdio_range r = { addr(page), addr(n) };
    fm_sys(SYS_ioctl, fm.uffd, UFFDIO_WAKE, &r);
}

static void op_later(void *ctx, uint64_t page)
{
    if (!fm_front_thread_later(page))
        op_wake(ctx, page, 1);
}

static void op_present(void *ctx, uint64_t page, uint32_t n, uint64_t *bits)
{
    uint64_t entry[64];
    (void)ctx;
    for (uint32_t k = 0; k < n; k += 64) {
        uint32_t m = n - k < 64 ? n - k : 64;
        long r = fm_sys(SYS_pread64, fm.pagemap, entry, m * sizeof entry[0], (page + k) * sizeof entry[0]);
        if (r != (long)(m * sizeof entry[0]))
            fm_panic("the page map can't be read, and without it a page that is there looks missing", __FILE__, __LINE__);
        bits[k / 64] = 0;
        for (uint32_t j = 0; j < m; j++)
            bits[k / 64] |= (uint64_t)((entry[j] >> 62) != 0) << j;   /* present, or in the host's own swap */
    }
}

static enum fm_res op_zero(void *ctx, uint64_t page, uint32_t n, uint32_t *done)
{
    (void)ctx;
    struct uffdio_zeropage z = { .range = { addr(page), addr(n) } };
    long r = fm_sys(SYS_ioctl, fm.uffd, UFFDIO_ZEROPAGE, &z);
    return outcome(r, z.zeropage, n, done);
}

static enum fm_res copy(uint64_t to, uint64_t from, uint32_t n, uint32_t *done)
{
    struct uffdio_copy c = { .dst = to, .src = from, .len = addr(n) };
    long r = fm_sys(SYS_ioctl, fm.uffd, UFFDIO_COPY, &c);
    return outcome(r, c.copy, n, done);
}

static char zeros[FM_WINDOW_MAX * FM_PAGE_BYTES] __attribute__((aligned(4096)));

static enum fm_res copy_zeros(uint64_t to, uint32_t n, uint32_t *done)
{
    enum fm_res r = FM_OK;
    *done = 0;
    while (*done < n && r == FM_OK) {
        uint32_t k = n - *done < FM_WINDOW_MAX ? n - *done : FM_WINDOW_MAX, part;
        r = copy(to + addr(*done), (uint64_t)zeros, k, &part);
        *done += part;
    }
    return r;
}

static enum fm_res op_copy_in(void *ctx, uint64_t page, uint32_t frame, uint32_t n, uint32_t *done)
{
    (void)ctx;
    if (frame == FM_FRAME_NONE)
        return copy_zeros(addr(page), n, done);
    return copy(addr(page), frame_addr(frame), n, done);
}

static enum fm_res op_fill_frames(void *ctx, uint32_t frame, uint32_t n, uint32_t *done)
{
    (void)ctx;
    return copy_zeros(frame_addr(frame), n, done);
}

/* How many of the n frames from f on are filled (or not), up to the first that is otherwise. */
static uint32_t frames_alike(uint32_t f, uint32_t n, bool filled)
{
    uint64_t bits[FM_BLOCK_PAGES / 64];
    uint32_t k = 0;
    op_present(NULL, frame_addr(f) / FM_PAGE_BYTES, n, bits);
    while (k < n && (bits[k / 64] >> (k % 64) & 1) == filled)
        k++;
    return k;
}

/* Linux 6.18 can move pages, not count them, and say EEXIST: when a first try in the kernel met a page table entry that
 * was just changing (another thread's access, madvise(MADV_COLD), DAMON), the second one's success is taken for one more
 * failure.  So what the call says is believed only where it is confirmed: the frame is ours alone, and is filled
 * if and only if its page is out.  The reason for stopping counts only if the first page met it. */
static enum fm_res move(uint64_t page, uint32_t frame, uint32_t n, bool out, uint32_t *done)
{
    *done = 0;
    for (;;) {
        uint64_t program = addr(page + *done), staging = frame_addr(frame + *done);
        struct fm_uffdio_move m = { .dst = out ? staging : program, .src = out ? program : staging,
                                    .len = addr(n - *done), .mode = out ? FM_MOVE_DONTWAKE : 0 };
        uint32_t said, more = 0;
        enum fm_res r = outcome(fm_sys(SYS_ioctl, fm.uffd, FM_UFFDIO_MOVE, &m), m.move, n - *done, &said);
        *done += said;
        if (r == FM_OK)
            return r;
        if ((fm.control->defects & FM_DEFECT_BELIEVE_MOVE) == 0)
            more = frames_alike(frame + *done, n - *done, out);
        if (more > 0 && !out)
            op_wake(NULL, page + *done, more);
        *done += more;
        if (*done == n)
            return FM_OK;
        if (said + more == 0)
            return r;
    }
}

static enum fm_res op_move_in(void *ctx, uint64_t page, uint32_t frame, uint32_t n, uint32_t *done)
{
    (void)ctx;
    return move(page, frame, n, false, done);
}

static enum fm_res op_move_out(void *ctx, uint64_t page, uint32_t frame, uint32_t n, uint32_t *done)
{
    (void)ctx;
    return move(page, frame, n, true, done);
}

static enum fm_res op_protect(void *ctx, uint64_t page, uint32_t n, bool on)
{
    (void)ctx;
    struct uffdio_writeprotect w = { .range = { addr(page), addr(n) }, .mode = on ? UFFDIO_WRITEPROTECT_MODE_WP : 0 };
    return fm_uffd_meaning(fm_sys(SYS_ioctl, fm.uffd, UFFDIO_WRITEPROTECT, &w));
}

/* Linux before 6.6 has no SIGBUS for a page that can't be had.  What its ioctl would have told is asked for: while an
 * event is still to be read the page may be elsewhere, or gone, and nothing is wrong. */
static enum fm_res end_instead_of_poison(uint64_t page)
{
    if (fm_uffd_changing())
        return FM_AGAIN;
    fm_say(FM_LEVEL_ERROR, "a page that can't be had was touched, and before Linux 6.6 that ends the program; address",
           addr(page));
    fm_end_program();
}

static enum fm_res op_poison(void *ctx, uint64_t page)
{
    (void)ctx;
    struct fm_uffdio_poison p = { .start = addr(page), .len = addr(1) };
    if (!fm.core.can_poison)
        return end_instead_of_poison(page);
    return fm_uffd_meaning(fm_sys(SYS_ioctl, fm.uffd, FM_UFFDIO_POISON, &p));
}

static void op_clear(void *ctx, uint32_t frame, uint32_t n)
{
    (void)ctx;
    __builtin_memset((void *)frame_addr(frame), 0, addr(n));
}

/* The first word is rewritten first: a page that the program freed with MADV_FREE is the kernel's to take as long as it
 * is clean, and it must not go between this look and the store. */
static bool op_hash(void *ctx, uint32_t frame, uint64_t hash[2])
{
    volatile uint64_t *word = (uint64_t *)frame_addr(frame);
    (void)ctx;
    *word = *word;
    return fm_hash_page((void *)frame_addr(frame), fm.control->secret, hash);
}

/* Through /proc/self/mem: it reads pages of any protection, and gives an error where there is none. */
static bool op_read_page(void *ctx, uint64_t page, uint32_t frame)
{
    (void)ctx;
    return fm_sys(SYS_pread64, fm.mem, frame_addr(frame), FM_PAGE_BYTES, addr(page)) == FM_PAGE_BYTES;
}

/* What we drop ourselves raises events like anybody's.  An evictor that empties staging raises one after the other, and
 * whoever needs a moment without any would never have it. */
static long drop(uint64_t at, uint64_t bytes, int advice)
{
    while (__atomic_load_n(&fm.looking, __ATOMIC_ACQUIRE) != 0)
        fm_futex_wait(&fm.looking, 1, 1000000);
    fm_lock_take(&fm.own_events);
    long r = fm_sys(SYS_madvise, at, bytes, advice);
    fm_lock_drop(&fm.own_events);
    return r;
}

void fm_uffd_quiet_begin(void)
{
    __atomic_store_n(&fm.looking, 1, __ATOMIC_SEQ_CST);
    fm_lock_take(&fm.own_events);
}

void fm_uffd_quiet_end(void)
{
    fm_lock_drop(&fm.own_events);
    __atomic_store_n(&fm.looking, 0, __ATOMIC_SEQ_CST);
    fm_futex_wake(&fm.looking, 1);
}

static void op_settle(void *ctx)
{
    (void)ctx;
    for (uint32_t looks = 0; fm_uffd_changing(); looks++)
        if (looks >= CHANGING_LOOKS)
            fm_sleep_ns(CHANGING_NS);
}

/* An event that is unread may say that the address was another page's by the time of the call. */
static enum fm_res op_free_lazily(void *ctx, uint64_t page, uint32_t n)
{
    int advice = (fm.control->defects & FM_DEFECT_DROP_BY_ADDRESS) != 0 ? MADV_DONTNEED : MADV_FREE;
    long r = drop(addr(page), addr(n), advice);
    op_settle(ctx);
    return r == 0 ? FM_OK : FM_FAIL;
}

static void op_page_out(void *ctx, uint64_t page, uint32_t n)
{
    (void)ctx;
    fm_sys(SYS_madvise, addr(page), addr(n), FM_MADV_PAGEOUT);
}

static enum fm_res op_unshare(void *ctx, uint64_t page, uint32_t n)
{
    (void)ctx;
    return fm_uffd_meaning(fm_sys(SYS_madvise, addr(page), addr(n), FM_MADV_POPULATE_WRITE));
}

/* What is not writable is written to past its protection: the byte that is there, which nobody can change unless he
 * makes the page writable between the two calls. */
static enum fm_res op_undo_free(void *ctx, uint64_t page, uint32_t n)
{
    char byte;
    enum fm_res r = op_unshare(ctx, page, n);
    for (uint32_t k = 0; k < n && r == FM_REFUSED; k++)
        if (fm_sys(SYS_pread64, fm.mem, &byte, 1, addr(page + k)) == 1)
            fm_sys(SYS_pwrite64, fm.mem, &byte, 1, addr(page + k));
    return r;
}

static void op_drop_frames(void *ctx, uint32_t frame, uint32_t n)
{
    (void)ctx;
    drop(frame_addr(frame), addr(n), MADV_DONTNEED);
}

static void op_submit(void *ctx, struct fm_io *io)
{
    (void)ctx;
    __atomic_add_fetch(&fm.io_busy, 1, __ATOMIC_ACQ_REL);
    fm.backend->submit(fm.backend, io);
}

static bool op_grant(void *ctx, uint32_t extent)
{
    (void)ctx;
    return fm.backend->grant(fm.backend, extent);
}

static void op_enter(void *ctx)
{
    (void)ctx;
    fm_world_share(&fm.world);
}

static void op_leave(void *ctx)
{
    (void)ctx;
    fm_world_unshare(&fm.world);
}

/* Blocks are made one at a time from chunks of the heap. */
static struct fm_block *op_block_memory(void *ctx)
{
    (void)ctx;
    return fm_heap_take(sizeof(struct fm_block));
}

static void *op_memory(void *ctx, void *old, uint64_t old_bytes, uint64_t bytes)
{
    (void)ctx;
    if (old != NULL)
        fm_heap_give(old, old_bytes);
    return bytes > 0 ? fm_heap_take(bytes) : NULL;
}

/* What happens thousands of times is told once a second. */
static void op_message(void *ctx, int level, const char *text, uint64_t number)
{
    static const char *last_text;
    static uint64_t last_ns;
    uint64_t now = fm_now_ns();
    (void)ctx;
    if (text == last_text && now - last_ns < 1000000000ull)
        return;
    last_text = text;
    last_ns = now;
    fm_say(level, text, number);
}

static void op_frames_freed(void *ctx)
{
    (void)ctx;
    if (__atomic_load_n(&fm.parked_n, __ATOMIC_ACQUIRE) > 0 || fm_region_called())
        fm_evictor_ring();
}

const struct fm_ops fm_engine_ops = {
    .enter = op_enter,
    .leave = op_leave,
    .zero = op_zero,
    .move_in = op_move_in,
    .copy_in = op_copy_in,
    .move_out = op_move_out,
    .protect = op_protect,
    .poison = op_poison,
    .wake = op_wake,
    .later = op_later,
    .present = op_present,
    .fill_frames = op_fill_frames,
    .clear = op_clear,
    .hash = op_hash,
    .read_page = op_read_page,
    .free_lazily = op_free_lazily,
    .page_out = op_page_out,
    .settle = op_settle,
    .undo_free = op_undo_free,
    .unshare = op_unshare,
    .drop_frames = op_drop_frames,
    .submit = op_submit,
    .grant = op_grant,
    .block_memory = op_block_memory,
    .memory = op_memory,
    .message = op_message,
    .frames_freed = op_frames_freed,
};

/* ---- the descriptor --------------------------------------------------------------------------------- */

static int open_one(void)
{
    if (fm.control->userfaultfd_way == FM_UFFD_DEVICE) {
        long dev = fm_sys(SYS_openat, AT_FDCWD, "/dev/userfaultfd", O_RDWR | O_CLOEXEC);
        if (dev < 0)
            return (int)dev;
        long fd = fm_sys(SYS_ioctl, dev, FM_USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
        fm_sys(SYS_close, dev);
        return (int)fd;
    }
    int flags = fm.control->userfaultfd_way == FM_UFFD_USER_MODE ? FM_USER_MODE_ONLY : 0;
    return (int)fm_sys(SYS_userfaultfd, flags | O_CLOEXEC | O_NONBLOCK);
}

static bool handshake(int fd, uint64_t want, uint64_t *has)
{
    struct uffdio_api api = { .api = UFFD_API, .features = want };
    long r = fm_sys(SYS_ioctl, fd, UFFDIO_API, &api);
    *has = api.features;
    return r == 0;
}

bool fm_uffd_open(void)
{
    uint64_t has = 0;
    int probe = open_one();
    if (probe < 0)
        return false;
    bool ok = handshake(probe, 0, &has);       /* asks what there is; a descriptor takes one such question */
    fm_sys(SYS_close, probe);
    if (!ok || (has & FM_FEATURES_NEEDED) != FM_FEATURES_NEEDED)
        return false;
    fm.features = FM_FEATURES_NEEDED | (has & (FM_FEATURE_POISON | FM_FEATURE_MOVE));
    fm.uffd = open_one();
    return fm.uffd >= 0 && handshake(fm.uffd, fm.features, &has);
}

bool fm_uffd_register(uint64_t start, uint64_t end)
{
    struct uffdio_register r = { .range = { start, end - start },
                                 .mode = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP };
    return fm_sys(SYS_ioctl, fm.uffd, UFFDIO_REGISTER, &r) == 0;
}

/* Has something happened to the address space whose event is still to be read?  Any page operation tells. */
bool fm_uffd_changing(void)
{
    struct uffdio_writeprotect w = { .range = { frame_addr(0), FM_PAGE_BYTES } };
    return fm_sys(SYS_ioctl, fm.uffd, UFFDIO_WRITEPROTECT, &w) == -EAGAIN;
}
