"""A run on disk: checkpoints and their manifests, going on from them (resume), the log (metrics) and the numbers in it
(summaries), those who show it (tracking, trackers), runs that are over (finished_runs), and what a process owes its
folder (folder_lock, stopping, progress, last_resort). It imports update, evaluation and what is below, and draws
nothing.
"""
