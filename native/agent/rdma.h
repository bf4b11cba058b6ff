/* rdma.h - the agent of `rdma:` pools, farmem-rdma: one process for each job, which speaks to the RDMA device for the engines.
 *
 * Engines have no libc to speak of, and no library may live on a program's heap; so libibverbs is loaded here, through a
 * table, and never linked.  The agent does what its two sides ask: on the control socket (lines; farmem/rdmaagent.py) it is
 * told about the server's half of each queue pair, on its listening socket engines join (rdma_ring.h).  It reads no file but
 * the library's and writes none; farmem/agent.py says how it is started, and what it holds.
 *
 * A session is for one process and one lease of the job's, which may be of different servers: one that fails is nothing to the
 * others.  All are of one protection domain.
 *
 *   rdma_main.c     arguments                 rdma_verbs.c    the table
 *   rdma_device.c   device, port, GID         rdma_session.c  one queue pair: transfers, keep-alive, its end
 *   rdma_agent.c    the loop: who joins, when to sleep
 *   rdma_control.c  what is said to control and by it
 */
#ifndef FM_AGENT_RDMA_H
#define FM_AGENT_RDMA_H

#include <infiniband/verbs.h>
#include <stdbool.h>
#include <stdint.h>

#include "rdma_ring.h"

#define FM_RDMA_SESSIONS_MAX 4096u
#define FM_RDMA_TEXT_BYTES 512u
#define FM_RDMA_LINE_BYTES 1024u          /* on the control socket */
#define FM_RDMA_DEPTH 128u                /* transfers of one session that the device has in hand */
#define FM_RDMA_BATCH 32u                 /* work requests to one ring of the device's doorbell */

/* What is used of libibverbs, under its own names. */
struct fm_verbs {
    struct ibv_device **(*get_device_list)(int *n);
    void (*free_device_list)(struct ibv_device **list);
    const char *(*get_device_name)(struct ibv_device *device);
    struct ibv_context *(*open_device)(struct ibv_device *device);
    int (*close_device)(struct ibv_context *context);
    int (*query_device)(struct ibv_context *context, struct ibv_device_attr *attr);
    int (*query_port)(struct ibv_context *context, uint8_t port, struct _compat_ibv_port_attr *attr);
    int (*query_gid_ex)(struct ibv_context *context, uint32_t port, uint32_t index, struct ibv_gid_entry *entry,
                        uint32_t flags, size_t entry_bytes);
    struct ibv_pd *(*alloc_pd)(struct ibv_context *context);
    int (*dealloc_pd)(struct ibv_pd *pd);
    struct ibv_mr *(*reg_mr)(struct ibv_pd *pd, void *at, size_t bytes, int access);
    int (*dereg_mr)(struct ibv_mr *mr);
    struct ibv_comp_channel *(*create_comp_channel)(struct ibv_context *context);
    int (*destroy_comp_channel)(struct ibv_comp_channel *channel);
    struct ibv_cq *(*create_cq)(struct ibv_context *context, int n, void *of, struct ibv_comp_channel *channel, int vector);
    int (*destroy_cq)(struct ibv_cq *cq);
    int (*get_cq_event)(struct ibv_comp_channel *channel, struct ibv_cq **cq, void **of);
    void (*ack_cq_events)(struct ibv_cq *cq, unsigned int n);
    struct ibv_qp *(*create_qp)(struct ibv_pd *pd, struct ibv_qp_init_attr *attr);
    int (*modify_qp)(struct ibv_qp *qp, struct ibv_qp_attr *attr, int mask);
    int (*destroy_qp)(struct ibv_qp *qp);
    const char *(*wc_status_str)(enum ibv_wc_status status);
};

struct fm_rdma_device {
    const struct fm_verbs *verbs;
    struct ibv_context *context;
    struct ibv_pd *pd;                    /* the job's */
    struct ibv_comp_channel *channel;
    char name[64];
    uint8_t port;
    int gid_index;
    union ibv_gid gid;
    uint16_t lid;
    enum ibv_mtu mtu;
    bool is_ethernet;
    uint32_t depth;                       /* FM_RDMA_DEPTH, or less where the device has less */
    uint8_t reads;                        /* that the device can have under way on one queue pair */
};

