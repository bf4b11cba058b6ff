/* rdma_main.c - farmem-rdma: what it is started with.  See rdma.h, and farmem/agent.py for its descriptors.
 *
 *   farmem-rdma LIBRARY DEVICE GID-INDEX       DEVICE `any`, GID-INDEX -1: chosen
 *
 * FARMEM_RDMA_TOKEN in the environment is what engines must know, in hex.  Started by farmem alone: nobody types this.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include "fm_assert.h"
#include "rdma.h"

#define CONTROL 0
#define LISTENER 3

_Noreturn void fm_panic(const char *what, const char *file, int line)
{
    dprintf(2, "farmem-rdma stops: %s does not hold (%s:%d)\n", what, file, line);
    abort();
}

static bool read_token(uint8_t *token)
{
    const char *hex = getenv("FARMEM_RDMA_TOKEN");
    if (hex == NULL || strlen(hex) != 2 * FM_RDMA_TOKEN_BYTES)
        return false;
    for (uint32_t k = 0; k < FM_RDMA_TOKEN_BYTES; k++)
        if (sscanf(hex + 2 * k, "%2hhx", &token[k]) != 1)
            return false;
    return true;
}

static void raise_limit(int which)
{
    struct rlimit l;
    if (getrlimit(which, &l) != 0)
        return;
    l.rlim_cur = l.rlim_max;
    (void)setrlimit(which, &l);
}

int main(int argc, char **argv)
{
    struct fm_agent_options options = { .control = CONTROL, .listener = LISTENER };
    struct fm_verbs verbs;
    if (argc != 4 || !read_token(options.token)) {
        fprintf(stderr, "farmem-rdma is started by farmem run --pool rdma://HOST:PORT, and by nobody else\n");
        return 2;
    }
    raise_limit(RLIMIT_MEMLOCK);              /* bounce frames are pinned */
    raise_limit(RLIMIT_NOFILE);
    options.device = strcmp(argv[2], "any") == 0 ? NULL : argv[2];
    options.gid_index = atoi(argv[3]);
    const char *what = fm_verbs_load(&verbs, argv[1]);
    if (what != NULL) {
        fm_control_complain(&(struct fm_agent){ .options = &options }, "refused", what);
        return 1;
    }
    return fm_agent_run(&options, &verbs);
}
