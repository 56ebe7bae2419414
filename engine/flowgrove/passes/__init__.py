"""How rows go through a model together: packing, the token budget (budget), what is given up when memory is full
(out_of_memory), CUDA graphs (recordings), and the host's allocator. It imports device and errors only, and knows no
model.
"""
