"""`flowgrove profile`: where the time and the memory of a recipe's iterations go on this machine, and what to try next.

What is measured (session, clock, traffic, rates), how a trace is read (events, gaps, memory), the table that is made of
both (phases, work, table), the advice (facts, advice), and how all is shown (show, memory_plot).

A capture of Nsight Systems is read as the same trace (nsys) and shown as such a table (nsys_show).
"""
