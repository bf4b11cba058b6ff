/* engine_api.c - see engine_api.h.  Must not make the library's symbols global: they would hide libc's. */
#include "engine_api.h"

#include <dlfcn.h>
#include <stddef.h>

const struct fm_region_api *fm_engine_api(const char *path, const char **why)
{
    const struct fm_region_api *api = dlsym(RTLD_DEFAULT, "fm_region_api");
    void *library = api == NULL ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : NULL;
    if (library != NULL)
        api = dlsym(library, "fm_region_api");
    *why = api == NULL ? dlerror() : "";
    return api;
}
