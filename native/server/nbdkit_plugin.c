/* nbdkit_plugin.c - the data plane of `farmem serve`: leases as exports of nbdkit, which brings the NBD protocol.
 *
 * Started by farmem/pool/nbdkit.py with two inherited descriptors: memory=FD, the memory that is lent, and table=FD, the
 * lease table (lease_table.h).  An export's name is a lease's token: it is looked up, never listed, never written to
 * the log.  Every access asks the table first, so a connection that outlives its lease touches nothing.
 */
#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "fm_assert.h"
#include "lease_table.h"

#define THREAD_MODEL NBDKIT_THREAD_MODEL_PARALLEL
#define ZEROS_BYTES (64 << 10)

static int memory_fd = -1, table_fd = -1;
static unsigned door, parent;
static struct fm_lease_table *table;

struct connection {
    struct fm_lease_view lease;
    char *mapped;    /* huge pages only: the whole lease */
};

void fm_panic(const char *what, const char *file, int line)
{
    nbdkit_error("%s:%d: %s does not hold", file, line, what);
    abort();
}

static int plugin_config(const char *key, const char *value)
{
    if (strcmp(key, "memory") == 0)
        return nbdkit_parse_int(key, value, &memory_fd);
    if (strcmp(key, "table") == 0)
        return nbdkit_parse_int(key, value, &table_fd);
    if (strcmp(key, "door") == 0)
        return nbdkit_parse_unsigned(key, value, &door);
    if (strcmp(key, "parent") == 0)
        return nbdkit_parse_unsigned(key, value, &parent);
    nbdkit_error("there is no parameter %s", key);
    return -1;
}

static int plugin_config_complete(void)
{
    struct stat about;
    if (memory_fd < 0 || table_fd < 0 || door >= FM_LEASE_DOORS_MAX || parent == 0) {
        nbdkit_error("this plugin is started by `farmem serve`");
        return -1;
    }
    if (fstat(table_fd, &about) != 0 || about.st_size < (off_t)sizeof *table) {
        nbdkit_error("the lease table is another version's");
        return -1;
    }
    table = mmap(NULL, sizeof *table, PROT_READ | PROT_WRITE, MAP_SHARED, table_fd, 0);
    if (table == MAP_FAILED) {
        nbdkit_error("the lease table can't be mapped: %m");
        return -1;
    }
    if (!fm_lease_table_fits(table, (uint64_t)about.st_size)) {
        nbdkit_error("the lease table is another version's");
        return -1;
    }
    return 0;
}

/* The memory is of no use without the process that keeps the leases: nobody may go on writing to it. */
static int plugin_after_fork(void)
{
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) != 0 || getppid() != (pid_t)parent) {
        nbdkit_error("`farmem serve` has gone");
        return -1;
    }
    __atomic_store_n(&table->doors[door].pid, (uint64_t)getpid(), __ATOMIC_SEQ_CST);
    return 0;
}

static int plugin_list_exports(int readonly, int is_tls, struct nbdkit_exports *exports)
{
    (void)readonly, (void)is_tls, (void)exports;
    return 0;    /* tokens are secrets */
}

static const char *plugin_default_export(int readonly, int is_tls)
{
    (void)readonly, (void)is_tls;
    return NULL;
}

static void *map_lease(const struct fm_lease_view *lease)
{
    return mmap(NULL, lease->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, memory_fd, (off_t)lease->offset);
}

static void *plugin_open(int readonly)
{
    (void)readonly;
    const char *name = nbdkit_export_name();
    struct connection *c = calloc(1, sizeof *c);
    if (c == NULL || name == NULL || !fm_lease_find(table, door, name, &c->lease)) {
        __atomic_add_fetch(&table->doors[door].refused, 1, __ATOMIC_RELAXED);
        nbdkit_error("no lease has the export name that a client asked for");
        nbdkit_set_error(ENOENT);
        free(c);
        return NULL;
    }
    if ((table->flags & FM_LEASE_HUGE_PAGES) != 0) {
        c->mapped = map_lease(&c->lease);
        if (c->mapped == MAP_FAILED) {
            nbdkit_error("a lease can't be mapped: %m");
            free(c);
            return NULL;
        }
    }
    __atomic_add_fetch(&table->doors[door].connections, 1, __ATOMIC_RELAXED);
    return c;
}

static void plugin_close(void *handle)
{
    struct connection *c = handle;
    if (c->mapped != NULL)
        munmap(c->mapped, c->lease.bytes);
    __atomic_sub_fetch(&table->doors[door].connections, 1, __ATOMIC_RELAXED);
    free(c);
}

static int64_t plugin_get_size(void *handle)
{
    return (int64_t)((struct connection *)handle)->lease.bytes;
}

static int yes(void *handle) { return (void)handle, 1; }
static int can_fua(void *handle) { return (void)handle, NBDKIT_FUA_NATIVE; }   /* memory is as durable as it gets */

static void count(uint64_t *word, uint64_t n) { __atomic_add_fetch(word, n, __ATOMIC_RELAXED); }

