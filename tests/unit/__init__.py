"""Tests of single modules, without the data plane."""
