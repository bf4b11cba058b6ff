/* rdma_peer.c - see rdma_peer.h.  The agent runs in a thread of the test, with the fake verbs behind its table. */
#include "rdma_peer.h"

#include <errno.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "check.h"

#undef ibv_reg_mr
#undef ibv_query_port
#undef ibv_get_device_list

struct peer peer = { .lock = PTHREAD_MUTEX_INITIALIZER };

static const struct fm_verbs verbs = {
    .get_device_list = ibv_get_device_list,
    .free_device_list = ibv_free_device_list,
    .get_device_name = ibv_get_device_name,
    .open_device = ibv_open_device,
    .close_device = ibv_close_device,
    .query_device = ibv_query_device,
    .query_port = ibv_query_port,
    .query_gid_ex = _ibv_query_gid_ex,
    .alloc_pd = ibv_alloc_pd,
    .dealloc_pd = ibv_dealloc_pd,
    .reg_mr = ibv_reg_mr,
    .dereg_mr = ibv_dereg_mr,
    .create_comp_channel = ibv_create_comp_channel,
    .destroy_comp_channel = ibv_destroy_comp_channel,
    .create_cq = ibv_create_cq,
    .destroy_cq = ibv_destroy_cq,
    .get_cq_event = ibv_get_cq_event,
    .ack_cq_events = ibv_ack_cq_events,
    .create_qp = ibv_create_qp,
    .modify_qp = ibv_modify_qp,
    .destroy_qp = ibv_destroy_qp,
    .wc_status_str = ibv_wc_status_str,
};

/* ---- the servers' halves: number k of the agent's is at place k % FAKE_HALVES ------------------------------------ */

static uint64_t get(const uint64_t *word) { return __atomic_load_n(word, __ATOMIC_SEQ_CST); }
static void set(uint64_t *word, uint64_t value) { __atomic_store_n(word, value, __ATOMIC_SEQ_CST); }

static uint32_t alive(void)
{
    uint32_t n = 0;
    for (uint32_t k = 0; k < FAKE_HALVES; k++)
        n += get(&peer.fabric->half[k].alive) != 0;
    return n;
}

static void open_half(const char *words)
{
    uint32_t id, lease, qpn, psn;
    char line[FM_RDMA_LINE_BYTES];
    CHECK(sscanf(words, "%u %u %u %u ::ffff:10.0.0.1 0 1024 ethernet 16", &id, &lease, &qpn, &psn) == 4 && psn < 1u << 24);
    CHECK(lease < PEER_LEASES);
    if (atomic_load(&peer.one_at_a_time) != 0)
        CHECK(alive() == 0);
    if (atomic_load(&peer.refuses) > 0) {
        atomic_fetch_sub(&peer.refuses, 1);
        snprintf(line, sizeof line, "refused %u\n", id);
        peer_tell(line);
        return;
    }
    struct fake_half *h = &peer.fabric->half[id % FAKE_HALVES];
    CHECK(get(&h->alive) == 0);
    *h = (struct fake_half){ .qpn = 0x800000 + id, .psn = (uint32_t)rand() & 0xffffff, .peer_qpn = qpn, .peer_psn = psn,
                             .start = lease * peer.lease_bytes, .bytes = peer.lease_bytes,
                             .silent = atomic_load(&peer.silent_of[lease]) };
    set(&h->alive, 1);
    snprintf(line, sizeof line, "opened %u %u %u ::ffff:10.0.0.2 0 4096 %u %llu %llu 8\n", id, (uint32_t)h->qpn, (uint32_t)h->psn,
             peer.rkeys + (uint32_t)(h->start >> 21), (unsigned long long)(peer.fabric->address + h->start),
             (unsigned long long)h->bytes);
    peer_tell(line);
    atomic_fetch_add(&peer.opened_of[lease], 1);
    atomic_fetch_add(&peer.opened, 1);
}

static void close_half(const char *words)
{
    uint32_t id, lease;
    CHECK(sscanf(words, "%u %u ", &id, &lease) == 2 && lease < PEER_LEASES);
    set(&peer.fabric->half[id % FAKE_HALVES].alive, 0);
    atomic_fetch_add(&peer.closed_of[lease], 1);
}

void peer_silence(uint32_t lease, bool on)
{
    pthread_mutex_lock(&peer.lock);
    atomic_store(&peer.silent_of[lease], on);
    for (struct fake_half *h = peer.fabric->half; h < peer.fabric->half + FAKE_HALVES; h++)
        if (get(&h->alive) != 0 && h->start == lease * peer.lease_bytes)
            set(&h->silent, on);
    pthread_mutex_unlock(&peer.lock);
}