/* nbdkit has checked the range against get_size(); what would follow if it had not is too bad to rely on that. */
static bool begin(struct connection *c, uint64_t offset, uint32_t n)
{
    fm_assert(offset <= c->lease.bytes && n <= c->lease.bytes - offset);
    if (fm_lease_enter(table, &c->lease))
        return true;
    nbdkit_set_error(ESHUTDOWN);
    return false;
}

static int end(struct connection *c, int status)
{
    if (status != 0) {
        int error = errno;
        count(&table->leases[c->lease.place].counters.errors, 1);
        nbdkit_error("the memory refused an access: %s", strerror(error));
        nbdkit_set_error(error);
    }
    fm_lease_leave(table, &c->lease);
    return status;
}

static int read_all(char *to, size_t n, off_t from)
{
    while (n > 0) {
        ssize_t got = pread(memory_fd, to, n, from);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0) {
            errno = got == 0 ? EIO : errno;
            return -1;
        }
        to += got, from += got, n -= (size_t)got;
    }
    return 0;
}

static int write_all(const char *from, size_t n, off_t to)
{
    while (n > 0) {
        ssize_t put = pwrite(memory_fd, from, n, to);
        if (put < 0 && errno == EINTR)
            continue;
        if (put <= 0) {
            errno = put == 0 ? EIO : errno;
            return -1;
        }
        from += put, to += put, n -= (size_t)put;
    }
    return 0;
}

static int plugin_pread(void *handle, void *buffer, uint32_t n, uint64_t offset, uint32_t flags)
{
    struct connection *c = handle;
    struct fm_lease_counters *counters = &table->leases[c->lease.place].counters;
    int status = 0;
    (void)flags;
    if (!begin(c, offset, n))
        return -1;
    if (c->mapped != NULL)
        memcpy(buffer, c->mapped + offset, n);
    else
        status = read_all(buffer, n, (off_t)(c->lease.offset + offset));
    count(&counters->reads, 1);
    count(&counters->read_bytes, status == 0 ? n : 0);
    return end(c, status);
}

static int plugin_pwrite(void *handle, const void *buffer, uint32_t n, uint64_t offset, uint32_t flags)
{
    struct connection *c = handle;
    struct fm_lease_counters *counters = &table->leases[c->lease.place].counters;
    int status = 0;
    (void)flags;
    if (!begin(c, offset, n))
        return -1;
    if (c->mapped != NULL)
        memcpy(c->mapped + offset, buffer, n);
    else
        status = write_all(buffer, n, (off_t)(c->lease.offset + offset));
    count(&counters->writes, 1);
    count(&counters->written_bytes, status == 0 ? n : 0);
    return end(c, status);
}

static int write_zeros(size_t n, off_t to)
{
    static const char zeros[ZEROS_BYTES];
    while (n > 0) {
        size_t part = n < sizeof zeros ? n : sizeof zeros;
        if (write_all(zeros, part, to) != 0)
            return -1;
        to += (off_t)part, n -= part;
    }
    return 0;
}

/* A hole reads as zeros, and its memory is the host's again until it is written to: the lease's promise stands.
 * Huge pages are kept, because others could take them meanwhile; and so are pages that a device has: behind a hole it would go on
 * with the old ones, which are nobody's then. */
static int plugin_zero(void *handle, uint32_t n, uint64_t offset, uint32_t flags)
{
    struct connection *c = handle;
    struct fm_lease_counters *counters = &table->leases[c->lease.place].counters;
    int status = 0;
    (void)flags;
    if (!begin(c, offset, n))
        return -1;
    if (c->mapped != NULL)
        memset(c->mapped + offset, 0, n);
    else if (fm_lease_is_pinned(table, &c->lease))
        status = write_zeros(n, (off_t)(c->lease.offset + offset));
    else
        status = fallocate(memory_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(c->lease.offset + offset), n);
    count(&counters->trims, 1);
    count(&counters->trimmed_bytes, status == 0 ? n : 0);
    return end(c, status);
}

/* Nothing to do, but a client that asks is told when its lease has ended. */
static int plugin_flush(void *handle, uint32_t flags)
{
    struct connection *c = handle;
    (void)flags;
    return begin(c, 0, 0) ? end(c, 0) : -1;
}

static struct nbdkit_plugin plugin = {
    .name = "farmem",
    .longname = "farmem's data plane",
    .description = "Memory that `farmem serve` lends.",
    .config = plugin_config,
    .config_complete = plugin_config_complete,
    .after_fork = plugin_after_fork,
    .list_exports = plugin_list_exports,
    .default_export = plugin_default_export,
    .open = plugin_open,
    .close = plugin_close,
    .get_size = plugin_get_size,
    .can_write = yes,
    .can_flush = yes,
    .can_trim = yes,
    .can_zero = yes,
    .can_fast_zero = yes,
    .can_fua = can_fua,
    .can_multi_conn = yes,
    .pread = plugin_pread,
    .pwrite = plugin_pwrite,
    .zero = plugin_zero,
    .trim = plugin_zero,
    .flush = plugin_flush,
    .errno_is_preserved = 0,
};

NBDKIT_REGISTER_PLUGIN(plugin)
