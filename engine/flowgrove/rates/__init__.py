"""How fast devices are: a device's matrix and copy rate measured (measuring), what was measured here of models' passes
(kept), and published peak rates of devices that are not at hand (published). It imports spans, machine, files and
errors, and knows no model.
"""
