"""What pictures are worth: a module per reward, all of them by name (registry), what becomes of prompts that one of
them fails for (faults), and decoding and scoring beside the rollout (scoring). It imports models.policy, passes,
tiny.pictures and what is below; other rooms import registry, scoring, faults and pixels.
"""
