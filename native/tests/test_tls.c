/* test_tls.c - the agent for TLS between clients and a server of our own: every byte comes, in order, both ways; a half close
 * is handed on; what a client has left behind is not sent any more; whoever is not to be believed is not spoken to.
 *
 * The agent's loop runs in a thread; the server has a thread for each connection, and echoes what it reads in another form, in
 * pieces of random sizes, so that nothing that passes by itself can look right.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/un.h>
#include <unistd.h>

#include <openssl/ec.h>
#include <openssl/pem.h>
#include <openssl/x509v3.h>

#include "agent/tls.h"
#include "check.h"

#define GREETING "NBDMAGICIHAVEOPT\0\3"
#define GREETING_BYTES 18u
#define FLAGS "\0\0\0\3"
#define ACK "\0\3\350\211\4\125\145\251\0\0\0\5\0\0\0\1\0\0\0\0"
#define REFUSED "\0\3\350\211\4\125\145\251\0\0\0\5\200\0\0\1\0\0\0\0"
#define REPLY_BYTES 20u
#define TRAILER "that is all"
#define MESSAGE_BYTES (3u << 20)
#define CLIENTS 12
#define FORM 0x5a

enum mode { ECHO, DEAF, NO_TLS };

static char folder[] = "/tmp/farmem-tls-XXXXXX";
static SSL_CTX *_Atomic of_server;
static int tcp;
static atomic_int mode;
static atomic_uint handshakes, clean_ends, cut_ends;
static atomic_ullong read_bytes;

/* ---- certificates ------------------------------------------------------------------------------------------- */

static void add(X509 *x, X509 *issuer, int nid, const char *value)
{
    X509V3_CTX context;
    X509V3_set_ctx(&context, issuer, x, NULL, NULL, 0);
    X509_EXTENSION *e = X509V3_EXT_conf_nid(NULL, &context, nid, value);
    CHECK(e != NULL && X509_add_ext(x, e, -1) == 1);
    X509_EXTENSION_free(e);
}

static X509 *certificate(const char *name, EVP_PKEY *key, X509 *issuer, EVP_PKEY *issuers_key, const char *for_whom)
{
    static long serial;
    X509 *x = X509_new();
    CHECK(x != NULL && X509_set_version(x, 2) == 1 && ASN1_INTEGER_set(X509_get_serialNumber(x), ++serial) == 1);
    X509_gmtime_adj(X509_getm_notBefore(x), -60);
    X509_gmtime_adj(X509_getm_notAfter(x), 3600);
    X509_NAME *subject = X509_get_subject_name(x);
    X509_NAME_add_entry_by_txt(subject, "CN", MBSTRING_ASC, (const unsigned char *)name, -1, -1, 0);
    X509_set_issuer_name(x, issuer != NULL ? X509_get_subject_name(issuer) : subject);
    X509_set_pubkey(x, key);
    add(x, issuer != NULL ? issuer : x, NID_basic_constraints, issuer != NULL ? "critical,CA:FALSE" : "critical,CA:TRUE");
    if (for_whom != NULL)
        add(x, issuer, NID_subject_alt_name, for_whom);
    CHECK(X509_sign(x, issuers_key, EVP_sha256()) > 0);
    return x;
}

static void keep(const char *name, X509 *x, EVP_PKEY *key)
{
    char path[200];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = fopen(path, "w");
    CHECK(file != NULL && (x == NULL || PEM_write_X509(file, x) == 1));
    CHECK((key == NULL || PEM_write_PrivateKey(file, key, NULL, NULL, 0, NULL, NULL) == 1) && fclose(file) == 0);
}

static void make_certificates(const char *servers_name)
{
    EVP_PKEY *ca_key = EVP_EC_gen("P-256"), *key = EVP_EC_gen("P-256");
    CHECK(ca_key != NULL && key != NULL);
    X509 *ca = certificate("authority", ca_key, NULL, ca_key, NULL);
    X509 *ours = certificate("client", key, ca, ca_key, NULL);
    X509 *theirs = certificate("server", key, ca, ca_key, servers_name);
    keep("ca-cert.pem", ca, NULL);
    keep("client-cert.pem", ours, NULL);
    keep("client-key.pem", NULL, key);
    SSL_CTX *context = SSL_CTX_new(TLS_server_method());
    CHECK(SSL_CTX_use_certificate(context, theirs) == 1 && SSL_CTX_use_PrivateKey(context, key) == 1);
    CHECK(X509_STORE_add_cert(SSL_CTX_get_cert_store(context), ca) == 1);
    SSL_CTX_set_verify(context, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, NULL);
    SSL_CTX_free(of_server);
    of_server = context;
    X509_free(ca);
    X509_free(ours);
    X509_free(theirs);
    EVP_PKEY_free(ca_key);
    EVP_PKEY_free(key);
}

