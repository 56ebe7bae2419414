"""Trackers: TensorBoard, Weights & Biases, SwanLab, Trackio, MLflow, each through its own package, which is imported
where it is used. All have one interface (interface); none may stop a run or hold it up: each has a queue and a thread
(feed), and those that talk to servers a process of their own as well (remote here, child there).
"""
