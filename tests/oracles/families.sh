#!/bin/sh
# llama.cpp computes the tiny models of tests/parity from fewbit's GGUF files (a minute).
#
#   tests/oracles/families.sh FEWBIT PYTHON
#
# FEWBIT is the binary, PYTHON an interpreter with requirements.txt installed.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$2" "$(dirname "$0")/families.py" "$1" "$work" 2>/dev/null
