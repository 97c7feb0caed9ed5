"""Studies: one folder each, with its program, its tables and its sentences.

paper/            the tables of arXiv 2604.16324, its claims judged, Table 1 measured
arena/            methods at equal bytes
ema/              EMA sketches (arXiv 2510.00442): an MLP on digits, a physics-informed network
sus/              SUS attention (arXiv 2505.15080): variance of its gradients, time of its backward
monitor/          whether the monitor's readings are right
rate_distortion/  how near each method's code comes to the bound of information theory

A study reads runs through report/ and trains through harness/. No study imports another one, and
nothing below imports a study: sections.py lists what eval.py hands to the report.
"""
