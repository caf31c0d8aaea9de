"""Benchmarks: they print tables and assert nothing. See README.md beside this file."""
