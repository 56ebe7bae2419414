"""Sections of recipes whose rollouts differ in kind."""

FLAT = {}
UNSHARED_NOISE = {"rollout": {"shared_initial_noise": False}}
TREE = {"rollout": {"steps": 6, "tree": {"splits": [0, 2], "fanout": 2}, "window": {"strategy": "frozen", "size": 3}}}
TAIL = {"rollout": {"steps": 9, "tail": {"compress": 0.5}, "window": {"strategy": "frozen", "size": 2}}}
CPS = {"rollout": {"dynamics": "cps"}}
