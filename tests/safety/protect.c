/* protect [ROUNDS]: mprotect to every protection and back. Pages without write access can't
 * be moved out in the usual way, and protections split mappings. Whatever the protection,
 * the bytes are right; what must not be written still can't be (SIGSEGV), what has no
 * access has none; code that was written, protected and evicted runs. */
#include "safety.h"
#include <setjmp.h>

#define PARTS 5
#define PART_BYTES (4 * MIB / SHRINK)
#define BYTES (PARTS * PART_BYTES)

static const int protections[PARTS] = {PROT_NONE, PROT_READ, PROT_READ | PROT_EXEC,
                                       PROT_READ | PROT_WRITE | PROT_EXEC, PROT_WRITE};
static const char *const names[PARTS] = {"no access", "read", "read and execute", "all", "write"};
static sigjmp_buf back;
static volatile sig_atomic_t expected;

static void on_segv(int signal)
{
    if (!expected)
        die("signal %d where all access is allowed", signal);
    expected = 0;
    siglongjmp(back, signal);
}

/* The signal that this access gets, 0 for none. */
static int touch(volatile uint64_t *at, bool to_write)
{
    int got = sigsetjmp(back, 1);
    if (got != 0)
        return got;
    expected = 1;
    uint64_t value = *at;
    if (to_write)
        *at = value;
    expected = 0;
    return 0;
}

static void expect_access(char *part, int which)
{
    int protection = protections[which];
    for (size_t at = 0; at < PART_BYTES; at += 97 * PAGE) {
        volatile uint64_t *word = (volatile uint64_t *)(void *)(part + at);
        int read_gets = touch(word, false), write_gets = touch(word, true);
        int want_read = protection == PROT_NONE ? SIGSEGV : 0;
        int want_write = protection & PROT_WRITE ? 0 : SIGSEGV;
        if (read_gets != want_read || write_gets != want_write)
            die("%s, page %zu: reading gives signal %d, writing %d", names[which], at / PAGE, read_gets, write_gets);
    }
}

/* A function that returns `value`, in each page: what a just-in-time compiler makes. */
static bool write_code(char *page, uint32_t value)
{
#if defined(__x86_64__)
    page[0] = (char)0xb8; /* mov eax, value */
    memcpy(page + 1, &value, 4);
    page[5] = (char)0xc3; /* ret */
    return true;
#elif defined(__aarch64__)
    uint32_t code[3] = {0x52800000 | (value & 0xffff) << 5, 0x72a00000 | value >> 16 << 5, 0xd65f03c0};
    memcpy(page, code, sizeof code);
    __builtin___clear_cache(page, page + sizeof code);
    return true;
#else
    (void)page, (void)value;
    return false;
#endif
}

static size_t run_code(void)
{
    char *code = map(PART_BYTES);
    for (uint32_t i = 0; i < PART_BYTES / PAGE; i++)
        if (!write_code(code + i * PAGE, 0xabc00000 + i))
            return 0;
    CHECK(mprotect(code, PART_BYTES, PROT_READ | PROT_EXEC) == 0);
    size_t away = pressure_until_away(code, PART_BYTES, 3);
    for (uint32_t i = 0; i < PART_BYTES / PAGE; i++) {
        uint32_t (*function)(void);
        char *at = code + i * PAGE;
        memcpy(&function, &at, sizeof function);
        uint32_t got = function();
        if (got != 0xabc00000 + i)
            die("code in page %u: wrong byte, it returned %x", i, got);
    }
    CHECK(munmap(code, PART_BYTES) == 0);
    return away;
}

/* Protections change first or after the pages have gone; and back before or after. */
static size_t one_round(char *memory, uint64_t seed, long round)
{
    size_t away = 0;
    fill(memory, BYTES, seed);
    if (round % 2 == 0)
        away += pressure_until_away(memory, BYTES, 2);
    for (int i = 0; i < PARTS; i++)
        CHECK(mprotect(memory + (size_t)i * PART_BYTES, PART_BYTES, protections[i]) == 0);
    away += pressure_until_away(memory, BYTES, 2);
    for (int i = 0; i < PARTS; i++) {
        char *part = memory + (size_t)i * PART_BYTES;
        expect_access(part, i);
        if (protections[i] & PROT_READ)
            verify_from(part, PART_BYTES, seed, (uint64_t)i * PART_BYTES / 8, names[i]);
        /* Every third page on its own: as many mappings, split and joined again. */
        for (size_t at = 0; at < PART_BYTES / 8; at += 3 * PAGE)
            CHECK(mprotect(part + at, PAGE, PROT_READ) == 0);
    }
    away += pressure_until_away(memory, BYTES, 1);
    CHECK(mprotect(memory, BYTES, PROT_READ | PROT_WRITE) == 0);
    verify(memory, BYTES, seed, "after all protections");
    return away;
}

int main(int argc, char **argv)
{
    long rounds = number(argc, argv, 1, 4);
    size_t away = 0;
    char *memory = map(BYTES);
    struct sigaction action = {.sa_handler = on_segv, .sa_flags = SA_NODEFER};
    pressure_start(BALLAST_BYTES);
    pressure_wait(1);
    CHECK(sigaction(SIGSEGV, &action, NULL) == 0 && sigaction(SIGBUS, &action, NULL) == 0);
    for (long round = 0; round < rounds; round++)
        away += one_round(memory, 20 + (uint64_t)round, round);
    away += run_code();
    pressure_stop();
    printf("ok away=%zu\n", away);
    return 0;
}
