"""The commands of `flowgrove`, thin shells over the modules that do the work.

shell says how every command begins, speaks and ends, options what several take; runs, plans, references, comparisons,
benchmarks and measurements hold the commands. Each imports what it needs inside, so that `--help` and a mistake in a
recipe are answered at once. `flowgrove.cli` registers them, in the order of `--help`.
"""
