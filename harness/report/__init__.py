"""What eval.py writes: tables, sentences and figures made from finished runs, each number with the runs behind it.

recompute.py   models from checkpoints, their losses computed again      paper.py        the published numbers
losses.py      final losses and paired differences to exact              claims.py       the paper's claims, judged
stability.py   evaluations that got worse, momentum, quality of dW       complexity.py   Table 1, measured
tables.py      one table as Markdown, CSV and JSON                       statistics.py   means, intervals, p-values
figures.py     curves as PNG and SVG                                     standings.py    methods at equal bytes, compared
write.py       all of it into a folder                                   arena.py        their tables and sentences
method_figures.py, small.py   of scripts that look at methods apart from runs
"""
