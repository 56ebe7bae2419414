"""What pictures are worth: a module per reward, all of them by name (registry), and decoding and scoring beside the
rollout (scoring). It imports models.policy, passes, tiny.pictures and what is below; other rooms import registry,
scoring and pixels.
"""
