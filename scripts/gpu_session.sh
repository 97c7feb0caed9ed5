#!/usr/bin/env bash
# Everything that only a GPU can show, in one command: tests, bench_gpu, the paper's rows, GPT-2.
# The program is bench/gpu_session.py (--help); PYTHON names the interpreter that has torch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python3}" -m bench.gpu_session "$@"
