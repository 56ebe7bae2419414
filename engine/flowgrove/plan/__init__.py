"""What an iteration will do: σ tables (sigmas), the forest of steps and its counts (planner), and the coefficients of
each step. It imports recipe, and of models the folders and the geometry; it runs no model.
"""
