"""The commands: small programs, and a starter for each program of bench/ and experiments/.

Each has a `main(argv) -> int` that tests call without a subprocess.
"""
