"""Where prompts come from: the formats of files and folders (readers), and which prompts a run and an iteration take
(prompts). It imports errors, hub and paths only, and every room above may import it.
"""
