"""Parallelism over processes, without knowledge of any model."""
