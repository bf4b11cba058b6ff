/* unmap_reuse [ROUNDS]: threads that map, fill, keep, check and unmap pieces of memory all
 * the time, so that new mappings come to lie where old ones were.  A new mapping must read
 * as zeros and then hold what is written to it.  Pieces go as a whole, with a hole first,
 * and by being mapped over; many are evicted before they go. */
#include "safety.h"

#define THREADS 3
#define KEPT 4

static long rounds;
static _Atomic size_t away_total;

struct piece {
    char *at;
    size_t bytes;
    uint64_t seed;
};

static size_t some_bytes(uint64_t *state)
{
    return MIB / SHRINK + random_next(state) % (512 / SHRINK) * PAGE;
}

static void make(struct piece *piece, uint64_t *state, uint64_t seed)
{
    piece->bytes = some_bytes(state);
    piece->seed = seed;
    piece->at = map(piece->bytes);
    /* Half of them are looked at before they are written, half are written first. */
    if (seed % 2 == 0)
        verify_zero(piece->at, piece->bytes, "new mapping");
    fill(piece->at, piece->bytes / 2 / PAGE * PAGE, seed);
    verify_zero(piece->at + piece->bytes / 2 / PAGE * PAGE, piece->bytes - piece->bytes / 2 / PAGE * PAGE,
                "second half of a new mapping");
    fill(piece->at, piece->bytes, seed);
}

/* Three ways for a mapping to end. */
static void end(struct piece *piece, uint64_t *state)
{
    size_t hole = piece->bytes / 4 / PAGE * PAGE;
    verify(piece->at, piece->bytes, piece->seed, "piece");
    switch (random_next(state) % 3) {
    case 0:
        CHECK(munmap(piece->at, piece->bytes) == 0);
        break;
    case 1:
        CHECK(munmap(piece->at + hole, hole) == 0);
        verify(piece->at, hole, piece->seed, "below a hole");
        verify_from(piece->at + 2 * hole, piece->bytes - 2 * hole, piece->seed, 2 * hole / 8, "above a hole");
        CHECK(munmap(piece->at, hole) == 0);
        CHECK(munmap(piece->at + 2 * hole, piece->bytes - 2 * hole) == 0);
        break;
    default:
        CHECK(mmap(piece->at, piece->bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) ==
              piece->at);
        verify_zero(piece->at, piece->bytes, "mapped over");
        fill(piece->at, piece->bytes, piece->seed + 1);
        verify(piece->at, piece->bytes, piece->seed + 1, "after being mapped over");
        CHECK(munmap(piece->at, piece->bytes) == 0);
    }
}

static void *work(void *argument)
{
    size_t me = (size_t)argument;
    uint64_t state = 99991 + me;
    struct piece kept[KEPT] = {0};
    for (long round = 0; round < rounds; round++) {
        struct piece *piece = &kept[random_next(&state) % KEPT];
        if (piece->at != NULL) {
            if (round % 4 == 0)
                atomic_fetch_add(&away_total, pressure_until_away(piece->at, piece->bytes, 1));
            end(piece, &state);
        }
        make(piece, &state, (uint64_t)(round * 8 + (long)me));
    }
    for (int i = 0; i < KEPT; i++)
        if (kept[i].at != NULL)
            end(&kept[i], &state);
    return NULL;
}

int main(int argc, char **argv)
{
    rounds = number(argc, argv, 1, 40);
    pressure_start(BALLAST_BYTES);
    pressure_wait(1);
    pthread_t ids[THREADS];
    for (size_t i = 0; i < THREADS; i++)
        CHECK(pthread_create(&ids[i], NULL, work, (void *)i) == 0);
    for (size_t i = 0; i < THREADS; i++)
        CHECK(pthread_join(ids[i], NULL) == 0);
    pressure_stop();
    printf("ok away=%zu\n", away_total);
    return 0;
}
