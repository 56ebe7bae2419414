"""What a run is asked to do: the keys of a recipe (schema), files that say them (files, yaml_files), recipes read and
written (loading), what keys may not mean together (checks), and which steps an iteration's window and pruning take
(windows). It imports errors and paths only, and every room above may import it.
"""
