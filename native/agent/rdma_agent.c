/* rdma_agent.c - the agent's loop: engines join, transfers go to the device and come back, and where nothing goes on it sleeps.
 *
 * One thread.  While something goes on it looks at rings and completions without a system call; a moment after the
 * last it asks to be woken, looks once more, and sleeps on all its descriptors.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "fm_assert.h"
#include "rdma.h"

#define SPIN_NS 50000ull
#define ATTEND_NS 500000ull                     /* so often the descriptors are looked at where nobody sleeps */
#define TICK_MS 250
#define SILENT_NS 10000000000ull                /* who has connected may say nothing for so long */
#define EVENTS 64
#define DESCRIPTORS_LEFT 24

enum { OF_CONTROL = 0, OF_LISTENER, OF_CHANNEL, OF_SESSIONS };      /* and the session's id, as an event's data */

uint64_t fm_agent_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

static bool watch(const struct fm_agent *a, int fd, uint64_t of)
{
    struct epoll_event e = { .events = EPOLLIN, .data.u64 = of };
    return epoll_ctl(a->epoll, EPOLL_CTL_ADD, fd, &e) == 0;
}

/* ---- who joins ------------------------------------------------------------------------------------------ */

struct fm_session *fm_agent_session(struct fm_agent *a, int sock, bool is_trial)
{
    struct fm_session *s = a->sessions < a->sessions_max ? calloc(1, sizeof *s) : NULL;
    if (s == NULL)
        return NULL;
    *s = (struct fm_session){ .device = &a->device, .id = ++a->ids, .sock = sock, .memfd = -1, .is_trial = is_trial,
                              .heard_ns = fm_agent_now_ns() };
    a->session[a->sessions++] = s;
    return s;
}

void fm_agent_open(struct fm_agent *a, struct fm_session *s, uint32_t lease)
{
    s->lease = lease;
    const char *what = fm_session_prepare(s);
    if (what == NULL) {
        s->state = FM_SESSION_OPENING;
        fm_control_open(a, s);
        return;
    }
    fm_control_complain(a, "failed", what);
    s->state = FM_SESSION_OVER;
    s->why = "it could not begin";
}

/* Who has the token is an engine of the job.  Root's job may have become another user's meanwhile. */
static bool may_join(const struct fm_agent *a, const struct fm_session *s, const struct fm_rdma_hello *h)
{
    struct ucred peer;
    socklen_t n = sizeof peer;
    uint8_t differs = 0;
    for (uint32_t k = 0; k < FM_RDMA_TOKEN_BYTES; k++)
        differs |= h->pass.token[k] ^ a->options->token[k];
    return differs == 0 && h->magic == FM_RDMA_MAGIC && h->version == FM_RDMA_VERSION &&
           getsockopt(s->sock, SOL_SOCKET, SO_PEERCRED, &peer, &n) == 0 && (peer.uid == geteuid() || geteuid() == 0);
}

static void end(struct fm_session *s, const char *why)
{
    s->state = FM_SESSION_OVER;
    s->why = why;
}

static void close_over(struct fm_agent *a)
{
    for (uint32_t k = 0; k < a->sessions;) {
        struct fm_session *s = a->session[k];
        if (s->state != FM_SESSION_OVER) {
            k++;
            continue;
        }
        bool is_known = s->qp != NULL || s->is_trial;
        uint32_t id = s->id, lease = s->lease;
        const char *why = s->why;
        a->session[k] = a->session[--a->sessions];
        fm_session_free(s);
        if (is_known)
            fm_control_say(a, "closed %u %u %s", id, lease, why);
    }
}

static bool is_another(const struct fm_session *s, const struct fm_session *than, const struct fm_rdma_hello *h)
{
    return s != than && !s->is_trial && s->state != FM_SESSION_SILENT && s->slot == h->slot && s->lease == h->pass.lease;
}

/* What a process had of a lease before is gone, here, before the server is asked for a new queue pair: nothing of it may come
 * late. */
