/* spawns [ROUNDS]: a program with memory away starts others in every way there is: fork and
 * exec, vfork, posix_spawn, system(3), popen(3), from several threads. All of them must
 * just work, and leave our memory as it was. */
#include "safety.h"
#include <spawn.h>

#define BYTES (32 * MIB / SHRINK)

extern char **environ;
static char *memory;

static void by_vfork(void)
{
    pid_t pid = vfork();
    CHECK(pid >= 0);
    if (pid == 0) {
        execl("/bin/true", "true", (char *)NULL);
        _exit(127);
    }
    reap_ok(pid, "vfork and exec");
}

static void by_fork(void)
{
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        execl("/bin/sh", "sh", "-c", "exit 0", (char *)NULL);
        _exit(127);
    }
    reap_ok(pid, "fork and exec");
}

static void by_spawn(void)
{
    char *args[] = {(char *)"true", NULL};
    pid_t pid;
    CHECK(posix_spawn(&pid, "/bin/true", NULL, NULL, args, environ) == 0);
    reap_ok(pid, "posix_spawn");
}

static void by_popen(void)
{
    char line[64] = "";
    FILE *out = popen("echo here", "r");
    CHECK(out != NULL && fgets(line, sizeof line, out) != NULL);
    CHECK(pclose(out) == 0 && strcmp(line, "here\n") == 0);
}

static void *all_ways(void *argument)
{
    long rounds = (long)argument;
    for (long i = 0; i < rounds; i++) {
        by_vfork();
        by_spawn();
        by_fork();
        by_popen();
        CHECK(system("exit 3") >> 8 == 3);
    }
    return NULL;
}

int main(int argc, char **argv)
{
    long rounds = number(argc, argv, 1, 3);
    memory = map(BYTES);
    pressure_start(BALLAST_BYTES);
    fill(memory, BYTES, 1);
    size_t away = pressure_until_away(memory, BYTES / 2, 3);
    all_ways((void *)rounds);
    verify(memory, BYTES, 1, "after starting others");
    pthread_t other;
    CHECK(pthread_create(&other, NULL, all_ways, (void *)rounds) == 0);
    all_ways((void *)rounds);
    CHECK(pthread_join(other, NULL) == 0);
    verify(memory, BYTES, 1, "after starting others from two threads");
    pressure_stop();
    printf("ok away=%zu\n", away);
    return 0;
}