/* The other half of a queue pair. */
struct fm_rdma_peer {
    uint32_t qpn, psn, rkey, retry_count, reads;
    uint16_t lid;
    enum ibv_mtu mtu;
    union ibv_gid gid;
    uint64_t address, bytes;
};

enum fm_session_state {
    FM_SESSION_SILENT = 0,                /* somebody has connected, and has said nothing yet */
    FM_SESSION_OPENING,                   /* control asks the server for the other half */
    FM_SESSION_UP,
    FM_SESSION_OVER                       /* to be closed, for the reason in why */
};

struct fm_session {
    struct fm_rdma_device *device;
    uint32_t id;
    uint32_t state;                       /* enum fm_session_state */
    bool is_trial;                        /* without an engine: a read shows whether the server can be reached */
    int sock;                             /* the engine's; -1: a trial's */
    uint32_t slot;
    uint32_t lease;                       /* whose server is meant, by the number that control knows */
    int memfd;
    char *memory;                         /* shared with the engine; a page more, for the keep-alive, is ours alone */
    struct fm_rdma_ring *ring;
    struct ibv_mr *mr;
    struct ibv_cq *cq;
    struct ibv_qp *qp;
    uint32_t psn;
    struct fm_rdma_peer peer;
    uint32_t taken, completed;
    uint32_t under_way;                   /* work requests posted and not ended, the keep-alive included */
    uint16_t pages[FM_RDMA_FRAMES];       /* of the transfer that begins at a frame; 0: none is under way there */
    bool has_answered;
    uint64_t heard_ns;                    /* when the session began, or the peer last answered */
    const char *why;                      /* it is over */
};

/* rdma_verbs.c */
const char *fm_verbs_load(struct fm_verbs *verbs, const char *library);   /* NULL, or what is wrong */

/* rdma_device.c: NULL, or what is wrong, with a word on what to do behind a line feed */
const char *fm_device_open(struct fm_rdma_device *d, const struct fm_verbs *verbs, const char *name, int gid_index);
void fm_device_close(struct fm_rdma_device *d);

/* rdma_session.c */
const char *fm_session_prepare(struct fm_session *s);          /* memory and our half of the queue pair; NULL, or what failed */
void fm_session_connect(struct fm_session *s, const struct fm_rdma_peer *peer);   /* up, or over */
bool fm_session_step(struct fm_session *s);                    /* whether anything was done */
void fm_session_sleeps(struct fm_session *s, bool sleeps);     /* the engine and the device are to wake us, or need not */
void fm_session_look(struct fm_session *s, uint64_t now);      /* the keep-alive */
bool fm_session_welcome(struct fm_session *s);
void fm_session_free(struct fm_session *s);                    /* when it returns, nothing of it is under way */

/* rdma_agent.c */
struct fm_agent_options {
    int control, listener;
    const char *device;                   /* NULL: the first that has an active port */
    int gid_index;                        /* -1: chosen */
    uint8_t token[FM_RDMA_TOKEN_BYTES];   /* who knows it is an engine of the job */
};

struct fm_agent {
    const struct fm_agent_options *options;
    struct fm_rdma_device device;
    struct fm_session *session[FM_RDMA_SESSIONS_MAX];
    uint32_t sessions, sessions_max;      /* FM_RDMA_SESSIONS_MAX, or as many as there are descriptors for */
    uint32_t ids;
    int epoll;
    bool is_over;                         /* control has gone, so the job has */
    char line[FM_RDMA_LINE_BYTES];        /* of control's, as far as it has come */
    uint32_t line_bytes;
    uint64_t attended_ns, looked_ns;
};

int fm_agent_run(const struct fm_agent_options *options, const struct fm_verbs *verbs);   /* to the job's end; exit status */
struct fm_session *fm_agent_session(struct fm_agent *a, int sock, bool is_trial);          /* NULL: there are too many */
void fm_agent_open(struct fm_agent *a, struct fm_session *s, uint32_t lease);              /* opening, or over */
uint64_t fm_agent_now_ns(void);

/* rdma_control.c */
void fm_control_say(const struct fm_agent *a, const char *format, ...) __attribute__((format(printf, 2, 3)));
void fm_control_complain(const struct fm_agent *a, const char *word, const char *what);    /* "WHAT\nHINT" */
void fm_control_open(const struct fm_agent *a, const struct fm_session *s);
void fm_control_read(struct fm_agent *a);

#endif
