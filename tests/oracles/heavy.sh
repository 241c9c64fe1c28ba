#!/bin/sh
# Every grid in every format, of three models, read by every loader; see README.md.
#
#   tests/oracles/heavy.sh FEWBIT PYTHON [WORKDIR] [--without LOADER]...
#
# FEWBIT is the binary, PYTHON an interpreter with requirements.txt and requirements-heavy.txt
# installed. Results go to WORKDIR/matrix.md; without a WORKDIR, to a new folder that is named.
set -eu
fewbit=$1
python=$2
shift 2
case ${1-} in
'' | -*) work=$(mktemp -d) && echo "results go to $work" ;;
*) work=$1 && shift ;;
esac
# One thread each: the models are small, and sums come out alike everywhere.
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1 RAYON_NUM_THREADS=1
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
# gptqmodel compiles its layers for minutes before it computes for a second.
export TORCHDYNAMO_DISABLE=1
exec nice -n 10 "$python" "$(dirname "$0")/matrix.py" "$fewbit" "$work" "$@"
