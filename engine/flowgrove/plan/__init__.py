"""What an iteration will do and need: σ tables (sigmas), solvers by name, the forest of steps and its counts (planner),
the coefficients of each step, and predicted memory. It imports recipe, models, passes, and of rewards what is scored
at once; no model that it runs has weights.
"""
