/* without_calls.c - runs a command as a sandbox would: some system calls are refused by a seccomp filter.
 *
 *     without_calls ERRNO|kill NUMBER... -- CMD ARG...
 */
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

#define CALLS_MAX 32

int main(int argc, char **argv)
{
    struct sock_filter filter[2 * CALLS_MAX + 2];
    unsigned short n = 0;
    int k = 2;
    if (argc < 5)
        return 2;
    unsigned verdict = strcmp(argv[1], "kill") == 0 ? SECCOMP_RET_KILL_PROCESS
                                                    : SECCOMP_RET_ERRNO | (unsigned)atoi(argv[1]);
    filter[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
    for (; k < argc && strcmp(argv[k], "--") != 0 && k < 2 + CALLS_MAX; k++) {
        filter[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)atoi(argv[k]), 0, 1);
        filter[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, verdict);
    }
    filter[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    struct sock_fprog program = { .len = n, .filter = filter };
    if (k + 1 >= argc || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 ||
        prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) != 0) {
        perror("without_calls");
        return 2;
    }
    execvp(argv[k + 1], argv + k + 1);
    perror(argv[k + 1]);
    return 2;
}
