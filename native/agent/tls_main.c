/* tls_main.c - the program farmem-tls: farmem/agent.py starts it, farmem/tlsagent.py says what for.
 *
 * farmem-tls FOLDER HOST ADDRESS PORT, with the listening Unix socket as descriptor 3. Nothing of it is a secret but the key
 * in FOLDER, which is why nobody may look into this process.
 */
#include <netdb.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <unistd.h>

#include "tls.h"

#define LISTENER 3
#define ARGUMENTS 5

static int refuse(const char *what, const char *hint)
{
    fprintf(stderr, "refused\t%s\t%s\n", what, hint);
    return 1;
}

static bool find(struct tls_server *server, const char *address, const char *port)
{
    const struct addrinfo hints = { .ai_flags = AI_NUMERICHOST | AI_NUMERICSERV, .ai_socktype = SOCK_STREAM };
    struct addrinfo *found = NULL;
    if (getaddrinfo(address, port, &hints, &found) != 0 || found->ai_addrlen > sizeof server->address)
        return false;
    memcpy(&server->address, found->ai_addr, found->ai_addrlen);
    server->address_bytes = found->ai_addrlen;
    freeaddrinfo(found);
    return true;
}

/* Two for each connection; whoever started us may have had few. */
static void raise_limit(void)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
        limit.rlim_cur = limit.rlim_max;
        (void)setrlimit(RLIMIT_NOFILE, &limit);
    }
}

int main(int count, char **words)
{
    char reason[TLS_REASON_BYTES], name[TLS_REASON_BYTES];
    struct tls_server server = { 0 };
    if (count != ARGUMENTS || !find(&server, words[3], words[4]))
        return refuse("farmem-tls is not for people: `farmem run --tls=require` starts it", "farmem run --help");
    if (prctl(PR_SET_DUMPABLE, 0) != 0 || signal(SIGPIPE, SIG_IGN) == SIG_ERR)
        return refuse("farmem-tls can't protect its key", "see what the system forbids");
    raise_limit();
    snprintf(name, sizeof name, strchr(words[2], ':') != NULL ? "[%s]:%s" : "%s:%s", words[2], words[4]);
    server.folder = words[1];
    server.host = words[2];
    server.name = name;
    server.context = tls_context(server.folder, reason);
    if (server.context == NULL)
        return refuse(reason, "docs/pools.md says how to make certificates");
    if (write(STDOUT_FILENO, "ready\n", 6) != 6)
        return 1;
    return tls_serve(&server, LISTENER, STDIN_FILENO);
}
