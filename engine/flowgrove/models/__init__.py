"""The policy and the model families behind it: adapters, geometry, weights, embeddings, attention; README.md says how a
family is added. It imports passes, data, recipe and what is below them. Stages import `policy`; only `loading` names
families.
"""
