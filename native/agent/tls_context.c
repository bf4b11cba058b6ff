/* tls_context.c - certificates: what we show, whom we believe, and in words what is wrong with the other side's.
 *
 * The folder is laid out as nbdkit's: ca-cert.pem, client-cert.pem, client-key.pem, and ca-crl.pem if there is one.  The key
 * is read here and nowhere else.
 */
#include <arpa/inet.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include <openssl/err.h>
#include <openssl/x509v3.h>

#include "tls.h"

#define PATH_BYTES 4200

/* A key that asks for a pass phrase can't be used: there is nobody to be asked. */
static int no_pass_phrase(char *to, int bytes, int writing, void *arg)
{
    (void)to;
    (void)bytes;
    (void)writing;
    (void)arg;
    return -1;
}

static const char *last_reason(void)
{
    const char *text = ERR_reason_error_string(ERR_peek_last_error());
    return text != NULL ? text : "it is not in PEM";
}

static bool path_of(char *to, const char *folder, const char *name)
{
    return snprintf(to, PATH_BYTES, "%s/%s", folder, name) < PATH_BYTES;
}

static bool revoked_count(SSL_CTX *context, const char *path)
{
    X509_STORE *store = SSL_CTX_get_cert_store(context);
    return X509_STORE_load_file(store, path) == 1 && X509_STORE_set_flags(store, X509_V_FLAG_CRL_CHECK) == 1;
}

static bool load(SSL_CTX *context, const char *folder, char *reason)
{
    static const char *const names[] = { "ca-cert.pem", "client-cert.pem", "client-key.pem", "ca-crl.pem" };
    char path[4][PATH_BYTES];
    for (int k = 0; k < 4; k++) {
        bool there = path_of(path[k], folder, names[k]) && access(path[k], R_OK) == 0;
        if (!there && k < 3) {
            snprintf(reason, TLS_REASON_BYTES, "there is no %.300s/%s that can be read", folder, names[k]);
            return false;
        }
        if (!there)
            path[k][0] = 0;
    }
    ERR_clear_error();
    if (SSL_CTX_load_verify_file(context, path[0]) == 1 && SSL_CTX_use_certificate_chain_file(context, path[1]) == 1 &&
        SSL_CTX_use_PrivateKey_file(context, path[2], SSL_FILETYPE_PEM) == 1 && SSL_CTX_check_private_key(context) == 1 &&
        (path[3][0] == 0 || revoked_count(context, path[3])))
        return true;
    snprintf(reason, TLS_REASON_BYTES, "the certificates in %.300s can't be used: %.150s", folder, last_reason());
    return false;
}

SSL_CTX *tls_context(const char *folder, char *reason)
{
    SSL_CTX *context = SSL_CTX_new(TLS_client_method());
    snprintf(reason, TLS_REASON_BYTES, "OpenSSL can't be used: %.150s", last_reason());
    if (context == NULL)
        return NULL;
    SSL_CTX_set_default_passwd_cb(context, no_pass_phrase);
    SSL_CTX_set_verify(context, SSL_VERIFY_PEER, NULL);
    SSL_CTX_set_options(context, SSL_OP_NO_RENEGOTIATION | SSL_OP_NO_COMPRESSION);
    SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_OFF);
    SSL_CTX_set_mode(context, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
    if (SSL_CTX_set_min_proto_version(context, TLS1_2_VERSION) == 1 && load(context, folder, reason))
        return context;
    SSL_CTX_free(context);
    return NULL;
}

/* A name is looked for in the subject's alternative names alone, as Python does: not in its common name. */
SSL *tls_session(const struct tls_server *server)
{
    SSL *ssl = SSL_new(server->context);
    if (ssl == NULL)
        return NULL;
    unsigned char address[16];
    bool is_address = inet_pton(AF_INET, server->host, address) == 1 || inet_pton(AF_INET6, server->host, address) == 1;
    SSL_set_hostflags(ssl, X509_CHECK_FLAG_NEVER_CHECK_SUBJECT | X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS);
    bool ready = is_address ? X509_VERIFY_PARAM_set1_ip_asc(SSL_get0_param(ssl), server->host) == 1
                            : SSL_set1_host(ssl, server->host) == 1 && SSL_set_tlsext_host_name(ssl, server->host) == 1;
    if (ready)
        return ssl;
    SSL_free(ssl);
    return NULL;
}

static bool its_certificate(const struct tls_server *server, long verdict, char *reason)
{
    const char *name = server->name;
    switch (verdict) {
    case X509_V_OK:
        return false;
    case X509_V_ERR_CERT_HAS_EXPIRED:
        snprintf(reason, TLS_REASON_BYTES, "the certificate of %.200s has expired", name);
        return true;
    case X509_V_ERR_HOSTNAME_MISMATCH:
    case X509_V_ERR_IP_ADDRESS_MISMATCH:
        snprintf(reason, TLS_REASON_BYTES, "the certificate of %.200s is not for the name '%.150s'", name, server->host);
        return true;
    case X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY:
    case X509_V_ERR_UNABLE_TO_VERIFY_LEAF_SIGNATURE:
    case X509_V_ERR_SELF_SIGNED_CERT_IN_CHAIN:
    case X509_V_ERR_DEPTH_ZERO_SELF_SIGNED_CERT:
    case X509_V_ERR_CERT_SIGNATURE_FAILURE:
        snprintf(reason, TLS_REASON_BYTES, "the certificate of %.150s is not of the authority in %.200s/ca-cert.pem", name,
                 server->folder);
        return true;
    default:
        snprintf(reason, TLS_REASON_BYTES, "the certificate of %.200s is refused: %.150s", name,
                 X509_verify_cert_error_string(verdict));
        return true;
    }
}

/* What the other side thinks of our certificate: an alert, or the end of the connection where an answer should be. */
void tls_why(const struct tls_server *server, SSL *ssl, char *reason)
{
    unsigned long error = ERR_peek_last_error();
    const char *text = ERR_reason_error_string(error);
    if (its_certificate(server, SSL_get_verify_result(ssl), reason))
        return;
    if (!SSL_is_init_finished(ssl) && ERR_GET_REASON(error) == SSL_R_WRONG_VERSION_NUMBER)
        snprintf(reason, TLS_REASON_BYTES, "%.200s does not speak TLS", server->name);
    else if (text != NULL && strstr(text, "alert") != NULL)
        snprintf(reason, TLS_REASON_BYTES, "%.200s does not take the certificate in %.150s: %.100s", server->name,
                 server->folder, text);
    else if (SSL_is_init_finished(ssl))
        snprintf(reason, TLS_REASON_BYTES,
                 "%.150s has ended the connection behind the TLS handshake: does it take the certificate in %.150s?",
                 server->name, server->folder);
    else
        snprintf(reason, TLS_REASON_BYTES, "the TLS handshake with %.200s has failed: %.150s", server->name,
                 text != NULL ? text : "it has ended the connection");
}
