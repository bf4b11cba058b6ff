"""Tests of farmem.Region, each in an interpreter of its own: a process has one engine."""
