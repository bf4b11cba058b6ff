/* fake_verbs.c - libibverbs without a device, as far as the agent of `rdma:` pools uses it, for tests.
 *
 * It is strict where a device would be: keys, ranges, access rights, states and their attributes, depths of queues, the
 * order in which things are destroyed.  A thread carries work requests out, each queue pair's in order and those of several
 * in any, after a delay, moving the bytes only then; some fail half done, from a seed, and take all behind them along.  What
 * a caller may never do ends the test. The server is a file: see fake_fabric.h.
 */
#include "fake_fabric.h"

#include <errno.h>
#include <fcntl.h>
#include <infiniband/verbs.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#undef ibv_reg_mr
#undef ibv_query_port
#undef ibv_get_device_list

#define DEPTH_MAX 256
#define OBJECTS_MAX 64
#define STEP_NS 5000

#define MUST(x) ((x) ? (void)0 : (fprintf(stderr, "fake verbs: %s does not hold (line %d)\n", #x, __LINE__), abort()))

struct work {
    struct ibv_send_wr wr;
    struct ibv_sge sge;
    uint64_t posted_ns, due_ns;
};

struct fake_cq {
    struct ibv_cq cq;
    struct ibv_wc wc[DEPTH_MAX + 1];
    int n, most;
    bool armed;
    unsigned int unread, read, acked;       /* events */
};

struct fake_qp {
    struct ibv_qp qp;
    struct work work[DEPTH_MAX];
    int n, most;
    uint32_t dest_qpn, rq_psn, sq_psn;
};

struct fake_mr {
    struct ibv_mr mr;
    int access;
};

static struct {
    pthread_mutex_t lock;
    pthread_t thread;
    bool ends;
    struct fake_fabric *fabric;
    char *memory;
    uint64_t random;
    uint32_t numbers;
    void *qp[OBJECTS_MAX], *mr[OBJECTS_MAX], *cq[OBJECTS_MAX];      /* struct fake_qp and so on */
    int pds, channels;
} fake = { .lock = PTHREAD_MUTEX_INITIALIZER };

static struct ibv_device device;
static struct ibv_context context;

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

static uint64_t draw(uint64_t below)
{
    fake.random ^= fake.random << 13;
    fake.random ^= fake.random >> 7;
    fake.random ^= fake.random << 17;
    return below == 0 ? 0 : fake.random % below;
}

static void enter(void) { MUST(pthread_mutex_lock(&fake.lock) == 0); }
static void leave(void) { MUST(pthread_mutex_unlock(&fake.lock) == 0); }

static uint64_t fabric_word(const uint64_t *word) { return __atomic_load_n(word, __ATOMIC_SEQ_CST); }
static void count(uint64_t *word) { __atomic_add_fetch(word, 1, __ATOMIC_SEQ_CST); }

/* Where a pointer is, or where there is room (NULL). */
static int place(void **list, const void *what)
{
    for (int k = 0; k < OBJECTS_MAX; k++)
        if (list[k] == what)
            return k;
    MUST(!"there is such an object, or room for one");
    return -1;
}

/* ---- completions ---------------------------------------------------------------------------------------- */

static void complete(struct fake_qp *q, const struct work *w, enum ibv_wc_status status)
{
    struct fake_cq *c = (struct fake_cq *)q->qp.send_cq;
    MUST(c->n < c->most);
    c->wc[c->n++] = (struct ibv_wc){ .wr_id = w->wr.wr_id, .status = status, .qp_num = q->qp.qp_num };
    if (!c->armed)
        return;
    c->armed = false;
    c->unread++;
    uint64_t one = 1;
    MUST(write(c->cq.channel->fd, &one, sizeof one) == (ssize_t)sizeof one);
}

static int poll_cq(struct ibv_cq *cq, int most, struct ibv_wc *wc)
{
    struct fake_cq *c = (struct fake_cq *)cq;
    enter();
    int n = c->n < most ? c->n : most;
    memcpy(wc, c->wc, (size_t)n * sizeof *wc);
    c->n -= n;
    memmove(c->wc, c->wc + n, (size_t)c->n * sizeof *wc);
    leave();
    return n;
}

static int req_notify_cq(struct ibv_cq *cq, int solicited)
{
    enter();
    MUST(solicited == 0);
    ((struct fake_cq *)cq)->armed = true;
    leave();
    return 0;
}

/* ---- work ------------------------------------------------------------------------------------------------ */

