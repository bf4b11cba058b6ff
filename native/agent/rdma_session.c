/* rdma_session.c - a session: one reliable connected queue pair, and the memory that it shares with an engine.
 *
 * The engine's requests become RDMA READs and WRITEs, a chain of them to each ring of the doorbell.  Everything that
 * the engine writes is read once and then checked: a request that leaves the frames or the lease ends the session.  So does
 * any error of the queue pair, because the device does nothing after one; the engine asks again in a new session.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

#include "fm_assert.h"
#include "rdma.h"

#define MEMORY_BYTES (FM_RDMA_SHARED_BYTES + FM_RDMA_PAGE_BYTES)
#define KEEP_ALIVE_FRAME FM_RDMA_FRAMES         /* as wr_id: in the page behind the frames */
#define KEEP_ALIVE_BYTES 8u
#define KEEP_ALIVE_NS 2000000000ull
#define HOP_LIMIT 64
#define ACK_TIMEOUT 15                          /* 4.096 us * 2^15: 134 ms, */
#define RETRIES 7                               /* so often */
#define RNR_RETRIES 6                           /* 7 would be without end; READ and WRITE meet none */
#define RNR_TIMER 12

static void end(struct fm_session *s, const char *why)
{
    s->state = FM_SESSION_OVER;
    s->why = why;
}

/* ---- our half ------------------------------------------------------------------------------------------ */

