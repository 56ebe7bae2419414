"""What people look at: the page of a run with its figures and sample grids, samples and videos, pictures side by side,
and a plan on the terminal (plan_view). It imports run, evaluation, tuning and what is below; nothing in it trains.
"""