static void fail(struct fake_qp *q, enum ibv_wc_status status)
{
    q->qp.state = IBV_QPS_ERR;
    for (int k = 0; k < q->n; k++)
        complete(q, &q->work[k], k == 0 ? status : IBV_WC_WR_FLUSH_ERR);
    q->n = 0;
}

static bool local_is_right(const struct work *w)
{
    for (int k = 0; k < OBJECTS_MAX; k++) {
        struct fake_mr *m = fake.mr[k];
        if (m == NULL || m->mr.lkey != w->sge.lkey)
            continue;
        uint64_t start = (uint64_t)m->mr.addr;
        return w->sge.addr >= start && w->sge.addr + w->sge.length <= start + m->mr.length &&
               (w->wr.opcode != IBV_WR_RDMA_READ || (m->access & IBV_ACCESS_LOCAL_WRITE) != 0);
    }
    return false;
}

/* The other half, if there is one that is meant by it too. */
static const struct fake_half *half_of(const struct fake_qp *q)
{
    for (const struct fake_half *h = fake.fabric->half; h < fake.fabric->half + FAKE_HALVES; h++)
        if (fabric_word(&h->alive) != 0 && h->qpn == q->dest_qpn)
            return h->psn == q->rq_psn && h->peer_qpn == q->qp.qp_num && h->peer_psn == q->sq_psn ? h : NULL;
    return NULL;
}

static bool answers(const struct fake_half *h)
{
    return h != NULL && fabric_word(&fake.fabric->silent) == 0 && fabric_word(&h->silent) == 0;
}

static bool remote_is_right(const struct work *w, const struct fake_half *h)
{
    uint64_t at = w->wr.wr.rdma.remote_addr, start = fake.fabric->address + h->start;
    return w->wr.wr.rdma.rkey == fake_rkey(fake.fabric, h->start) && at >= start && at + w->sge.length <= start + h->bytes;
}

static void move_bytes(const struct work *w, uint64_t bytes)
{
    char *here = (char *)w->sge.addr, *there = fake.memory + (w->wr.wr.rdma.remote_addr - fake.fabric->address);
    if (w->wr.opcode == IBV_WR_RDMA_READ)
        memcpy(here, there, bytes);
    else
        memcpy(there, here, bytes);
}

/* The first of a queue pair's.  False: it is not its time yet. */
static bool carry_out(struct fake_qp *q, uint64_t now)
{
    struct fake_fabric *f = fake.fabric;
    const struct work *w = &q->work[0];
    const struct fake_half *half = half_of(q);
    bool reads = w->wr.opcode == IBV_WR_RDMA_READ;
    if (now < w->due_ns)
        return false;
    if (!answers(half)) {
        if (now < w->posted_ns + fabric_word(&f->retry_ns))
            return false;
        fail(q, IBV_WC_RETRY_EXC_ERR);
    } else if (!local_is_right(w)) {
        fail(q, IBV_WC_LOC_PROT_ERR);
    } else if (!remote_is_right(w, half)) {
        fail(q, IBV_WC_REM_ACCESS_ERR);
    } else if (draw(1000000) < fabric_word(&f->fail_ppm)) {
        move_bytes(w, draw(w->sge.length));
        if (reads)
            memset((char *)w->sge.addr + draw(w->sge.length), 0xbd, 1);
        count(&f->failures);
        fail(q, draw(2) == 0 ? IBV_WC_REM_OP_ERR : IBV_WC_RETRY_EXC_ERR);
    } else {
        move_bytes(w, w->sge.length);
        count(reads ? &f->reads : &f->writes);
        complete(q, w, IBV_WC_SUCCESS);
        q->n--;
        memmove(q->work, q->work + 1, (size_t)q->n * sizeof q->work[0]);
    }
    return true;
}

static void *work_on(void *arg)
{
    (void)arg;
    for (bool ends = false; !ends;) {
        enter();
        uint64_t now = now_ns();
        int first = (int)draw(OBJECTS_MAX);
        bool any = false;
        for (int k = 0; k < OBJECTS_MAX && !any; k++) {
            struct fake_qp *q = fake.qp[(first + k) % OBJECTS_MAX];
            any = q != NULL && q->n > 0 && carry_out(q, now);
        }
        ends = fake.ends;
        leave();
        if (!any)
            nanosleep(&(struct timespec){ .tv_nsec = STEP_NS }, NULL);
    }
    return NULL;
}

