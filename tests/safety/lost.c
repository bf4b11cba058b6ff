/* lost [FILE]: touches pages that the pool may have lost. Each must be right, or the touch
 * must give SIGBUS, and a system call EFAULT: never zeros, never other bytes. FILE is made
 * once everything has been written and is as far away as it will get: it arms the errors.
 * Prints how many pages were lost, and the address of the first. */
#include "safety.h"
#include <setjmp.h>

#define BYTES (48 * MIB / SHRINK)
#define PAGES (BYTES / PAGE)

static sigjmp_buf back;
static void *volatile fault_address;

static void on_bus(int signal, siginfo_t *info, void *context)
{
    (void)context;
    fault_address = info->si_addr;
    siglongjmp(back, signal);
}

static bool page_lost(char *page, size_t number_of_page)
{
    if (sigsetjmp(back, 1) != 0) {
        char *at = fault_address;
        if (at < page || at >= page + PAGE)
            die("SIGBUS at %p, but page %p was touched", fault_address, (void *)page);
        return true;
    }
    verify_from(page, PAGE, 1, number_of_page * PAGE_WORDS, "page that might be lost");
    return false;
}

int main(int argc, char **argv)
{
    struct sigaction action = {.sa_sigaction = on_bus, .sa_flags = SA_SIGINFO | SA_NODEFER};
    size_t lost = 0;
    char *memory = map(BYTES), *first = NULL;
    int ends[2];
    CHECK(pipe(ends) == 0);
    fill(memory, BYTES, 1);
    pressure_start(BALLAST_BYTES);
    pressure_until_away(memory, BYTES / 2, 4);
    pressure_stop();
    if (argc > 1) {
        int armed = open(argv[1], O_CREAT | O_WRONLY, 0666);
        CHECK(armed >= 0);
        close(armed);
    }
    CHECK(sigaction(SIGBUS, &action, NULL) == 0);
    for (size_t i = 0; i < PAGES / 2; i++) {
        if (!page_lost(memory + i * PAGE, i))
            continue;
        if (lost++ == 0) {
            first = memory + i * PAGE;
            pause_us(300000); /* what is said of the first can be read before there are many */
        }
        if (write(ends[1], memory + i * PAGE, 8) != -1 || errno != EFAULT)
            die("a system call took a lost page for a page");
        if (!page_lost(memory + i * PAGE, i))
            die("a lost page came back");
    }
    /* What the program writes anew after throwing the loss away is its own again. */
    CHECK(madvise(memory, BYTES, MADV_DONTNEED) == 0);
    for (size_t i = 0; i < PAGES / 2 && lost > 0; i += 64) {
        verify_zero(memory + i * PAGE, PAGE, "discarded after a loss");
        fill(memory + i * PAGE, PAGE, 2);
        verify(memory + i * PAGE, PAGE, 2, "written after a loss");
    }
    printf("lost=%zu first=0x%" PRIxPTR "\nok\n", lost, (uintptr_t)first);
    return 0;
}
