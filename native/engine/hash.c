/* hash.c - the only user of xxhash's header, so that its options are set in one place.
 *
 * Clean elimination trusts the 128-bit hash against hostile data, hence the secret.
 */
#include "engine/hash.h"

#include "control.h"

#define XXH_INLINE_ALL
#define XXH_NO_STREAM
#include <xxhash.h>

static bool all_zero(const uint64_t *w)
{
    for (uint32_t k = 0; k < FM_PAGE_BYTES / 8; k += 8)
        if ((w[k] | w[k + 1] | w[k + 2] | w[k + 3] | w[k + 4] | w[k + 5] | w[k + 6] | w[k + 7]) != 0)
            return false;
    return true;
}

bool fm_hash_page(const void *page, const uint8_t *secret, uint64_t hash[2])
{
    if (all_zero(page)) {
        hash[0] = hash[1] = 0;
        return true;
    }
    XXH128_hash_t h = XXH3_128bits_withSecret(page, FM_PAGE_BYTES, secret, FM_SECRET_BYTES);
    hash[0] = h.low64;
    hash[1] = h.high64;
    return false;
}

uint64_t fm_hash64(const void *page) { return XXH3_64bits(page, FM_PAGE_BYTES); }