static int post_send(struct ibv_qp *qp, struct ibv_send_wr *wr, struct ibv_send_wr **bad)
{
    struct fake_qp *q = (struct fake_qp *)qp;
    int result = 0;
    enter();
    MUST(qp->state == IBV_QPS_RTS || qp->state == IBV_QPS_ERR);
    count(&fake.fabric->doorbells);
    for (; wr != NULL && result == 0; wr = wr->next) {
        MUST(wr->num_sge == 1 && (wr->opcode == IBV_WR_RDMA_READ || wr->opcode == IBV_WR_RDMA_WRITE));
        if (q->n == q->most) {
            *bad = wr;
            result = ENOMEM;
            break;
        }
        uint64_t now = now_ns();
        struct work *w = &q->work[q->n++];
        *w = (struct work){ .wr = *wr, .sge = *wr->sg_list, .posted_ns = now,
                            .due_ns = now + draw(fabric_word(&fake.fabric->delay_ns_max)) };
    }
    if (qp->state == IBV_QPS_ERR)
        fail(q, IBV_WC_WR_FLUSH_ERR);
    leave();
    return result;
}

/* ---- devices --------------------------------------------------------------------------------------------- */

static bool is_wrong(enum fake_wrong how) { return fabric_word(&fake.fabric->wrong) == (uint64_t)how; }

