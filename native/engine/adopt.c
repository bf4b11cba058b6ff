/* adopt.c - which memory is managed: the program's anonymous mappings, as /proc/self/maps shows them.
 *
 * Never adopted: our own memory, thread stacks with the control block and TLS on top of them, the main stack, what
 * belongs to a shared library, and mappings too small to matter.  Decided by addresses; names are decoration.
 */
#include <errno.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>

#include "engine/engine.h"
#include "engine/uffd_api.h"
#include "fm_assert.h"

#define SMALLEST_BYTES (256u << 10)
#define STACK_GUESS_BYTES (16ull << 20)
#define STACK_PART_BYTES (8ull << 20)
#define RANGES_MAX 8192u
#define HEADS_MAX 4096u
#define FIXED_MAX 2048u

struct span {
    uint64_t start, end;
};

struct mapping {
    uint64_t start, end;
    bool anonymous, private, writable;
    const char *path;
};

/* One scan at a time (fork_lock), so its working memory is static. */
static char text[65536];
static struct span found[RANGES_MAX];
static uint32_t found_n;
static uint64_t heads[HEADS_MAX];          /* of the robust lists of living threads */
static struct span fixed[FIXED_MAX];       /* never adopted: our own memory, control blocks */
static uint32_t heads_n, fixed_n;

/* ---- thread stacks and control blocks ------------------------------------------------------------- */

struct dirent64_head {
    uint64_t ino;
    int64_t off;
    uint16_t reclen;
    uint8_t type;
    char name[];
};

/* The robust list's head lies in a thread's control block, whatever libc put it there: so it tells where that is. */
static void keep_out_thread(long tid)
{
    uint64_t head = 0, len = 0;
    if (fm_sys(SYS_get_robust_list, tid, &head, &len) != 0 || head == 0)
        return;
    fm_tcb_note(head);                     /* so that its pages stay left out when the thread has gone */
    if (heads_n < HEADS_MAX)
        heads[heads_n++] = head;
}

static void list_threads(void)
{
    heads_n = 0;
    fm_sys(SYS_lseek, fm.tasks, 0, 0);
    for (;;) {
        long n = fm_sys(SYS_getdents64, fm.tasks, text, sizeof text);
        if (n <= 0)
            return;
        for (long at = 0; at < n;) {
            struct dirent64_head *d = (struct dirent64_head *)(text + at);
            long tid = 0;
            for (const char *s = d->name; *s >= '0' && *s <= '9'; s++)
                tid = tid * 10 + (*s - '0');
            if (tid != 0)
                keep_out_thread(tid);
            at += d->reclen;
        }
    }
}

/* ---- /proc/self/maps -------------------------------------------------------------------------------- */

static uint64_t hex(const char **s)
{
    uint64_t v = 0;
    for (;; (*s)++) {
        char ch = **s;
        if (ch >= '0' && ch <= '9')
            v = v * 16 + (uint64_t)(ch - '0');
        else if (ch >= 'a' && ch <= 'f')
            v = v * 16 + (uint64_t)(ch - 'a' + 10);
        else
            return v;
    }
}

static const char *skip_word(const char *s)
{
    while (*s != 0 && *s != ' ')
        s++;
    while (*s == ' ')
        s++;
    return s;
}

/* "start-end perms offset dev inode path" */
static struct mapping parse(const char *line)
{
    struct mapping m = { 0 };
    const char *s = line;
    m.start = hex(&s);
    s++;
    m.end = hex(&s);
    s = skip_word(s);
    m.writable = s[1] == 'w';
    m.private = s[3] == 'p';
    s = skip_word(skip_word(skip_word(s)));
    m.anonymous = s[0] == '0' && s[1] == ' ';
    if (s[0] == '0' && s[1] == 0)
        m.anonymous = true;
    m.path = skip_word(s);
    return m;
}

static bool each_mapping(void (*use)(const struct mapping *m))
{
    uint64_t offset = 0;
    uint32_t have = 0;
    for (;;) {
        long n = fm_sys(SYS_pread64, fm.maps, text + have, sizeof text - 1 - have, offset);
        if (n < 0)
            return false;
        if (n == 0)
            return true;
        offset += (uint64_t)n;
        have += (uint32_t)n;
        text[have] = 0;
        char *line = text, *end;
        while ((end = strchr(line, '\n')) != NULL) {
            *end = 0;
            struct mapping m = parse(line);
            use(&m);
            line = end + 1;
        }
        have -= (uint32_t)(line - text);
        __builtin_memmove(text, line, have);
    }
}

