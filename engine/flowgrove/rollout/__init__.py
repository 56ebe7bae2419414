"""From prompts to leaves: the loop over the levels of a plan, one pass of it (denoise), the states that are left
(forest), and passes whose autograd graph waits for the first update (retained_graphs). It imports plan, models and
passes.
"""
