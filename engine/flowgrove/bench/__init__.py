"""What the parts cost: measurements that are compared with the published code in the same run, and refused where a
result is wrong. It imports whatever it measures; only the command line and `compare` import it.
"""