static struct span sought;
static bool seen_there;

static void seek(const struct mapping *m)
{
    if (m->start < sought.end && m->end > sought.start)
        seen_there = true;
}

bool fm_mapped(uint64_t start, uint64_t end)
{
    sought = (struct span){ start, end };
    seen_there = false;
    return !each_mapping(seek) || seen_there;
}

/* ---- which mappings ----------------------------------------------------------------------------------- */

/* Neighbours count as one: an arena that grows by small steps is a large mapping to us. */
static struct {
    uint64_t file_end;          /* where the last mapping of a shared library ended: its .bss begins there */
    uint32_t run_first;         /* in found[] */
    uint64_t run_end, run_bytes;
    bool run_managed;           /* a part of it is managed already: a rest of what was larger, and maybe grown in place since */
    bool io_uring;
} scan;

static void end_run(void)
{
    if (scan.run_bytes < SMALLEST_BYTES && !scan.run_managed)
        found_n = scan.run_first;
    scan.run_first = found_n;
    scan.run_bytes = 0;
    scan.run_managed = false;
}

static void candidate(uint64_t start, uint64_t end)
{
    if (start >= end || found_n == RANGES_MAX)
        return;
    if (start != scan.run_end)
        end_run();
    struct fm_range r;
    found[found_n++] = (struct span){ start, end };
    scan.run_managed |= fm_ranges_next(&fm.core.managed, start / FM_PAGE_BYTES, end / FM_PAGE_BYTES, &r);
    scan.run_bytes += end - start;
    scan.run_end = end;
}

static bool adopts_tls(void) { return (fm.control->defects & FM_DEFECT_ADOPT_TLS) != 0; }

static void list_fixed(void)
{
    struct span s;
    fixed_n = 0;
    for (uint32_t k = 0; fixed_n < FIXED_MAX && fm_own_span(k, &s.start, &s.end); k++)
        fixed[fixed_n++] = s;
    for (uint32_t at = 0; !adopts_tls() && fixed_n < FIXED_MAX && fm_tcb_next(&at, &s.start, &s.end);)
        fixed[fixed_n++] = s;
}

/* By addresses, not by mapping: the kernel merges neighbours, and one of them may be ours. */
static void without_fixed(uint64_t start, uint64_t end)
{
    for (uint32_t k = 0; k < fixed_n; k++) {
        struct span s = fixed[k];
        if (s.start >= end || s.end <= start)
            continue;
        if (s.start > start)
            without_fixed(start, s.start);
        if (s.end < end)
            without_fixed(s.end, end);
        return;
    }
    candidate(start, end);
}

/* What of a mapping is left without the threads that live in it. */
static void without_threads(uint64_t start, uint64_t end)
{
    for (uint32_t k = 0; k < heads_n && !adopts_tls(); k++) {
        uint64_t head = heads[k];
        if (head < start || head >= end)
            continue;
        uint64_t from = head - start <= STACK_GUESS_BYTES ? start : head - STACK_PART_BYTES;
        uint64_t to = (head + 2 * FM_PAGE_BYTES) & ~(uint64_t)(FM_PAGE_BYTES - 1);
        without_threads(start, from);
        without_threads(to < end ? to : end, end);
        return;
    }
    without_fixed(start, end);
}

static bool plain_anonymous(const struct mapping *m)
{
    bool unnamed = m->path[0] == 0 || strcmp(m->path, "[heap]") == 0 || strncmp(m->path, "[anon", 5) == 0;
    return m->anonymous && m->private && unnamed &&
           m->start < (1ull << 47);
}

static void consider(const struct mapping *m)
{
    if (!m->anonymous && m->private && m->writable && m->path[0] == '/')
        scan.file_end = strcmp(m->path, fm.exe) == 0 ? 0 : m->end;
    if (strstr(m->path, "[io_uring]") != NULL && !fm_file_mapped(m->start))
        scan.io_uring = true;
    if (!plain_anonymous(m) || (scan.file_end != 0 && m->start == scan.file_end))
        return;
    without_threads(m->start, m->end);
}

/* ---- taking over ----------------------------------------------------------------------------------------- */

