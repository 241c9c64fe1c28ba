#!/bin/sh
# Exports the embedded model at 4 and 2 bits in the formats that can be loaded on a CPU in a minute,
# and has other people's programs read them.
#
#   tests/oracles/light.sh FEWBIT PYTHON
#
# FEWBIT is the binary, PYTHON an interpreter with requirements.txt installed.
set -eu
fewbit=$(realpath "$1")
python=$(cd "$(dirname "$2")" && pwd)/$(basename "$2")
here=$(realpath "$(dirname "$0")")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

"$fewbit" train --recipe upq_int2 --output w2 --set quant.scales=f16 \
    --set stage.1.reconstruct.steps=50 --set stage.3.distill.steps=150 2>/dev/null
"$fewbit" recipes copy rtn_w4g128 w4.toml >/dev/null
"$fewbit" train --recipe w4.toml --output w4 --set quant.scales=f16 --set quant.group_size=32 \
    --set quant.symmetric=true 2>/dev/null

check() { # run, formats...
    run=$1
    shift
    for format in dequantized "$@"; do
        "$fewbit" export --run "$run" --format "$format" --output "$run.out/$format" >/dev/null 2>&1
        case $format in
        dequantized) ;;
        gguf)
            "$python" "$here/check_gguf.py" "$run.out/$format"
            "$python" "$here/check_llamacpp.py" "$run.out/$format"
            ;;
        mlx)
            "$python" "$here/check_packed.py" "$run.out/$format"
            "$python" "$here/check_mlx.py" "$run.out/$format"
            ;;
        *) "$python" "$here/check_packed.py" "$run.out/$format" ;;
        esac
    done
}

check w4 mlx gptq autoround awq compressed_tensors gguf
# The embedding as codes too; the dense folder is made from the file itself.
for bits in 8 4; do
    out=w4.embed/$bits
    "$fewbit" export --run w4 --format gguf --output "$out/gguf" --set "embeddings=$bits" >/dev/null 2>&1
    "$fewbit" export --model "$out/gguf" --format dequantized --output "$out/dequantized" >/dev/null 2>&1
    "$python" "$here/check_gguf.py" "$out/gguf"
done
check w2 mlx gptq autoround awq compressed_tensors gguf
"$python" "$here/check_schema.py" "$fewbit" "$here/../../recipes"
"$python" "$here/check_reading.py" "$fewbit" w4.out/dequantized 2>/dev/null
echo "all read"
