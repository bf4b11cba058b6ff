"""Memory on other hosts: servers, clients, and programs that use them."""
