"""Finished runs to tables, sentences and figures; each number with the runs behind it.

results.py     runs read back and put into groups       recompute.py   their losses computed again
labels.py      what groups are called                   statistics.py  means, intervals, p-values
losses.py      final losses, paired differences         tables.py      one table as Markdown, CSV and JSON
figures.py     curves                                   write.py       all of it into a folder
"""
