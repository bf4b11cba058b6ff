"""RDMA: the server's verbs, with a fake pyverbs on the host and with Soft-RoCE in a guest."""
