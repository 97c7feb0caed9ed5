"""Instruments: how long a layer, the loss head or a training step takes, and how many bytes it
keeps.

timing.py        interleaved measurements and the machine they were made on
step.py          one training step as the benchmarks take it
memory_plan.py   a step on fake tensors: bytes by category, without allocating any
gpu_session.py   all that only a GPU can show; with carried.py, session_runs.py, processes.py
The other files are programs; scripts/ has a command of the same name for each.

bench/ stands above report/, whose tables it prints, and below experiments/, which use its clock and
its plan of a step's bytes (tests/test_rooms.py).
"""
