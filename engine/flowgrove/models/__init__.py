"""The policy (a value without state), its weights and the runner of its passes, and behind it the model families, a
module each in `families/` (whose README.md says how one is added), with geometry, embeddings, source pictures,
attention. It imports passes, data, recipe and what is below them. Stages import `policy`, `prompts` and `runner`;
nothing names a family.
"""