static void found_pages(uint64_t start, uint64_t end)
{
    struct fm_page_region region[64];
    while (fm.pagemap_scan && start < end) {
        struct fm_pm_scan_arg a = { .size = sizeof a, .start = start, .end = end, .vec = (uint64_t)region, .vec_len = 64,
                                    .category_anyof_mask = FM_PAGE_IS_PRESENT | FM_PAGE_IS_SWAPPED,
                                    .return_mask = FM_PAGE_IS_PRESENT };
        long n = fm_sys(SYS_ioctl, fm.pagemap, FM_PAGEMAP_SCAN, &a);
        if (n < 0) {
            fm.pagemap_scan = false;
            break;
        }
        for (long k = 0; k < n; k++)
            fm_core_found(&fm.core, region[k].start / FM_PAGE_BYTES,
                          (uint32_t)((region[k].end - region[k].start) / FM_PAGE_BYTES));
        start = a.walk_end;
    }
    while (start < end) {            /* Linux before 6.7: look at every page, but make records only where one is */
        uint64_t there[FM_BLOCK_PAGES / 64] = { 0 }, any = 0, n = (end - start) / FM_PAGE_BYTES;
        n = n < FM_BLOCK_PAGES ? n : FM_BLOCK_PAGES;
        fm_engine_ops.present(NULL, start / FM_PAGE_BYTES, (uint32_t)n, there);
        for (uint32_t w = 0; w < FM_BLOCK_PAGES / 64; w++)
            any |= there[w];
        if (any != 0)
            fm_core_found(&fm.core, start / FM_PAGE_BYTES, (uint32_t)n);
        start += n * FM_PAGE_BYTES;
    }
}

static bool fork_is_ignored(void) { return (fm.control->defects & FM_DEFECT_IGNORE_FORK) != 0; }

/* A piece that is registered with us is managed from now on.  Children of a fork that does not go through our handlers don't
 * get it at all: they fault hard instead of reading zeros. */
static void manage(uint64_t start, uint64_t end)
{
    if (!fork_is_ignored())
        fm_sys(SYS_madvise, start, end - start, MADV_DONTFORK);
    fm_core_managed(&fm.core, start / FM_PAGE_BYTES, (end - start) / FM_PAGE_BYTES);
    __atomic_add_fetch(&fm.proc->counters.managed_bytes, end - start, __ATOMIC_RELAXED);
}

/* The unmanaged parts of found[] replace it. */
static void only_new(void)
{
    uint32_t n = found_n;
    for (uint32_t k = 0; k < n; k++) {
        uint64_t at = found[k].start / FM_PAGE_BYTES, end = found[k].end / FM_PAGE_BYTES;
        struct fm_range r;
        found[k].end = found[k].start;
        while (at < end) {
            bool some = fm_ranges_next(&fm.core.managed, at, end, &r);
            uint64_t to = some ? r.page : end;
            if (to > at && found_n < RANGES_MAX)
                found[found_n++] = (struct span){ at * FM_PAGE_BYTES, to * FM_PAGE_BYTES };
            at = some ? r.end : end;
        }
    }
    for (uint32_t k = n; k < found_n; k++)
        found[k - n] = found[k];
    found_n -= n;
}

static void look_at_maps(void)
{
    list_threads();
    list_fixed();
    found_n = 0;
    __builtin_memset(&scan, 0, sizeof scan);
    each_mapping(consider);
    end_run();
    if (scan.io_uring && !fm.core.frames_shared)
        fm_core_share_frames(&fm.core);
}

/* What was seen in the maps is not registered, so it may be unmapped without a word, or in part, and its place be used anew,
 * before or after it is registered.  But a mapping is registered as a whole or not at all: what lies within a single one
 * afterwards, and was registered by itself, is ours.  The rest is looked at again the next time. */
static struct {
    uint32_t next, kept;         /* in found[] */
} confirm;

static void confirm_within(const struct mapping *m)
{
    for (; confirm.next < found_n && found[confirm.next].start < m->end; confirm.next++) {
        struct span s = found[confirm.next];
        if (s.start >= m->start && s.end <= m->end)
            found[confirm.kept++] = s;
    }
}

/* Of found[] what can be registered; each only while no event is unread: what was moved to its place is known by one alone. */
static bool register_found(void)
{
    uint32_t n = 0;
    bool same = true;
    for (uint32_t k = 0; same && k < found_n; k++) {
        same = !fm_uffd_changing();
        if (same && fm_uffd_register(found[k].start, found[k].end))
            found[n++] = found[k];
    }
    found_n = n;
    confirm.next = confirm.kept = 0;
    if (n > 0)
        each_mapping(confirm_within);
    found_n = confirm.kept;
    return same;
}

