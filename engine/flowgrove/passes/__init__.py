"""How rows go through a model together: packing, the token budget and what happens when memory is out (budget), CUDA
graphs (recordings), and the host's allocator. It imports device and errors only, and knows no model.
"""
