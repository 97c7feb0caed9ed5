"""Benchmarks, reports and small tools: each a program with a `main(argv) -> int` that tests call without a subprocess.

A script puts together what the other folders offer and prints what it found; nothing imports a script except its test.
"""
