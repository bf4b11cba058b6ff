/* say.c - what the engine has to tell goes into the control segment; the supervisor prints it.
 *
 * Never to a descriptor of the program's: it may be full, closed, or somebody else's by now.
 */
#include <stddef.h>
#include <signal.h>
#include <string.h>

#include "engine/engine.h"
#include "fm_assert.h"

static uint32_t put_text(char *to, uint32_t at, const char *from)
{
    while (*from != 0 && at + 1 < FM_MESSAGE_BYTES)
        to[at++] = *from++;
    return at;
}

uint32_t fm_put_number(char *to, uint32_t at, uint64_t n, uint32_t base)
{
    char digits[24];
    uint32_t k = 0;
    do {
        digits[k++] = "0123456789abcdef"[n % base];
        n /= base;
    } while (n > 0);
    while (k > 0 && at + 1 < FM_MESSAGE_BYTES)
        to[at++] = digits[--k];
    return at;
}

static bool ends_with(const char *s, const char *end)
{
    size_t n = strlen(s), m = strlen(end);
    return n >= m && strcmp(s + n - m, end) == 0;
}

/* The number follows the text: in hex after "address", not at all after a full stop. */
void fm_say(int level, const char *text, uint64_t number)
{
    struct fm_control *c = fm.control;
    char line[FM_MESSAGE_BYTES];
    uint32_t at = put_text(line, 0, text);
    bool hex = ends_with(text, "address");
    if (!ends_with(text, ".")) {
        at = put_text(line, at, hex ? " 0x" : " ");
        at = fm_put_number(line, at, number, hex ? 16 : 10);
    }
    line[at] = 0;
    if ((fm.early_defects & FM_DEFECT_LOG_TO_STDERR) != 0) {
        fm_sys(SYS_write, 2, line, at);
        fm_sys(SYS_write, 2, "\n", 1);
    }
    if (c == NULL)
        return;
    uint64_t ticket = __atomic_fetch_add(&c->message_next, 1, __ATOMIC_ACQ_REL);
    struct fm_message *m = &c->messages[ticket % FM_MESSAGES_MAX];
    __atomic_store_n(&m->seq, 0, __ATOMIC_RELEASE);
    m->pid = fm.pid;
    m->level = (uint32_t)level;
    __builtin_memcpy(m->text, line, at + 1);
    __atomic_store_n(&m->seq, ticket + 1, __ATOMIC_RELEASE);
}

void fm_say_parts(int level, const struct fm_part *part, uint32_t n)
{
    char text[FM_MESSAGE_BYTES];
    uint32_t at = 0;
    for (uint32_t k = 0; k < n; k++) {
        at = put_text(text, at, part[k].text);
        if (k + 1 < n)
            at = fm_put_number(text, at, part[k].number, 10);
    }
    at = put_text(text, at, ".");
    text[at] = 0;
    fm_say(level, text, 0);
}

/* Before it can see a wrong byte. */
_Noreturn void fm_end_program(void)
{
    for (;;) {
        fm_sys(SYS_kill, fm_sys(SYS_getpid), SIGKILL);
        fm_sleep_ns(1000000);
    }
}

/* A broken promise of ours to ourselves: say so, and end the program before it can see a wrong byte. */
_Noreturn void fm_panic(const char *what, const char *file, int line)
{
    char text[FM_MESSAGE_BYTES];
    uint32_t at = put_text(text, 0, "bug in farmem, the program is ended: ");
    at = put_text(text, at, what);
    at = put_text(text, at, " in ");
    at = put_text(text, at, file);
    at = put_text(text, at, " line");
    text[at] = 0;
    fm_say(FM_LEVEL_ERROR, text, (uint64_t)line);
    fm_end_program();
}
