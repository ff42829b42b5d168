"""Processes and files: ranks of one job, jobs of a cluster, locks, atomic writes, lines of progress."""
