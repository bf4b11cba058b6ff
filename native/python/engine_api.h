/* engine_api.h - finding the engine in this process, for the Python API.  Linked into farmem._native only. */
#ifndef FM_ENGINE_API_H
#define FM_ENGINE_API_H

#include "region.h"

/* cdef begins */
/* The table of functions of the library that is here already (`farmem run`), else of the one at path, which stays
 * loaded from now on.  NULL: *why says why, until the next call. */
const struct fm_region_api *fm_engine_api(const char *path, const char **why);
/* cdef ends */

#endif
