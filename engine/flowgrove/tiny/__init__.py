"""The embedded pipeline and the world that it draws: coloured shapes (pictures), and the script that trains it (build).
It imports passes.allocator and errors; the shapes reward imports `pictures`.
"""