/* ---- the server ---------------------------------------------------------------------------------------------- */

static void read_exactly(int fd, void *to, size_t bytes)
{
    CHECK(recv(fd, to, bytes, MSG_WAITALL) == (ssize_t)bytes);
}

/* Read what there is, and answer nothing: the other side has gone, and an answer would be the end. */
static void listen_only(SSL *ssl)
{
    unsigned char bytes[40000];
    while (mode == DEAF)
        usleep(1000);
    for (int n; (n = SSL_read(ssl, bytes, sizeof bytes)) > 0;)
        atomic_fetch_add(&read_bytes, (unsigned)n);
    atomic_fetch_add(&cut_ends, 1);
}

static void echo(SSL *ssl)
{
    unsigned char bytes[40000];
    unsigned seed = 1;
    int n;
    while ((n = SSL_read(ssl, bytes, 1 + rand_r(&seed) % (int)sizeof bytes)) > 0) {
        atomic_fetch_add(&read_bytes, (unsigned)n);
        for (int k = 0; k < n; k++)
            bytes[k] ^= FORM;
        for (int done = 0, part; done < n; done += part) {
            part = 1 + rand_r(&seed) % (n - done);
            if (SSL_write(ssl, bytes + done, part) != part)
                break;
        }
    }
    if (SSL_get_error(ssl, n) != SSL_ERROR_ZERO_RETURN) {
        atomic_fetch_add(&cut_ends, 1);
        return;
    }
    atomic_fetch_add(&clean_ends, 1);
    SSL_write(ssl, TRAILER, sizeof TRAILER);
    SSL_shutdown(ssl);
}

static void *serve(void *arg)
{
    int fd = (int)(intptr_t)arg;
    char asked[20];
    SSL *ssl = SSL_new(of_server);
    CHECK(send(fd, GREETING, GREETING_BYTES, MSG_NOSIGNAL) == GREETING_BYTES);
    read_exactly(fd, asked, sizeof asked);
    CHECK(memcmp(asked, FLAGS "IHAVEOPT\0\0\0\5\0\0\0\0", sizeof asked) == 0);
    CHECK(send(fd, mode == NO_TLS ? REFUSED : ACK, REPLY_BYTES, MSG_NOSIGNAL) == REPLY_BYTES);
    SSL_set_fd(ssl, fd);
    if (mode != NO_TLS && SSL_accept(ssl) == 1) {
        bool is_deaf = mode == DEAF;
        atomic_fetch_add(&handshakes, 1);
        (is_deaf ? listen_only : echo)(ssl);
    }
    SSL_free(ssl);
    close(fd);
    return NULL;
}

static void *accept_all(void *arg)
{
    for (;;) {
        int fd = accept(tcp, NULL, NULL);
        pthread_t id;
        if (fd < 0)
            return arg;
        CHECK(pthread_create(&id, NULL, serve, (void *)(intptr_t)fd) == 0 && pthread_detach(id) == 0);
    }
}

/* ---- the agent -------------------------------------------------------------------------------------------------- */

static struct tls_server to;
static struct sockaddr_un place = { .sun_family = AF_UNIX };
static int leash[2], listener;
static pthread_t agent;

static void *run_agent(void *arg)
{
    CHECK(tls_serve(&to, listener, leash[1]) == 0);
    return arg;
}

static void start_agent(void)
{
    char reason[TLS_REASON_BYTES];
    SSL_CTX_free(to.context);
    to.context = tls_context(folder, reason);
    CHECK(to.context != NULL && socketpair(AF_UNIX, SOCK_STREAM, 0, leash) == 0);
    CHECK(pthread_create(&agent, NULL, run_agent, NULL) == 0);
}

static void end_agent(void)
{
    close(leash[0]);
    CHECK(pthread_join(agent, NULL) == 0);
    close(leash[1]);
}

