/* measure REPORT CMD...: runs CMD, ends as it ended, and writes its peak resident
 * memory in bytes to REPORT.  A process forked by a big parent is charged with the
 * parent's memory (it shares it until exec); one forked by this small program is not. */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    if (argc < 3) {
        fprintf(stderr, "usage: measure REPORT CMD...\n");
        return 125;
    }
    pid_t pid = fork();
    if (pid == 0) {
        execvp(argv[2], argv + 2);
        perror(argv[2]);
        _exit(127);
    }
    int status = 0;
    struct rusage usage;
    while (wait4(pid, &status, 0, &usage) < 0)
        if (errno != EINTR)
            return 125;
    FILE *report = fopen(argv[1], "w");
    if (report != NULL) {
        fprintf(report, "%lld\n", (long long)usage.ru_maxrss * 1024);
        fclose(report);
    }
    if (WIFSIGNALED(status)) {
        struct rlimit none = {0, 0};
        setrlimit(RLIMIT_CORE, &none);
        signal(WTERMSIG(status), SIG_DFL);
        kill(getpid(), WTERMSIG(status));
    }
    return WEXITSTATUS(status);
}
