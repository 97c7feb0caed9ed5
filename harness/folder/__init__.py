"""The run folder: what a run leaves on the disk, and how it is found to be whole and its own.

rundir.py      which files there are, and whether a run may be continued with other options
run_id.py      the run's id and labels, run.json
one_run.py     whether all files are of one run, and its history whole
checkpoint.py  checkpoints/, whole or not there; manifest.py: the hashes of one
metrics.py     metrics.jsonl, the source of truth
bounded.py     small files, read within bounds of size and depth
disk.py        what a full or closed disk refused, in words
status.py      how far each run below a folder is
"""