static void listen_both(void)
{
    struct sockaddr_in here = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    socklen_t bytes = sizeof here;
    pthread_t id;
    tcp = socket(AF_INET, SOCK_STREAM, 0);
    CHECK(tcp >= 0 && bind(tcp, (struct sockaddr *)&here, bytes) == 0 && listen(tcp, 64) == 0);
    CHECK(getsockname(tcp, (struct sockaddr *)&here, &bytes) == 0);
    memcpy(&to.address, &here, sizeof here);
    to.address_bytes = sizeof here;
    to.host = to.name = "127.0.0.1";
    to.folder = folder;
    snprintf(place.sun_path, sizeof place.sun_path, "%s/socket", folder);
    listener = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0);
    CHECK(bind(listener, (struct sockaddr *)&place, sizeof place) == 0 && listen(listener, 64) == 0);
    CHECK(pthread_create(&id, NULL, accept_all, NULL) == 0 && pthread_detach(id) == 0);
}

/* ---- clients ---------------------------------------------------------------------------------------------------- */

static int connect_to_agent(void)
{
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    CHECK(fd >= 0 && connect(fd, (struct sockaddr *)&place, sizeof place) == 0);
    return fd;
}

static int begin(void)
{
    char greeting[GREETING_BYTES];
    int fd = connect_to_agent();
    read_exactly(fd, greeting, sizeof greeting);
    CHECK(memcmp(greeting, GREETING, sizeof greeting) == 0);
    CHECK(send(fd, FLAGS, 2, 0) == 2 && send(fd, FLAGS + 2, 2, 0) == 2);
    return fd;
}

static void has_ended(int fd)
{
    char byte;
    CHECK(recv(fd, &byte, 1, 0) <= 0);
    close(fd);
}

static unsigned char byte_at(unsigned client, size_t k) { return (unsigned char)((k * 2654435761u >> 13) + client * 7); }

static void send_all(int fd, unsigned client)
{
    unsigned char bytes[50000];
    unsigned seed = client;
    for (size_t at = 0, n; at < MESSAGE_BYTES; at += n) {
        n = 1 + (size_t)rand_r(&seed) % sizeof bytes;
        n = n < MESSAGE_BYTES - at ? n : MESSAGE_BYTES - at;
        for (size_t k = 0; k < n; k++)
            bytes[k] = byte_at(client, at + k);
        for (size_t done = 0; done < n;) {
            ssize_t sent = send(fd, bytes + done, n - done, MSG_NOSIGNAL);
            CHECK(sent > 0);
            done += (size_t)sent;
        }
    }
}

static void *send_and_end(void *arg)
{
    const int *pair = arg;
    send_all(pair[0], (unsigned)pair[1]);
    CHECK(shutdown(pair[0], SHUT_WR) == 0);
    return NULL;
}

static void *whole_client(void *arg)
{
    unsigned client = (unsigned)(intptr_t)arg;
    int pair[2] = { begin(), (int)client };
    unsigned char bytes[30000];
    char trailer[sizeof TRAILER];
    pthread_t sender;
    CHECK(pthread_create(&sender, NULL, send_and_end, pair) == 0);
    for (size_t at = 0; at < MESSAGE_BYTES;) {
        size_t most = MESSAGE_BYTES - at < sizeof bytes ? MESSAGE_BYTES - at : sizeof bytes;
        ssize_t n = recv(pair[0], bytes, most, 0);
        CHECK(n > 0);
        for (ssize_t k = 0; k < n; k++, at++)
            CHECK((bytes[k] ^ FORM) == byte_at(client, at));
    }
    read_exactly(pair[0], trailer, sizeof trailer);
    CHECK(memcmp(trailer, TRAILER, sizeof trailer) == 0);
    CHECK(pthread_join(sender, NULL) == 0);
    has_ended(pair[0]);
    return NULL;
}

/* ---- the tests ------------------------------------------------------------------------------------------------------ */

static void until(atomic_uint *number, unsigned least)
{
    for (int k = 0; atomic_load(number) < least; k++) {
        CHECK(k < 60000);
        usleep(1000);
    }
}

static void test_every_byte_comes(void)
{
    pthread_t id[CLIENTS];
    start_agent();
    for (intptr_t k = 0; k < CLIENTS; k++)
        CHECK(pthread_create(&id[k], NULL, whole_client, (void *)k) == 0);
    for (int k = 0; k < CLIENTS; k++)
        CHECK(pthread_join(id[k], NULL) == 0);
    until(&clean_ends, CLIENTS);
    CHECK(atomic_load(&cut_ends) == 0);
    end_agent();
}

