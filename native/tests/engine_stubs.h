/* engine_stubs.h - see engine_stubs.c. */
#ifndef FM_ENGINE_STUBS_H
#define FM_ENGINE_STUBS_H

#define EXIT_UNSUPPORTED 77
extern int status_when_ended;     /* the exit status of a test in which the engine ends the program: 1, a failure */

#endif
