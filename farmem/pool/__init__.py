"""The pool server, `farmem serve`: lends this host's memory to jobs elsewhere.

A control plane in one asyncio thread (leases, HTTP) and a data plane in nbdkit, whose plugin
is ours (native/server).  They share two memfds: the memory, and the table that says which
part of it is lent under which token (native/include/lease_table.h).  With RDMA clients reach
the memory past both.  Nothing here is imported by `farmem run`.
"""