static const char *make_memory(struct fm_session *s)
{
    s->memfd = memfd_create("farmem-rdma", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (s->memfd < 0 || ftruncate(s->memfd, MEMORY_BYTES) != 0 ||
        fcntl(s->memfd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0)
        return "there is no memory for bounce frames\nstop other programs";
    s->memory = mmap(NULL, MEMORY_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, s->memfd, 0);
    if (s->memory == MAP_FAILED) {
        s->memory = NULL;
        return "there is no memory for bounce frames\nstop other programs";
    }
    s->ring = (struct fm_rdma_ring *)s->memory;
    s->mr = s->device->verbs->reg_mr(s->device->pd, s->memory + FM_RDMA_FRAMES_AT, MEMORY_BYTES - FM_RDMA_FRAMES_AT,
                                     IBV_ACCESS_LOCAL_WRITE);
    if (s->mr != NULL)
        return NULL;
    if (errno != ENOMEM && errno != EAGAIN)
        return "the RDMA device does not take the bounce frames\nsee the kernel's log";
    return "the limit on locked memory is too low to pin 512 KiB of bounce frames\nraise it: ulimit -l unlimited";
}

static bool to_init(struct fm_session *s)
{
    struct ibv_qp_attr a = { .qp_state = IBV_QPS_INIT, .port_num = s->device->port };     /* nobody may access us */
    return s->device->verbs->modify_qp(s->qp, &a, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS) == 0;
}

static const char *make_queue_pair(struct fm_session *s)
{
    struct fm_rdma_device *d = s->device;
    s->cq = d->verbs->create_cq(d->context, (int)d->depth + 1, s, d->channel, 0);
    struct ibv_qp_init_attr a = { .send_cq = s->cq, .recv_cq = s->cq, .qp_type = IBV_QPT_RC, .sq_sig_all = 1,
                                  .cap = { .max_send_wr = d->depth + 1, .max_recv_wr = 1, .max_send_sge = 1,
                                           .max_recv_sge = 1 } };
    s->qp = s->cq != NULL ? d->verbs->create_qp(d->pd, &a) : NULL;
    if (s->qp == NULL || !to_init(s))
        return "the RDMA device gives no queue pair\nsee how many there are: ibv_devinfo -v";
    return getrandom(&s->psn, sizeof s->psn, 0) == (ssize_t)sizeof s->psn ? NULL : "the system gives no random number\ntry again";
}

const char *fm_session_prepare(struct fm_session *s)
{
    const char *what = make_memory(s);
    if (what == NULL)
        what = make_queue_pair(s);
    s->psn &= 0xffffff;
    return what;
}

void fm_session_free(struct fm_session *s)
{
    const struct fm_verbs *v = s->device->verbs;
    if (s->qp != NULL)
        fm_assert(v->destroy_qp(s->qp) == 0);
    if (s->cq != NULL)
        fm_assert(v->destroy_cq(s->cq) == 0);
    if (s->mr != NULL)
        fm_assert(v->dereg_mr(s->mr) == 0);
    if (s->memory != NULL)
        munmap(s->memory, MEMORY_BYTES);
    if (s->memfd >= 0)
        close(s->memfd);
    if (s->sock >= 0)
        close(s->sock);
    free(s);
}

/* ---- the other half ------------------------------------------------------------------------------------- */

static bool to_ready_to_receive(struct fm_session *s)
{
    const struct fm_rdma_device *d = s->device;
    struct ibv_qp_attr a = { .qp_state = IBV_QPS_RTR, .path_mtu = d->mtu < s->peer.mtu ? d->mtu : s->peer.mtu,
                             .dest_qp_num = s->peer.qpn, .rq_psn = s->peer.psn, .max_dest_rd_atomic = 1,
                             .min_rnr_timer = RNR_TIMER, .ah_attr = { .dlid = s->peer.lid, .port_num = d->port } };
    if (d->is_ethernet || s->peer.lid == 0) {
        a.ah_attr.is_global = 1;
        a.ah_attr.grh.dgid = s->peer.gid;
        a.ah_attr.grh.sgid_index = (uint8_t)d->gid_index;
        a.ah_attr.grh.hop_limit = HOP_LIMIT;
    }
    return d->verbs->modify_qp(s->qp, &a, IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
                               IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER) == 0;
}

static bool to_ready_to_send(struct fm_session *s)
{
    uint32_t reads = s->peer.reads < s->device->reads ? s->peer.reads : s->device->reads;
    struct ibv_qp_attr a = { .qp_state = IBV_QPS_RTS, .sq_psn = s->psn, .timeout = ACK_TIMEOUT, .retry_cnt = RETRIES,
                             .rnr_retry = RNR_RETRIES, .max_rd_atomic = (uint8_t)reads };
    return s->device->verbs->modify_qp(s->qp, &a, IBV_QP_STATE | IBV_QP_SQ_PSN | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT |
                                       IBV_QP_RNR_RETRY | IBV_QP_MAX_QP_RD_ATOMIC) == 0;
}

bool fm_session_welcome(struct fm_session *s)
{
    struct fm_rdma_welcome w = { .magic = FM_RDMA_MAGIC, .version = FM_RDMA_VERSION, .bytes = FM_RDMA_SHARED_BYTES };
    char control[CMSG_SPACE(sizeof(int))] __attribute__((aligned(8))) = { 0 };
    struct iovec iov = { &w, sizeof w };
    struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control };
    struct cmsghdr *c = CMSG_FIRSTHDR(&m);
    *c = (struct cmsghdr){ .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(sizeof(int)) };
    memcpy(CMSG_DATA(c), &s->memfd, sizeof s->memfd);
    bool sent = sendmsg(s->sock, &m, MSG_DONTWAIT | MSG_NOSIGNAL) == (ssize_t)sizeof w;
    close(s->memfd);                      /* both have it mapped, or will have */
    s->memfd = -1;
    return sent;
}

static struct ibv_send_wr work(const struct fm_session *s, enum ibv_wr_opcode opcode, uint32_t frame, uint64_t at,
                               struct ibv_sge *sge)
{
    struct ibv_send_wr wr = { .wr_id = frame, .sg_list = sge, .num_sge = 1, .opcode = opcode };
    wr.wr.rdma.remote_addr = s->peer.address + at;
    wr.wr.rdma.rkey = s->peer.rkey;
    sge->addr = (uint64_t)(s->memory + FM_RDMA_FRAMES_AT) + (uint64_t)frame * FM_RDMA_PAGE_BYTES;
    sge->lkey = s->mr->lkey;
    return wr;
}

/* A peer that has gone is noticed by the retries that end; the bytes are nobody's. */
static void ask(struct fm_session *s)
{
    struct ibv_sge sge = { .length = KEEP_ALIVE_BYTES };
    struct ibv_send_wr *bad, wr = work(s, IBV_WR_RDMA_READ, KEEP_ALIVE_FRAME, 0, &sge);
    if (ibv_post_send(s->qp, &wr, &bad) != 0) {
        end(s, "the device took no keep-alive");
        return;
    }
    s->under_way++;
}

void fm_session_connect(struct fm_session *s, const struct fm_rdma_peer *peer)
{
    fm_assert(s->state == FM_SESSION_OPENING && peer->bytes >= FM_RDMA_PAGE_BYTES);
    s->peer = *peer;
    if (!to_ready_to_receive(s) || !to_ready_to_send(s)) {
        end(s, errno == ETIMEDOUT || errno == EHOSTUNREACH || errno == ENETUNREACH ? "there is no way to the server's GID" :
               "the device can't connect the queue pair");
        return;
    }
    s->state = FM_SESSION_UP;
    s->heard_ns = fm_agent_now_ns();
    if (s->is_trial)
        ask(s);
    else if (!fm_session_welcome(s))
        end(s, "the engine has gone");
}

/* ---- transfers ------------------------------------------------------------------------------------------ */

static void ring_engine(const struct fm_session *s)
{
    const char bell = 1;
    if (s->sock >= 0 && fm_rdma_load(&s->ring->engine_sleeps) != 0)
        (void)!send(s->sock, &bell, 1, MSG_DONTWAIT | MSG_NOSIGNAL);      /* if there is no room it has bells enough */
}

static bool take_ends(struct fm_session *s)
{
    struct ibv_wc wc[FM_RDMA_BATCH];
    int n = ibv_poll_cq(s->cq, FM_RDMA_BATCH, wc);
    for (int k = 0; k < n; k++) {
        fm_assert(s->under_way > 0);
        s->under_way--;
        if (wc[k].status != IBV_WC_SUCCESS) {
            end(s, s->device->verbs->wc_status_str(wc[k].status));
            break;
        }
        if (wc[k].wr_id == KEEP_ALIVE_FRAME)
            continue;
        fm_assert(wc[k].wr_id < FM_RDMA_FRAMES && s->pages[wc[k].wr_id] != 0);
        s->pages[wc[k].wr_id] = 0;
        s->ring->done[s->completed % FM_RDMA_FRAMES] = (uint32_t)wc[k].wr_id;
        fm_rdma_store(&s->ring->completed, ++s->completed);
    }
    if (n < 0)
        end(s, "the device has no completions any more");
    if (n > 0) {
        s->has_answered = s->state == FM_SESSION_UP;
        s->heard_ns = fm_agent_now_ns();
        ring_engine(s);
    }
    return n != 0;
}

static bool is_right(const struct fm_session *s, const struct fm_rdma_request *r)
{
    return (r->kind == FM_RDMA_READ || r->kind == FM_RDMA_WRITE) && r->n > 0 && r->n <= FM_RDMA_PAGES_MAX &&
           r->frame < FM_RDMA_FRAMES && r->frame + r->n <= FM_RDMA_FRAMES && s->pages[r->frame] == 0 &&
           ((uint64_t)r->slot + r->n) * FM_RDMA_PAGE_BYTES <= s->peer.bytes;
}

/* As many as there are, and as the device has room for, in one chain. */
static bool take_requests(struct fm_session *s)
{
    struct ibv_send_wr wr[FM_RDMA_BATCH], *bad;
    struct ibv_sge sge[FM_RDMA_BATCH];
    uint32_t n = 0, waiting = fm_rdma_load(&s->ring->requested) - s->taken;
    if (waiting > FM_RDMA_FRAMES) {
        end(s, "the engine asks for what can't be");
        return true;
    }
    for (; n < waiting && n < FM_RDMA_BATCH && s->under_way + n < s->device->depth; n++) {
        const volatile struct fm_rdma_request *there = &s->ring->request[s->taken % FM_RDMA_FRAMES];
        struct fm_rdma_request r = { there->kind, there->frame, there->slot, there->n };
        if (!is_right(s, &r)) {
            end(s, "the engine asks for what can't be");
            return true;
        }
        s->taken++;
        s->pages[r.frame] = (uint16_t)r.n;
        sge[n].length = r.n * FM_RDMA_PAGE_BYTES;
        wr[n] = work(s, r.kind == FM_RDMA_READ ? IBV_WR_RDMA_READ : IBV_WR_RDMA_WRITE, r.frame,
                     (uint64_t)r.slot * FM_RDMA_PAGE_BYTES, &sge[n]);
        if (n > 0)
            wr[n - 1].next = &wr[n];
    }
    if (n > 0 && ibv_post_send(s->qp, wr, &bad) != 0)
        end(s, "the device took no more work");
    s->under_way += n;
    return n > 0;
}

bool fm_session_step(struct fm_session *s)
{
    bool any = take_ends(s);
    if (s->state == FM_SESSION_UP && !s->is_trial)
        any |= take_requests(s);
    return any;
}

void fm_session_sleeps(struct fm_session *s, bool sleeps)
{
    fm_rdma_store(&s->ring->agent_sleeps, sleeps);
    if (sleeps && s->under_way > 0 && ibv_req_notify_cq(s->cq, 0) != 0)
        end(s, "the device has no completions any more");
}

void fm_session_look(struct fm_session *s, uint64_t now)
{
    if (s->state == FM_SESSION_UP && s->under_way == 0 && (int64_t)(now - s->heard_ns) > (int64_t)KEEP_ALIVE_NS)
        ask(s);
}
