"""Finished runs to tables, sentences and figures; each number with the runs behind it.

results.py     runs read back and put into groups     recompute.py   their losses computed again
labels.py      what groups are called                 statistics.py  means, intervals, p-values
losses.py      final losses, paired differences       published.py   a publication's, next to ours
tables.py      a table as Markdown, CSV and JSON      figures.py     a figure as numbers and as SVG
section.py     what a study hands in                  write.py       all of it into a folder

report/ knows no study: their tables and figures come in as sections.
"""
