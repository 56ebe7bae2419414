"""What fits and what is fastest here: how many graphs of the rollout may be retained (graph_room), seconds of a pass
(pass_times), the token budget of a run, and `flowgrove tune`. It imports setup, rollout, plan, models and passes.
"""
