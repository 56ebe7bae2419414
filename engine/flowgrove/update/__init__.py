"""From credit to new weights: which edges an update trains (edges), in which passes (passes, micro_batches), the
gradient and the step (updater), optimizers and averages (ema). It imports rollout.forest, credit, plan, models and
passes.
"""
