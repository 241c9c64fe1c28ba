#!/usr/bin/env bash
# Every figure of docs/performance.md, on this machine: operations and steps of fewbit in both forms, and
# plain PyTorch beside them. Takes about a quarter of an hour; wants an otherwise idle machine.
#
#   benches/performance.sh PYTHON [THREADS]
#
# PYTHON has what benches/peers/requirements.txt lists; THREADS (2) is held by both programs.
set -euo pipefail
python=${1:?which python? see benches/peers/README.md}
export RAYON_NUM_THREADS=${2:-2}
cd "$(dirname "$0")/.."

cargo build --release
cargo bench --bench ops
plain() { "$python" benches/peers/plain.py "$@" --threads "$RAYON_NUM_THREADS"; }
plain kernels
for which in "--model datasets/tinystories-656k" "--synthetic llama-1b-block"; do
  # shellcheck disable=SC2086 # two words
  plain block $which --fewbit target/release/fewbit
done
plain distill --model datasets/tinystories-656k --fewbit target/release/fewbit