static void hear_line(const char *line)
{
    if (strncmp(line, "open ", 5) == 0) {
        open_half(line + 5);
    } else if (strncmp(line, "closed ", 7) == 0) {
        close_half(line + 7);
        snprintf(peer.last_closed, sizeof peer.last_closed, "%s", line);
        atomic_fetch_add(&peer.closed, 1);
    } else if (strncmp(line, "reached ", 8) == 0) {
        atomic_fetch_add(&peer.reached, 1);
    } else if (strcmp(line, "ready") == 0) {
        atomic_fetch_add(&peer.ready, 1);
    } else {
        snprintf(peer.last_failed, sizeof peer.last_failed, "%s", line);
        atomic_fetch_add(&peer.refused, 1);
    }
}

static void *hear(void *arg)
{
    char text[4 * FM_RDMA_LINE_BYTES], *end;
    size_t n = 0;
    ssize_t r;
    (void)arg;
    while ((r = recv(peer.control[0], text + n, sizeof text - 1 - n, 0)) > 0) {
        n += (size_t)r;
        text[n] = 0;
        while ((end = strchr(text, '\n')) != NULL) {
            *end = 0;
            pthread_mutex_lock(&peer.lock);
            hear_line(text);
            pthread_mutex_unlock(&peer.lock);
            n -= (size_t)(end + 1 - text);
            memmove(text, end + 1, n + 1);
        }
    }
    return NULL;
}

/* The agent may have ended. */
void peer_tell(const char *line)
{
    ssize_t n = (ssize_t)strlen(line);
    CHECK(send(peer.control[0], line, (size_t)n, MSG_NOSIGNAL) == n || errno == EPIPE);
}

/* ---- the agent ------------------------------------------------------------------------------------------- */

static void *run_agent(void *arg)
{
    (void)arg;
    peer.status = fm_agent_run(&peer.options, &verbs);
    shutdown(peer.control[1], SHUT_RDWR);
    return NULL;
}

void agent_start(void)
{
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, peer.control) == 0);
    peer.options.control = peer.control[1];
    CHECK(pthread_create(&peer.hears, NULL, hear, NULL) == 0);
    CHECK(pthread_create(&peer.agent, NULL, run_agent, NULL) == 0);
}

void agent_stop(void)
{
    shutdown(peer.control[0], SHUT_WR);
    CHECK(pthread_join(peer.agent, NULL) == 0 && pthread_join(peer.hears, NULL) == 0);
    close(peer.control[0]);
    close(peer.control[1]);
    for (uint32_t k = 0; k < FAKE_HALVES; k++)
        set(&peer.fabric->half[k].alive, 0);
}

static void make_fabric(uint64_t bytes, uint64_t seed)
{
    char path[64];
    int fd = memfd_create("fabric", 0);
    CHECK(fd >= 0 && ftruncate(fd, (off_t)(FAKE_MEMORY_AT + bytes)) == 0);
    char *at = mmap(NULL, FAKE_MEMORY_AT + bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    CHECK(at != MAP_FAILED);
    peer.fabric = (struct fake_fabric *)at;
    peer.memory = at + FAKE_MEMORY_AT;
    *peer.fabric = (struct fake_fabric){ .magic = FAKE_MAGIC, .rkey = 0xfedcba98, .address = 0x7f0000000000ull, .bytes = bytes,
                                         .seed = seed, .retry_ns = 50000000 };
    peer.rkeys = (uint32_t)peer.fabric->rkey;
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    setenv("FARMEM_TEST_FABRIC", path, 1);
}

static socklen_t agent_address(struct sockaddr_un *a)
{
    *a = (struct sockaddr_un){ .sun_family = AF_UNIX };
    int n = snprintf(a->sun_path + 1, sizeof a->sun_path - 1, "farmem-test-rdma-%d", getpid());
    return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)n);
}

void address_of_agent(struct fm_pool_server *there, uint32_t lease)
{
    struct sockaddr_un a;
    struct fm_rdma_pass pass = { .lease = lease };
    memcpy(pass.token, peer.options.token, sizeof pass.token);
    there->address_bytes = agent_address(&a);
    memcpy(there->address, &a, there->address_bytes);
    there->export_bytes = sizeof pass;
    memcpy(there->export_name, &pass, sizeof pass);
}

void peer_open(uint64_t lease_bytes, uint64_t seed)
{
    struct sockaddr_un a;
    socklen_t n = agent_address(&a);
    peer.lease_bytes = lease_bytes;
    make_fabric(PEER_LEASES * lease_bytes, seed);
    srand((unsigned int)seed);
    peer.listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    CHECK(peer.listener >= 0 && bind(peer.listener, (struct sockaddr *)&a, n) == 0 && listen(peer.listener, 16) == 0);
    peer.options = (struct fm_agent_options){ .listener = peer.listener, .gid_index = -1, .token = "0123456789abcde" };
}
