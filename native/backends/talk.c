/* talk.c - what is said of a pool's server: that it does not answer, answers again, or has not for too long.
 *
 * Messages name the server; numbers stand at their ends.  Nothing here decides anything.
 */
#include "talk.h"

#define SILENT_NS 2000000000ull         /* then it is worth a word */

void fm_talk_begin(struct fm_talk *t, const struct fm_backend *b, const struct fm_pool_server *server)
{
    *t = (struct fm_talk){ .b = b, .server = server };
}

void fm_talk_say(const struct fm_talk *t, int level, const char *text, const char *more, uint64_t number)
{
    char line[FM_MESSAGE_BYTES];
    const char *part[] = { "the pool's server ", t->server->name, " ", text, more };
    uint32_t at = 0;
    for (uint32_t k = 0; k < sizeof part / sizeof part[0]; k++)
        for (const char *s = part[k]; *s != 0 && at + 1 < sizeof line; s++)
            line[at++] = *s;
    line[at] = 0;
    t->b->chain->say(level, line, number);
}

void fm_talk_lost(struct fm_talk *t, uint64_t stored_bytes)
{
    if (__atomic_exchange_n(&t->told_lost, 1, __ATOMIC_SEQ_CST) == 0)
        fm_talk_say(t, FM_LEVEL_ERROR, "has not answered for too long:", " what is touched of its pages is lost; bytes there",
                    stored_bytes);
}

void fm_talk_look(struct fm_talk *t, uint64_t now, uint64_t since, bool up)
{
    uint64_t limit = t->server->timeout_ns / 2 < SILENT_NS ? t->server->timeout_ns / 2 : SILENT_NS;
    bool silent = now - since > limit;
    if (silent && t->silent_since_ns == 0) {
        t->silent_since_ns = since;
        fm_talk_say(t, FM_LEVEL_WARNING, "does not answer.", " Whoever needs a page that is there waits.", 0);
    } else if (!silent && up && t->silent_since_ns != 0) {
        uint64_t silent_ns = now - t->silent_since_ns;
        t->silent_since_ns = 0;
        __atomic_store_n(&t->told_lost, 0, __ATOMIC_SEQ_CST);
        fm_add(t->b->chain->count->pool_silent_ns, silent_ns);
        fm_talk_say(t, FM_LEVEL_WARNING, "answers again;", " it was silent for so many ms:", silent_ns / 1000000);
    }
}