/* The server reads nothing until the client has gone. What has not arrived by then never does: nothing of what the agent, or
 * the kernel for it, still had. (Where its end does not reset the connection, nine tenths come.) */
static void test_what_is_left_behind_is_not_sent(void)
{
    unsigned char bytes[1 << 16] = { 0 };
    unsigned long long sent = 0, before = atomic_load(&read_bytes);
    unsigned cut = atomic_load(&cut_ends), hands = atomic_load(&handshakes);
    mode = DEAF;
    start_agent();
    int fd = begin();
    until(&handshakes, hands + 1);
    struct pollfd p = { .fd = fd, .events = POLLOUT };
    while (poll(&p, 1, 500) == 1) {
        ssize_t n = send(fd, bytes, sizeof bytes, MSG_DONTWAIT | MSG_NOSIGNAL);
        sent += n > 0 ? (unsigned long long)n : 0;
    }
    close(fd);
    end_agent();                             /* which it does when the connection has ended */
    mode = ECHO;
    until(&cut_ends, cut + 1);
    CHECK(sent > 4 * TLS_BUFFER_BYTES && atomic_load(&read_bytes) - before < sent / 4);
}

/* A client that goes with nothing under way: the server is told that this is the end, and no alarm. */
static void test_a_client_that_goes(void)
{
    unsigned clean = atomic_load(&clean_ends), cut = atomic_load(&cut_ends);
    char answer;
    start_agent();
    int fd = begin();
    CHECK(send(fd, "x", 1, 0) == 1);
    read_exactly(fd, &answer, 1);
    CHECK(answer == ('x' ^ FORM));
    close(fd);
    until(&clean_ends, clean + 1);
    CHECK(atomic_load(&cut_ends) == cut);
    end_agent();
}

static void test_other_flags_end_the_connection(void)
{
    char greeting[GREETING_BYTES];
    unsigned hands = atomic_load(&handshakes);
    start_agent();
    int fd = connect_to_agent();
    read_exactly(fd, greeting, sizeof greeting);
    CHECK(send(fd, "\0\0\0\1", 4, 0) == 4);
    has_ended(fd);
    until(&handshakes, hands + 1);           /* the server may be the last to know */
    end_agent();
}

/* A job goes on without its supervisor: connections outlive the leash, and no longer than the last of them the agent. */
static void test_the_leash(void)
{
    char answer;
    unsigned hands = atomic_load(&handshakes);
    start_agent();
    int fd = begin();
    CHECK(shutdown(leash[0], SHUT_RDWR) == 0);
    CHECK(send(fd, "y", 1, 0) == 1);
    read_exactly(fd, &answer, 1);
    CHECK(answer == ('y' ^ FORM));
    int second = begin();
    until(&handshakes, hands + 2);
    close(fd);
    close(second);
    end_agent();
}

static void test_who_is_not_believed(void)
{
    mode = NO_TLS;
    start_agent();
    has_ended(connect_to_agent());
    end_agent();
    mode = ECHO;
    make_certificates("IP:127.0.0.2,DNS:localhost");
    unsigned hands = atomic_load(&handshakes);
    start_agent();
    has_ended(connect_to_agent());
    end_agent();
    CHECK(atomic_load(&handshakes) == hands);
}

static void test_certificates_that_are_no_use(void)
{
    char reason[TLS_REASON_BYTES];
    keep("client-key.pem", NULL, NULL);
    CHECK(tls_context(folder, reason) == NULL && strstr(reason, "can't be used") != NULL);
    CHECK(tls_context("/nowhere", reason) == NULL && strstr(reason, "/nowhere/ca-cert.pem") != NULL);
}

int main(void)
{
    static const char *const files[] = { "ca-cert.pem", "client-cert.pem", "client-key.pem", "socket", "" };
    signal(SIGPIPE, SIG_IGN);
    CHECK(mkdtemp(folder) != NULL);
    make_certificates("IP:127.0.0.1");
    listen_both();
    test_every_byte_comes();
    test_what_is_left_behind_is_not_sent();
    test_a_client_that_goes();
    test_other_flags_end_the_connection();
    test_the_leash();
    test_who_is_not_believed();
    test_certificates_that_are_no_use();
    for (size_t k = 0; k < sizeof files / sizeof files[0]; k++) {
        char path[200];
        snprintf(path, sizeof path, "%s/%s", folder, files[k]);
        CHECK(remove(path) == 0);
    }
    SSL_CTX_free(of_server);
    SSL_CTX_free(to.context);
    puts("ok");
    return 0;
}
