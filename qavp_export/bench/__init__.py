"""Compares bundles and engines: what each stage takes, how much memory, and how far the figures can be trusted."""
