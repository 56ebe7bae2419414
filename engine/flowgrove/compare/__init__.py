"""Recipes beside each other: every one trained at several learning rates over several seeds, each run in a process of
its own, and their rewards read at equal cost. It imports the trainer, the report and what is below, and writes its
tables as the benchmarks do; only the command line imports it.
"""
