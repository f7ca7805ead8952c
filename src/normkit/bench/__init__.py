"""The benchmark: one table of cases, timed against torch and against the memory floor."""
