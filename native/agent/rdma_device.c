/* rdma_device.c - which device, which port, and by which GID of it the server is to reach us. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "rdma.h"

#define GIDS_MAX 256u
#define LINK_LOCAL 0xfe80u

static char text[FM_RDMA_TEXT_BYTES];

/* The one that any host of the network is most likely to have a way to: RoCE v2 over IPv4, then over a global IPv6
 * address; InfiniBand has one kind only.  0: not to be used. */
static int worth(const struct ibv_gid_entry *e, bool is_ethernet)
{
    static const uint8_t nothing[16], mapped[12] = { 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff };
    const uint8_t *raw = e->gid.raw;
    bool is_local = (raw[0] << 8 | raw[1]) == LINK_LOCAL;
    if (memcmp(raw, nothing, sizeof nothing) == 0)
        return 0;
    if (!is_ethernet)
        return e->gid_type == IBV_GID_TYPE_IB ? is_local ? 2 : 1 : 0;
    if (e->gid_type == IBV_GID_TYPE_ROCE_V1)
        return is_local ? 1 : 2;
    if (e->gid_type != IBV_GID_TYPE_ROCE_V2)
        return 0;
    return memcmp(raw, mapped, sizeof mapped) == 0 ? 5 : is_local ? 3 : 4;
}

static bool read_gid(struct fm_rdma_device *d, uint32_t index, struct ibv_gid_entry *e)
{
    memset(e, 0, sizeof *e);
    return d->verbs->query_gid_ex(d->context, d->port, index, e, 0, sizeof *e) == 0;
}

static const char *choose_gid(struct fm_rdma_device *d, int wanted, int count)
{
    struct ibv_gid_entry e;
    int best = 0;
    if (wanted >= 0) {
        d->gid_index = wanted;
        if (wanted < count && read_gid(d, (uint32_t)wanted, &e) && worth(&e, d->is_ethernet) != 0) {
            d->gid = e.gid;
            return NULL;
        }
        snprintf(text, sizeof text, "RDMA device %s has no usable GID of index %d\nleave --rdma-gid-index out, or look: "
                 "show_gids, or /sys/class/infiniband/%s/ports/%u/gids", d->name, wanted, d->name, d->port);
        return text;
    }
    for (uint32_t k = 0; k < (uint32_t)count && k < GIDS_MAX; k++) {
        int value = read_gid(d, k, &e) ? worth(&e, d->is_ethernet) : 0;
        if (value <= best)
            continue;
        best = value;
        d->gid_index = (int)k;
        d->gid = e.gid;
    }
    if (best != 0)
        return NULL;
    snprintf(text, sizeof text, "RDMA device %s has no GID: its network interface is down or has no address\n"
             "see: rdma link, ip address", d->name);
    return text;
}

static bool open_port(struct fm_rdma_device *d, const struct ibv_device_attr *attr, int *gids)
{
    for (uint8_t port = 1; port <= attr->phys_port_cnt; port++) {
        struct ibv_port_attr p;
        memset(&p, 0, sizeof p);
        if (d->verbs->query_port(d->context, port, (struct _compat_ibv_port_attr *)&p) != 0 || p.state != IBV_PORT_ACTIVE)
            continue;
        d->port = port;
        d->lid = p.lid;
        d->mtu = p.active_mtu;
        d->is_ethernet = p.link_layer == IBV_LINK_LAYER_ETHERNET;
        *gids = p.gid_tbl_len;
        return true;
    }
    return false;
}

static void learn_limits(struct fm_rdma_device *d, const struct ibv_device_attr *attr)
{
    uint32_t most = attr->max_qp_wr < attr->max_cqe ? (uint32_t)attr->max_qp_wr : (uint32_t)attr->max_cqe;
    int reads = attr->max_qp_init_rd_atom;
    d->depth = most > FM_RDMA_DEPTH ? FM_RDMA_DEPTH : most - 1;       /* and one for the keep-alive */
    d->reads = (uint8_t)(reads < 1 ? 1 : reads > 16 ? 16 : reads);
}

/* NULL: this is the one. */
static const char *try_device(struct fm_rdma_device *d, struct ibv_device *device, int gid_index)
{
    const struct fm_verbs *v = d->verbs;
    struct ibv_device_attr attr;
    int gids = 0;
    snprintf(d->name, sizeof d->name, "%s", v->get_device_name(device));
    d->context = v->open_device(device);
    if (d->context == NULL) {
        snprintf(text, sizeof text, "RDMA device %s can't be opened: %s\nsee who may use /dev/infiniband/uverbs*", d->name,
                 strerror(errno));
        return text;
    }
    const char *what = NULL;
    if (v->query_device(d->context, &attr) != 0 || attr.max_qp_wr < 2 || !open_port(d, &attr, &gids)) {
        snprintf(text, sizeof text, "RDMA device %s has no active port\nsee: rdma link", d->name);
        what = text;
    } else {
        learn_limits(d, &attr);
        what = choose_gid(d, gid_index, gids);
    }
    if (what != NULL) {
        v->close_device(d->context);
        d->context = NULL;
    }
    return what;
}

static const char *no_device(const char *name)
{
    if (name == NULL)
        return "there is no RDMA device here\nsee: ls /sys/class/infiniband (Soft-RoCE makes one of any network interface: "
               "rdma link add rxe0 type rxe netdev eth0); libibverbs needs its driver: apt-get install ibverbs-providers";
    snprintf(text, sizeof text, "there is no RDMA device %.100s\nsee: ls /sys/class/infiniband", name);
    return text;
}

static const char *open_queues(struct fm_rdma_device *d)
{
    const struct fm_verbs *v = d->verbs;
    d->pd = v->alloc_pd(d->context);
    d->channel = d->pd != NULL ? v->create_comp_channel(d->context) : NULL;
    if (d->channel != NULL && fcntl(d->channel->fd, F_SETFL, fcntl(d->channel->fd, F_GETFL) | O_NONBLOCK) == 0)
        return NULL;
    snprintf(text, sizeof text, "RDMA device %s gives no protection domain: %s\nsee the kernel's log", d->name, strerror(errno));
    return text;
}

const char *fm_device_open(struct fm_rdma_device *d, const struct fm_verbs *verbs, const char *name, int gid_index)
{
    int n = 0;
    memset(d, 0, sizeof *d);
    d->verbs = verbs;
    struct ibv_device **list = verbs->get_device_list(&n);
    const char *what = no_device(name);
    for (int k = 0; list != NULL && k < n && d->context == NULL; k++)
        if (name == NULL || strcmp(verbs->get_device_name(list[k]), name) == 0)
            what = try_device(d, list[k], gid_index);
    if (list != NULL)
        verbs->free_device_list(list);
    if (what == NULL)
        what = open_queues(d);
    if (what != NULL)
        fm_device_close(d);
    return what;
}

void fm_device_close(struct fm_rdma_device *d)
{
    if (d->channel != NULL)
        d->verbs->destroy_comp_channel(d->channel);
    if (d->pd != NULL)
        d->verbs->dealloc_pd(d->pd);
    if (d->context != NULL)
        d->verbs->close_device(d->context);
    d->channel = NULL;
    d->pd = NULL;
    d->context = NULL;
}
