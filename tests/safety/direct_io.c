/* direct_io FOLDER [READS]: threads read and write files past the page cache (O_DIRECT)
 * while memory is short.  The disk writes into the program's frames, or reads them, while
 * the system call sleeps; a page that goes meanwhile by being copied and dropped loses what
 * the disk wrote.  Each buffer holds old bytes that differ from the file's, so both a lost
 * read and a stale write show. */
#include "safety.h"

#define THREADS 3
#define PIECE (MIB / 2)
#define PIECES 16
#define FILE_BYTES (8 * MIB)

static int in_fd;
static int out_fd[THREADS];
static long reads;

static void *work(void *argument)
{
    size_t me = (size_t)argument;
    char *memory = map(PIECE * PIECES);
    uint64_t state = 777767777 + me;
    fill(memory, PIECE * PIECES, 100 + me);
    for (long i = 0; i < reads; i++) {
        char *piece = memory + random_next(&state) % PIECES * PIECE;
        off_t at = (off_t)(random_next(&state) % (FILE_BYTES / PIECE) * PIECE);
        ssize_t got = pread(in_fd, piece, PIECE, at);
        if (got != (ssize_t)PIECE)
            die("O_DIRECT read: %s", got < 0 ? strerror(errno) : "short");
        verify_from(piece, PIECE, 1, (uint64_t)at / 8, "buffer after an O_DIRECT read");
        fill(piece, PIECE, 200 + (uint64_t)i);
        CHECK(pwrite(out_fd[me], piece, PIECE, at) == (ssize_t)PIECE);
        verify(piece, PIECE, 200 + (uint64_t)i, "buffer after an O_DIRECT write");
        memset(piece, 0x55, PIECE);
        CHECK(pread(out_fd[me], piece, PIECE, at) == (ssize_t)PIECE);
        verify(piece, PIECE, 200 + (uint64_t)i, "what an O_DIRECT write wrote");
    }
    return NULL;
}

static int direct_file(const char *folder, bool filled)
{
    char name[512];
    snprintf(name, sizeof name, "%s/direct.XXXXXX", folder);
    int fd = mkstemp(name);
    CHECK(fd >= 0);
    if (filled) {
        void *all = map(FILE_BYTES);
        fill(all, FILE_BYTES, 1);
        CHECK(write(fd, all, FILE_BYTES) == (ssize_t)FILE_BYTES && fsync(fd) == 0);
        munmap(all, FILE_BYTES);
    } else {
        CHECK(ftruncate(fd, FILE_BYTES) == 0);
    }
    close(fd);
    fd = open(name, O_RDWR | O_DIRECT | O_CLOEXEC);
    int kept = errno;
    unlink(name);
    errno = kept;
    if (fd < 0)
        unsupported("O_DIRECT");
    return fd;
}

int main(int argc, char **argv)
{
    CHECK(argc > 1);
    reads = number(argc, argv, 2, 40);
    in_fd = direct_file(argv[1], true);
    for (int i = 0; i < THREADS; i++)
        out_fd[i] = direct_file(argv[1], false);
    pressure_start(BALLAST_BYTES);
    pthread_t ids[THREADS];
    for (size_t i = 0; i < THREADS; i++)
        CHECK(pthread_create(&ids[i], NULL, work, (void *)i) == 0);
    for (size_t i = 0; i < THREADS; i++)
        CHECK(pthread_join(ids[i], NULL) == 0);
    pressure_stop();
    puts("ok");
    return 0;
}
