"""What fits and what is fastest here: predicted memory, how many graphs of the rollout may be retained (graph_room),
seconds of a pass (pass_times), the token budget of a run, and `flowgrove tune`. It imports rollout, plan, models and
passes.
"""