/* Take over what has appeared since: found[] is what was.  False: something else happens to the address space meanwhile. */
static bool take_over_new(void)
{
    uint64_t seen = fm.mm_events;
    found_n = 0;
    if (fm_uffd_changing())
        return false;
    look_at_maps();
    fm_world_take(&fm.world);
    bool same = !fm_uffd_changing() && fm.mm_events == seen;
    if (same)
        only_new();
    else
        found_n = 0;
    same = same && register_found();
    for (uint32_t k = 0; k < found_n; k++)
        manage(found[k].start, found[k].end);
    fm_world_release(&fm.world);
    return same;
}

/* Only a picture of the address space that no unread event contradicts may be acted on. */
bool fm_adopt_scan(void)
{
    if (fm.regions_only)
        return true;
    fm_uffd_quiet_begin();
    bool same = take_over_new();
    fm_uffd_quiet_end();
    for (uint32_t k = 0; k < found_n; k++)
        found_pages(found[k].start, found[k].end);
    /* A thread that began while we looked was told that its stack is not managed; or never asked (thrd_create). */
    if (same && !adopts_tls()) {
        list_threads();
        fm_tcbs_keep();
    }
    return same;
}

enum fm_res fm_adopt_range(uint64_t start, uint64_t end)
{
    bool all = true;
    fm_world_take(&fm.world);
    bool changing = fm_uffd_changing();
    if (!changing) {
        found[0] = (struct span){ start, end };
        found_n = 1;
        only_new();
        for (uint32_t k = 0; k < found_n; k++) {
            bool ok = fm_uffd_register(found[k].start, found[k].end);
            if (ok)
                manage(found[k].start, found[k].end);
            all = all && ok;
        }
    }
    fm_world_release(&fm.world);
    if (changing || !all)
        return changing ? FM_AGAIN : FM_REFUSED;
    found_pages(start, end);
    return FM_OK;
}

void fm_managed_advise(int advice)
{
    for (uint32_t k = 0; k < fm.core.managed.n; k++) {
        struct fm_range r = fm.core.managed.at[k];
        fm_sys(SYS_madvise, r.page * FM_PAGE_BYTES, (r.end - r.page) * FM_PAGE_BYTES, advice);
    }
}

/* ---- the engine's own set-up --------------------------------------------------------------------------- */

static void transfer_done(struct fm_io *io)
{
    fm_core_io_done(&fm.core, io);
    __atomic_sub_fetch(&fm.io_busy, 1, __ATOMIC_ACQ_REL);
}

