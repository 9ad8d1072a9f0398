"""Benchmarks by name: mteb's tasks, the embedded scenes as a task, MRMR's readings."""
