"""Parallel text: the synthetic corpus of the demo, reading of files, and batching."""
