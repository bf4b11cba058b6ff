/* talk.h - what is said of a pool's server, the same for servers of every kind (talk.c). */
#ifndef FM_TALK_H
#define FM_TALK_H

#include "backend.h"

/* What has been said of a server, and since when it is silent. */
struct fm_talk {
    const struct fm_backend *b;
    const struct fm_pool_server *server;
    uint32_t told_lost;
    uint64_t silent_since_ns;         /* its one thread's that looks */
};

void fm_talk_begin(struct fm_talk *t, const struct fm_backend *b, const struct fm_pool_server *server);
void fm_talk_say(const struct fm_talk *t, int level, const char *text, const char *more, uint64_t number);
void fm_talk_lost(struct fm_talk *t, uint64_t stored_bytes);     /* once, until it answers again */
/* Now and then: the oldest that waits for it has done so since then; it is up or not. */
void fm_talk_look(struct fm_talk *t, uint64_t now, uint64_t since, bool up);

#endif