static void hear_hello(struct fm_agent *a, struct fm_session *s)
{
    struct fm_rdma_hello h;
    ssize_t r = recv(s->sock, &h, sizeof h, MSG_DONTWAIT);
    if (r < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (r != (ssize_t)sizeof h || !may_join(a, s, &h)) {
        end(s, "a stranger");
        return;
    }
    s->slot = h.slot;
    for (uint32_t k = 0; k < a->sessions; k++)
        if (is_another(a->session[k], s, &h))
            end(a->session[k], "the engine has begun another");
    close_over(a);
    fm_agent_open(a, s, h.pass.lease);
}

static void hear_session(struct fm_agent *a, struct fm_session *s)
{
    char bells[64];
    ssize_t r = 1;
    if (s->state == FM_SESSION_SILENT) {
        hear_hello(a, s);
        return;
    }
    while (r > 0)
        r = recv(s->sock, bells, sizeof bells, MSG_DONTWAIT);
    if (r == 0 || (errno != EAGAIN && errno != EINTR))
        end(s, "the engine has gone");
}

static void let_in(struct fm_agent *a)
{
    int sock = accept4(a->options->listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    struct fm_session *s = sock >= 0 ? fm_agent_session(a, sock, false) : NULL;
    if (s != NULL && !watch(a, sock, OF_SESSIONS + s->id))
        end(s, "there are too many");
    if (s == NULL && sock >= 0)
        close(sock);
}

/* ---- the loop ------------------------------------------------------------------------------------------- */

static void take_events(struct fm_agent *a)
{
    struct ibv_cq *cq;
    void *of;
    while (a->device.verbs->get_cq_event(a->device.channel, &cq, &of) == 0)
        a->device.verbs->ack_cq_events(cq, 1);       /* the next step looks at all of them */
}

static void hear(struct fm_agent *a, uint64_t of)
{
    if (of == OF_CONTROL)
        fm_control_read(a);
    else if (of == OF_LISTENER)
        let_in(a);
    else if (of == OF_CHANNEL)
        take_events(a);
    for (uint32_t k = 0; of >= OF_SESSIONS && k < a->sessions; k++)
        if (a->session[k]->id == of - OF_SESSIONS && a->session[k]->state != FM_SESSION_OVER) {
            hear_session(a, a->session[k]);
            return;
        }
}

static void look(struct fm_agent *a, uint64_t now)
{
    a->looked_ns = now;
    for (uint32_t k = 0; k < a->sessions; k++) {
        struct fm_session *s = a->session[k];
        fm_session_look(s, now);
        if (s->state == FM_SESSION_SILENT && now - s->heard_ns > SILENT_NS)
            end(s, "it said nothing");
    }
}

static void attend(struct fm_agent *a, int wait_ms)
{
    struct epoll_event e[EVENTS];
    int n = epoll_wait(a->epoll, e, EVENTS, wait_ms);
    for (int k = 0; k < n && !a->is_over; k++)
        hear(a, e[k].data.u64);
    uint64_t now = fm_agent_now_ns();
    a->attended_ns = now;
    if (now - a->looked_ns >= TICK_MS * 1000000ull)
        look(a, now);
    close_over(a);
}

static bool step(struct fm_agent *a)
{
    bool any = false;
    for (uint32_t k = 0; k < a->sessions; k++) {
        struct fm_session *s = a->session[k];
        if (s->state != FM_SESSION_UP)
            continue;
        any |= fm_session_step(s);
        if (s->is_trial && s->has_answered) {
            fm_control_say(a, "reached %u %u", s->id, s->lease);
            end(s, "it was a trial");
        }
        any |= s->state == FM_SESSION_OVER;
    }
    return any;
}

static void set_sleeps(struct fm_agent *a, bool sleeps)
{
    for (uint32_t k = 0; k < a->sessions; k++)
        if (a->session[k]->state == FM_SESSION_UP)
            fm_session_sleeps(a->session[k], sleeps);
}

static void loop(struct fm_agent *a)
{
    uint64_t busy_ns = 0;
    while (!a->is_over) {
        bool any = step(a);
        uint64_t now = fm_agent_now_ns();
        if (any)
            busy_ns = now;
        if (now - busy_ns < SPIN_NS) {
            if (now - a->attended_ns > ATTEND_NS)
                attend(a, 0);
            __builtin_ia32_pause();
            continue;
        }
        close_over(a);
        set_sleeps(a, true);
        any = step(a);
        busy_ns = any ? fm_agent_now_ns() : busy_ns;
        attend(a, any ? 0 : a->sessions > 0 ? TICK_MS : -1);
        set_sleeps(a, false);
    }
}

/* A socket for each session, a memfd for one that begins, and what else there is. */
static uint32_t most_sessions(void)
{
    struct rlimit files;
    if (getrlimit(RLIMIT_NOFILE, &files) != 0 || files.rlim_cur <= DESCRIPTORS_LEFT)
        return 1;
    uint64_t most = files.rlim_cur - DESCRIPTORS_LEFT;
    return most < FM_RDMA_SESSIONS_MAX ? (uint32_t)most : FM_RDMA_SESSIONS_MAX;
}

int fm_agent_run(const struct fm_agent_options *options, const struct fm_verbs *verbs)
{
    struct fm_agent *a = calloc(1, sizeof *a);
    fm_assert(a != NULL);
    a->options = options;
    a->sessions_max = most_sessions();
    a->epoll = epoll_create1(EPOLL_CLOEXEC);
    const char *what = fm_device_open(&a->device, verbs, options->device, options->gid_index);
    if (what == NULL && !(a->epoll >= 0 && watch(a, options->control, OF_CONTROL) && watch(a, options->listener, OF_LISTENER) &&
                          watch(a, a->device.channel->fd, OF_CHANNEL)))
        what = "the agent has no descriptors to watch\nraise the limit: ulimit -n 1024";
    if (what != NULL) {
        fm_control_complain(a, "refused", what);
    } else {
        fm_control_say(a, "ready");
        loop(a);
    }
    for (uint32_t k = 0; k < a->sessions; k++)
        end(a->session[k], "the job has ended");
    close_over(a);
    fm_device_close(&a->device);
    if (a->epoll >= 0)
        close(a->epoll);
    free(a);
    return what != NULL;
}
