/* hash.h - XXH3 of a page, with the job's secret (128 bits: identity; 64 bits: the checksum filter's). */
#ifndef FM_HASH_H
#define FM_HASH_H

#include <stdbool.h>
#include <stdint.h>

/* True, and hash untouched by the secret, when the page is all zeros. */
bool fm_hash_page(const void *page, const uint8_t *secret, uint64_t hash[2]);
uint64_t fm_hash64(const void *page);

#endif
