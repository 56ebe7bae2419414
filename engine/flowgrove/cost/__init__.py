"""What a run costs before it runs: which passes its iterations and evaluations take (passes), how long each takes on a
device (speeds), and the seconds of the whole (run_time). It imports setup, rollout, rewards, plan, models, rates and
passes, and loads no model.
"""