static bool staging_open(void)
{
    uint64_t bytes = (uint64_t)FM_FRAMES * FM_PAGE_BYTES;
    int place = fm.frames != NULL ? MAP_FIXED_NOREPLACE : 0;      /* in a forked child: where the parent has its own */
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | place;
    long r = fm_sys(SYS_mmap, fm.frames, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if ((r < 0 && r > -4096) || (place != 0 && r != (long)fm.frames))
        return false;
    fm.frames = (char *)r;
    fm_sys(SYS_madvise, r, bytes, MADV_DONTFORK);
    fm_sys(SYS_madvise, r, bytes, MADV_NOHUGEPAGE);
    return fm_uffd_register((uint64_t)r, (uint64_t)r + bytes);
}

static bool trim_extent(void *ctx, uint32_t extent)
{
    struct fm_backend *b = ctx;
    return b->trim(b, extent);
}

_Static_assert(FM_FRAMES <= FM_BACKEND_FRAMES_MAX, "backends have places for so many");

static bool pool_open(void)
{
    struct fm_core *c = &fm.core;
    fm_pool_ledger_view(&c->ledger, fm.ledger_base, fm.slot);
    fm.chain = (struct fm_chain){ .frames = fm.frames, .ledger = &c->ledger, .count = &fm.proc->counters, .pool = fm.pool,
                                  .pool_fd = fm.pool_fd, .file_io = fm.control->file_io, .pool_bytes = fm.control->pool_bytes,
                                  .servers = fm.control->pool_servers, .thread = fm_thread_start, .done = transfer_done,
                                  .say = fm_say, .gate_in = fm_fork_gate_in, .gate_out = fm_fork_gate_out };
    fm.backend = fm_chain_open(&fm.chain, fm.control);
    if (fm.backend == NULL)
        return false;
    c->ledger.trim = trim_extent;
    c->ledger.trim_ctx = fm.backend;
    return true;
}

static void core_setup(void)
{
    struct fm_core *c = &fm.core;
    c->ops = &fm_engine_ops;
    c->count = &fm.proc->counters;
    c->defects = fm.control->defects;
    c->evict_mode = fm.control->evict_mode;
    c->can_move = (fm.features & FM_FEATURE_MOVE) != 0;
    c->can_poison = (fm.features & FM_FEATURE_POISON) != 0;
}

static void mark_adopted(void)
{
    fm.pagemap_scan = true;
    __atomic_store_n(&fm.proc->state, FM_PROC_ADOPTED, __ATOMIC_RELEASE);
}

/* A userfaultfd, and a duplicate of it with the supervisor. */
bool fm_prepare(void)
{
    if (!fm.prepared && fm_uffd_open()) {
        fm.prepared = fm_wire_hold();
        if (!fm.prepared)
            fm_sys(SYS_close, fm.uffd);
    }
    return fm.prepared;
}

bool fm_adopt(void)
{
    if (!fm_prepare() || !fm_heap_open() || !staging_open()) {
        fm_say(FM_LEVEL_ERROR, "memory can't be managed: userfaultfd, the supervisor, or memory for the engine can't be had.", 0);
        return false;
    }
    core_setup();
    fm_core_init(&fm.core, FM_FRAMES);
    __atomic_store_n(&fm.proc->adopted, 1, __ATOMIC_RELEASE);
    if (!pool_open()) {
        fm_say(FM_LEVEL_ERROR, "memory can't be managed: the pool can't be opened.", 0);
        return false;
    }
    if (!fm_thread_start(fm_front_thread_main, NULL) || !fm_thread_start(fm_evictor_main, NULL)) {
        fm_say(FM_LEVEL_ERROR, "memory can't be managed: the engine can't have threads here.", 0);
        return false;
    }
    mark_adopted();
    __atomic_store_n(&fm.state, FM_ENGINE_ADOPTED, __ATOMIC_SEQ_CST);
    fm_adopt_scan();
    return true;
}

static void register_again(const struct mapping *m)
{
    struct fm_range r;
    uint64_t end = m->end / FM_PAGE_BYTES;
    if (!plain_anonymous(m))
        return;
    for (uint64_t at = m->start / FM_PAGE_BYTES; at < end && fm_ranges_next(&fm.core.managed, at, end, &r); at = r.end) {
        if (!fm_uffd_register(r.page * FM_PAGE_BYTES, r.end * FM_PAGE_BYTES))
            fm_panic("memory of a forked child can't be registered", __FILE__, __LINE__);
        fm_sys(SYS_madvise, r.page * FM_PAGE_BYTES, (r.end - r.page) * FM_PAGE_BYTES, MADV_DONTFORK);
    }
}

/* There is no supervisor any more: take the slot that the parent reserved, unless it was taken back. */
static bool claim_slot(uint32_t slot)
{
    struct fm_proc *p = &fm.control->procs[slot];
    uint32_t reserved = FM_PROC_FORKING;
    if (!__atomic_compare_exchange_n(&p->state, &reserved, FM_PROC_LIVE, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED))
        return false;
    p->pid = fm.pid;
    fm.slot = slot;
    fm.proc = p;
    return true;
}

bool fm_adopt_forked(uint32_t slot)
{
    bool alone = !fm_wire_join(slot);
    if (alone && (fm_wire_refused() || !claim_slot(slot) || !fm_wire_pool_of_parent()))
        return false;
    if (!fm_uffd_open() || !staging_open())
        return false;
    core_setup();
    if (!pool_open())
        return false;
    fm_core_forked(&fm.core);
    fm.core.limit_pages = fm.core.local_pages + 2 * (int64_t)FM_FRAMES;   /* until the watcher knows better */
    if (!fm_thread_start(fm_front_thread_main, NULL) || !fm_thread_start(fm_evictor_main, NULL))
        return false;
    each_mapping(register_again);
    mark_adopted();
    if (alone)
        fm_keeper_start();                        /* holds the userfaultfd as well, so not before there is one */
    return alone || fm_wire_hold();
}
