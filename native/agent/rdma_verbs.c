/* rdma_verbs.c - libibverbs at run time: farmem is built with its headers alone, and runs without it. */
#include <dlfcn.h>
#include <stddef.h>
#include <stdio.h>

#include "rdma.h"

struct name {
    const char *symbol;
    size_t at;
};

/* Default versions of the symbols: what a program linked today would get. */
static const struct name names[] = {
    { "ibv_get_device_list", offsetof(struct fm_verbs, get_device_list) },
    { "ibv_free_device_list", offsetof(struct fm_verbs, free_device_list) },
    { "ibv_get_device_name", offsetof(struct fm_verbs, get_device_name) },
    { "ibv_open_device", offsetof(struct fm_verbs, open_device) },
    { "ibv_close_device", offsetof(struct fm_verbs, close_device) },
    { "ibv_query_device", offsetof(struct fm_verbs, query_device) },
    { "ibv_query_port", offsetof(struct fm_verbs, query_port) },
    { "_ibv_query_gid_ex", offsetof(struct fm_verbs, query_gid_ex) },
    { "ibv_alloc_pd", offsetof(struct fm_verbs, alloc_pd) },
    { "ibv_dealloc_pd", offsetof(struct fm_verbs, dealloc_pd) },
    { "ibv_reg_mr", offsetof(struct fm_verbs, reg_mr) },
    { "ibv_dereg_mr", offsetof(struct fm_verbs, dereg_mr) },
    { "ibv_create_comp_channel", offsetof(struct fm_verbs, create_comp_channel) },
    { "ibv_destroy_comp_channel", offsetof(struct fm_verbs, destroy_comp_channel) },
    { "ibv_create_cq", offsetof(struct fm_verbs, create_cq) },
    { "ibv_destroy_cq", offsetof(struct fm_verbs, destroy_cq) },
    { "ibv_get_cq_event", offsetof(struct fm_verbs, get_cq_event) },
    { "ibv_ack_cq_events", offsetof(struct fm_verbs, ack_cq_events) },
    { "ibv_create_qp", offsetof(struct fm_verbs, create_qp) },
    { "ibv_modify_qp", offsetof(struct fm_verbs, modify_qp) },
    { "ibv_destroy_qp", offsetof(struct fm_verbs, destroy_qp) },
    { "ibv_wc_status_str", offsetof(struct fm_verbs, wc_status_str) },
};

const char *fm_verbs_load(struct fm_verbs *verbs, const char *library)
{
    static char what[FM_RDMA_TEXT_BYTES];
    void *handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
    if (handle == NULL) {
        snprintf(what, sizeof what, "libibverbs can't be loaded (%.300s)\n"
                 "install it: apt-get install libibverbs1 ibverbs-providers", dlerror());
        return what;
    }
    for (const struct name *n = names; n < names + sizeof names / sizeof names[0]; n++) {
        void *found = dlsym(handle, n->symbol);
        if (found == NULL) {
            snprintf(what, sizeof what, "libibverbs has no %s\ninstall a newer one (rdma-core 32 or later)", n->symbol);
            return what;
        }
        *(void **)((char *)verbs + n->at) = found;
    }
    return NULL;
}