static void map_fabric(void)
{
    const char *path = getenv("FARMEM_TEST_FABRIC");
    int fd = path != NULL ? open(path, O_RDWR | O_CLOEXEC) : -1;
    struct stat there;
    MUST(fd >= 0 && fstat(fd, &there) == 0);
    char *at = mmap(NULL, (size_t)there.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    MUST(at != MAP_FAILED);
    close(fd);
    fake.fabric = (struct fake_fabric *)at;
    fake.memory = at + FAKE_MEMORY_AT;
    MUST(fake.fabric->magic == FAKE_MAGIC && FAKE_MEMORY_AT + fake.fabric->bytes <= (uint64_t)there.st_size);
    fake.random = fake.fabric->seed * 0x9e3779b97f4a7c15ull + 1;
    fake.numbers = (uint32_t)(getpid() * 1000 % 0x700000) + 100;     /* not those of an agent before */
}

struct ibv_device **ibv_get_device_list(int *n)
{
    struct ibv_device **list = calloc(2, sizeof *list);
    MUST(list != NULL);
    if (fake.fabric == NULL)
        map_fabric();
    list[0] = is_wrong(FAKE_NO_DEVICE) ? NULL : &device;
    *n = list[0] != NULL;
    return list;
}

void ibv_free_device_list(struct ibv_device **list) { free(list); }

const char *ibv_get_device_name(struct ibv_device *d)
{
    MUST(d == &device);
    return FAKE_DEVICE;
}

struct ibv_context *ibv_open_device(struct ibv_device *d)
{
    MUST(d == &device && fake.pds == 0);
    context.device = d;
    context.ops.poll_cq = poll_cq;
    context.ops.req_notify_cq = req_notify_cq;
    context.ops.post_send = post_send;
    fake.ends = false;
    MUST(pthread_create(&fake.thread, NULL, work_on, NULL) == 0);
    return &context;
}

int ibv_close_device(struct ibv_context *c)
{
    MUST(c == &context && fake.pds == 0 && fake.channels == 0);
    enter();
    fake.ends = true;
    leave();
    return pthread_join(fake.thread, NULL);
}

int ibv_query_device(struct ibv_context *c, struct ibv_device_attr *a)
{
    MUST(c == &context);
    *a = (struct ibv_device_attr){ .max_qp_wr = DEPTH_MAX, .max_cqe = DEPTH_MAX, .max_qp_init_rd_atom = 16, .phys_port_cnt = 1 };
    return 0;
}

int ibv_query_port(struct ibv_context *c, uint8_t port, struct _compat_ibv_port_attr *attr)
{
    struct ibv_port_attr *a = (struct ibv_port_attr *)attr;
    MUST(c == &context && port == 1);
    a->state = is_wrong(FAKE_PORT_DOWN) ? IBV_PORT_DOWN : IBV_PORT_ACTIVE;
    a->active_mtu = IBV_MTU_1024;
    a->link_layer = IBV_LINK_LAYER_ETHERNET;
    a->gid_tbl_len = 8;
    return 0;
}

/* RoCE v1 and v2, each by the link's own address and by an IPv4 address. */
int _ibv_query_gid_ex(struct ibv_context *c, uint32_t port, uint32_t index, struct ibv_gid_entry *e, uint32_t flags, size_t bytes)
{
    MUST(c == &context && port == 1 && flags == 0 && bytes == sizeof *e);
    if (index > FAKE_GID_INDEX || is_wrong(FAKE_NO_GID))
        return ENODATA;
    *e = (struct ibv_gid_entry){ .gid_index = index, .port_num = port,
                                 .gid_type = index % 2 == 0 ? IBV_GID_TYPE_ROCE_V1 : IBV_GID_TYPE_ROCE_V2 };
    if (index < 2)
        memcpy(e->gid.raw, (const uint8_t[16]){ 0xfe, 0x80, [15] = 1 }, 16);
    else
        memcpy(e->gid.raw, (const uint8_t[16]){ [10] = 0xff, [11] = 0xff, [12] = 10, [15] = 1 }, 16);
    return 0;
}

const char *ibv_wc_status_str(enum ibv_wc_status status)
{
    return status == IBV_WC_RETRY_EXC_ERR ? "transport retry counter exceeded" :
           status == IBV_WC_REM_ACCESS_ERR ? "remote access error" : "another error";
}

/* ---- objects --------------------------------------------------------------------------------------------- */

struct ibv_pd *ibv_alloc_pd(struct ibv_context *c)
{
    struct ibv_pd *pd = calloc(1, sizeof *pd);
    MUST(c == &context && pd != NULL);
    pd->context = c;
    fake.pds++;
    return pd;
}

int ibv_dealloc_pd(struct ibv_pd *pd)
{
    for (int k = 0; k < OBJECTS_MAX; k++)
        MUST(fake.mr[k] == NULL && fake.qp[k] == NULL);
    fake.pds--;
    free(pd);
    return 0;
}

struct ibv_mr *ibv_reg_mr(struct ibv_pd *pd, void *at, size_t bytes, int access)
{
    struct fake_mr *m = calloc(1, sizeof *m);
    MUST(m != NULL);
    if (is_wrong(FAKE_NO_LOCKED_MEMORY)) {
        free(m);
        errno = ENOMEM;
        return NULL;
    }
    enter();
    m->mr = (struct ibv_mr){ .context = &context, .pd = pd, .addr = at, .length = bytes, .lkey = ++fake.numbers };
    m->access = access;
    fake.mr[place(fake.mr, NULL)] = m;
    leave();
    return &m->mr;
}

int ibv_dereg_mr(struct ibv_mr *mr)
{
    enter();
    for (int k = 0; k < OBJECTS_MAX; k++) {
        const struct fake_qp *q = fake.qp[k];
        for (int n = 0; q != NULL && n < q->n; n++)
            MUST(q->work[n].sge.lkey != mr->lkey);
    }
    fake.mr[place(fake.mr, mr)] = NULL;
    leave();
    free(mr);
    return 0;
}

struct ibv_comp_channel *ibv_create_comp_channel(struct ibv_context *c)
{
    struct ibv_comp_channel *channel = calloc(1, sizeof *channel);
    MUST(channel != NULL);
    channel->context = c;
    channel->fd = eventfd(0, EFD_CLOEXEC | EFD_SEMAPHORE);
    MUST(channel->fd >= 0);
    fake.channels++;
    return channel;
}

int ibv_destroy_comp_channel(struct ibv_comp_channel *channel)
{
    for (int k = 0; k < OBJECTS_MAX; k++)
        MUST(fake.cq[k] == NULL);
    fake.channels--;
    close(channel->fd);
    free(channel);
    return 0;
}

struct ibv_cq *ibv_create_cq(struct ibv_context *c, int n, void *of, struct ibv_comp_channel *channel, int vector)
{
    struct fake_cq *made = calloc(1, sizeof *made);
    MUST(made != NULL && n <= DEPTH_MAX && vector == 0);
    made->cq = (struct ibv_cq){ .context = c, .channel = channel, .cq_context = of, .cqe = n };
    made->most = n;
    enter();
    fake.cq[place(fake.cq, NULL)] = made;
    leave();
    return &made->cq;
}

/* The real one waits for ever for an event that was read and not acknowledged. */
int ibv_destroy_cq(struct ibv_cq *cq)
{
    struct fake_cq *c = (struct fake_cq *)cq;
    uint64_t one;
    enter();
    for (int k = 0; k < OBJECTS_MAX; k++) {
        const struct fake_qp *q = fake.qp[k];
        MUST(q == NULL || q->qp.send_cq != cq);
    }
    MUST(c->read == c->acked);
    for (; c->unread > 0; c->unread--)
        MUST(read(cq->channel->fd, &one, sizeof one) == (ssize_t)sizeof one);
    fake.cq[place(fake.cq, c)] = NULL;
    leave();
    free(c);
    return 0;
}

int ibv_get_cq_event(struct ibv_comp_channel *channel, struct ibv_cq **cq, void **of)
{
    uint64_t one;
    int result = -1;
    enter();
    bool any = read(channel->fd, &one, sizeof one) == (ssize_t)sizeof one;
    for (int k = 0; k < OBJECTS_MAX && any && result != 0; k++) {
        struct fake_cq *c = fake.cq[k];
        if (c == NULL || c->unread == 0)
            continue;
        c->unread--;
        c->read++;
        *cq = &c->cq;
        *of = c->cq.cq_context;
        result = 0;
    }
    MUST(result == 0 || !any);
    leave();
    return result;
}

void ibv_ack_cq_events(struct ibv_cq *cq, unsigned int n)
{
    enter();
    ((struct fake_cq *)cq)->acked += n;
    leave();
}

struct ibv_qp *ibv_create_qp(struct ibv_pd *pd, struct ibv_qp_init_attr *a)
{
    struct fake_qp *q = calloc(1, sizeof *q);
    MUST(q != NULL && a->qp_type == IBV_QPT_RC && a->cap.max_send_wr <= DEPTH_MAX && a->cap.max_send_sge >= 1);
    MUST((int)a->cap.max_send_wr <= ((struct fake_cq *)a->send_cq)->most);
    enter();
    q->qp = (struct ibv_qp){ .context = &context, .pd = pd, .send_cq = a->send_cq, .recv_cq = a->recv_cq,
                             .qp_num = ++fake.numbers & 0xffffff, .state = IBV_QPS_RESET, .qp_type = a->qp_type };
    q->most = (int)a->cap.max_send_wr;
    fake.qp[place(fake.qp, NULL)] = q;
    leave();
    return &q->qp;
}

static bool connects(struct fake_qp *q, const struct ibv_qp_attr *a)
{
    const uint8_t server[16] = FAKE_SERVER_GID;
    MUST(a->path_mtu == IBV_MTU_1024 && a->min_rnr_timer > 0 && a->ah_attr.is_global == 1 && a->ah_attr.port_num == 1);
    MUST(a->ah_attr.grh.hop_limit > 1);
    q->dest_qpn = a->dest_qp_num;
    q->rq_psn = a->rq_psn;
    errno = ENETUNREACH;
    return a->ah_attr.grh.sgid_index == FAKE_GID_INDEX && memcmp(a->ah_attr.grh.dgid.raw, server, sizeof server) == 0;
}

int ibv_modify_qp(struct ibv_qp *qp, struct ibv_qp_attr *a, int mask)
{
    struct fake_qp *q = (struct fake_qp *)qp;
    bool well = true;
    enter();
    switch (a->qp_state) {
    case IBV_QPS_INIT:
        MUST(qp->state == IBV_QPS_RESET && a->qp_access_flags == 0 && a->port_num == 1);
        MUST(mask == (IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS));
        break;
    case IBV_QPS_RTR:
        MUST(qp->state == IBV_QPS_INIT);
        MUST(mask == (IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN | IBV_QP_MAX_DEST_RD_ATOMIC |
                      IBV_QP_MIN_RNR_TIMER));
        well = connects(q, a);
        break;
    case IBV_QPS_RTS:
        MUST(qp->state == IBV_QPS_RTR && a->timeout > 0 && a->rnr_retry < 7 && a->max_rd_atomic > 0 && a->max_rd_atomic <= 16);
        MUST(mask == (IBV_QP_STATE | IBV_QP_SQ_PSN | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY |
                      IBV_QP_MAX_QP_RD_ATOMIC));
        q->sq_psn = a->sq_psn;
        break;
    default:
        MUST(!"a state that the agent has");
    }
    if (well)
        qp->state = a->qp_state;
    leave();
    return well ? 0 : -1;
}

/* Nothing of it is under way any more, and its completions have gone. */
int ibv_destroy_qp(struct ibv_qp *qp)
{
    struct fake_cq *c = (struct fake_cq *)qp->send_cq;
    enter();
    fake.qp[place(fake.qp, qp)] = NULL;
    c->n = 0;
    leave();
    free(qp);
    return 0;
}
