/* rdma_control.c - what the agent and control (farmem/rdmaagent.py) say to each other: lines, of words with a space between.
 *
 *   open ID LEASE QPN PSN GID LID MTU LINK READS       get the server's half of a queue pair
 *   opened ID QPN PSN GID LID MTU RKEY ADDRESS BYTES READS      control: here it is
 *   refused ID                                    control: there is none; the session ends
 *   closed ID LEASE WHY                           it is gone, here: the server's half may go
 *   try LEASE                                     control: a session without an engine;
 *   reached ID LEASE                              ... it has read from the server; it is closed in any case
 *
 * and `ready`, `refused` and `failed` as farmem/agent.py has them.  Keys and numbers of queue pairs are in no other message.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "rdma.h"

void fm_control_say(const struct fm_agent *a, const char *format, ...)
{
    char line[FM_RDMA_LINE_BYTES];
    va_list words;
    va_start(words, format);
    int n = vsnprintf(line, sizeof line - 1, format, words);
    va_end(words);
    n = n < (int)sizeof line - 2 ? n : (int)sizeof line - 2;
    line[n++] = '\n';
    for (int sent = 0; sent < n;) {
        ssize_t r = send(a->options->control, line + sent, (size_t)(n - sent), MSG_NOSIGNAL);
        if (r < 0 && errno != EINTR)
            return;                       /* reading will tell that it has gone */
        sent += r > 0 ? (int)r : 0;
    }
}

void fm_control_complain(const struct fm_agent *a, const char *word, const char *what)
{
    const char *hint = strchr(what, '\n');
    int n = hint != NULL ? (int)(hint - what) : (int)strlen(what);
    fm_control_say(a, "%s\t%.*s\t%s", word, n, what, hint != NULL ? hint + 1 : "");
}

void fm_control_open(const struct fm_agent *a, const struct fm_session *s)
{
    const struct fm_rdma_device *d = &a->device;
    char gid[INET6_ADDRSTRLEN] = "";
    inet_ntop(AF_INET6, d->gid.raw, gid, sizeof gid);
    fm_control_say(a, "open %u %u %u %u %s %u %u %s %u", s->id, s->lease, s->qp->qp_num, s->psn, gid, d->lid, 128u << d->mtu,
                   d->is_ethernet ? "ethernet" : "infiniband", d->reads);
}

static bool read_peer(const char *words, uint32_t *id, struct fm_rdma_peer *p)
{
    char gid[INET6_ADDRSTRLEN];
    unsigned int mtu;
    unsigned long long address, bytes;
    memset(p, 0, sizeof *p);
    if (sscanf(words, "%u %u %u %45s %hu %u %u %llu %llu %u", id, &p->qpn, &p->psn, gid, &p->lid, &mtu, &p->rkey, &address,
               &bytes, &p->reads) != 10 || inet_pton(AF_INET6, gid, p->gid.raw) != 1)
        return false;
    p->address = address;
    p->bytes = bytes;
    for (p->mtu = IBV_MTU_256; p->mtu < IBV_MTU_4096 && 128u << p->mtu < mtu; p->mtu++)
        continue;
    return 128u << p->mtu == mtu && p->bytes >= FM_RDMA_PAGE_BYTES && p->reads > 0;
}

static struct fm_session *find(struct fm_agent *a, uint32_t id)
{
    for (uint32_t k = 0; k < a->sessions; k++)
        if (a->session[k]->id == id && a->session[k]->state == FM_SESSION_OPENING)
            return a->session[k];
    return NULL;
}

static void obey(struct fm_agent *a, const char *line)
{
    struct fm_rdma_peer peer;
    struct fm_session *s = NULL;
    uint32_t id = 0, lease = 0;
    if (sscanf(line, "try %u", &lease) == 1) {
        s = fm_agent_session(a, -1, true);
        if (s != NULL)
            fm_agent_open(a, s, lease);
        else
            fm_control_say(a, "closed 0 %u there are too many sessions", lease);
    } else if (strncmp(line, "opened ", 7) == 0 && read_peer(line + 7, &id, &peer)) {
        s = find(a, id);                  /* it may have ended meanwhile, and that has been said */
        if (s != NULL)
            fm_session_connect(s, &peer);
    } else if (sscanf(line, "refused %u", &id) == 1) {
        s = find(a, id);
        if (s != NULL) {
            s->state = FM_SESSION_OVER;
            s->why = "the server gives no queue pair";
        }
    } else {
        fm_control_say(a, "failed\tthe agent was told what it does not understand\tinstall farmem again");
    }
}

void fm_control_read(struct fm_agent *a)
{
    char *end;
    ssize_t r = recv(a->options->control, a->line + a->line_bytes, sizeof a->line - 1 - a->line_bytes, MSG_DONTWAIT);
    if (r < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (r <= 0) {
        a->is_over = true;                /* also when a line is too long to be one */
        return;
    }
    a->line_bytes += (uint32_t)r;
    a->line[a->line_bytes] = 0;
    while ((end = strchr(a->line, '\n')) != NULL) {
        *end = 0;
        obey(a, a->line);
        a->line_bytes -= (uint32_t)(end + 1 - a->line);
        memmove(a->line, end + 1, a->line_bytes + 1);
    }
}
