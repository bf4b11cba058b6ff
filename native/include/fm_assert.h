/* fm_assert.h - assertions that stay on, in every build.
 *
 * libc's assert() prints through stdio and may allocate: forbidden inside somebody
 * else's process.  Whoever links the code says in fm_panic() what a failed one does.
 */
#ifndef FM_ASSERT_H
#define FM_ASSERT_H

_Noreturn void fm_panic(const char *what, const char *file, int line);

#define fm_assert(x) (__builtin_expect(!!(x), 1) ? (void)0 : fm_panic(#x, __FILE__, __LINE__))

#endif
