"""Tests that run farmem on another Linux kernel, in a guest (tools/guest.sh)."""
