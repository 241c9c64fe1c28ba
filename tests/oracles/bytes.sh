#!/usr/bin/env bash
# The bytes that fewbit exports, for a change that must not change them: every shipped recipe, a few
# steps long, and four kinds of grid in every format, with the refusals where a format does not hold one.
#
#   tests/oracles/bytes.sh FEWBIT FOLDER    works in FOLDER, leaves FOLDER/list: hash and file
#   tests/oracles/bytes.sh OLD NEW          compares two binaries, or the lists of two such FOLDERs
#
# Manifests count without what names the binary and the machine. About a minute a binary; wants python3.
set -euo pipefail
recipes=$(realpath "$(dirname "$0")/../../recipes")

# A training of a few steps, whatever it leaves.
short() { # recipe
    awk '/^\[\[stage\]\]/ { stage++ }
        /^\[stage\.[a-z_]+\]/ { kind = substr($1, 8, length($1) - 8)
            if (kind !~ /^(calibrate|evaluate)$/) print "stage." stage - 1 "." kind ".allow_worse=true" }
        /^steps *=/ { print "stage." stage - 1 "." kind ".steps=4" }
        /^\[data\.calibration\]/ { print "data.calibration.samples=8\ndata.calibration.length=64" }
        /^\[data\.train\]/ { print "data.train.length=64" }' "$recipes/$1.toml" |
        sed 's/^/--set\n/'
}

train() { # recipe, name, settings...
    local recipe=$1 name=$2
    shift 2
    mapfile -t settings < <(short "$recipe")
    "$fewbit" train --recipe "$recipe" --output "$name" --device cpu "${settings[@]}" \
        --set data.validation.path=few.json "$@" >log 2>&1 || { cat log >&2; exit 1; }
}

# A format with some keys; where it refuses, its words, and the same with a loss.
export_as() { # run, format, keys...
    local out="$1.$2${3:+.$3}" keys=()
    for key in "${@:3}"; do keys+=(--set "$key"); done
    "$fewbit" export --run "$1" --format "$2" --output "out/$out" --device cpu "${keys[@]}" \
        >log 2>&1 && return
    sed -n '/^error/,$p' log >"out/$out.refused"
    "$fewbit" export --run "$1" --format "$2" --output "out/$out.lossy" --device cpu "${keys[@]}" \
        --set lossy=true >log 2>&1 || sed -n '/^error/,$p' log >"out/$out.lossy.refused"
}

list() { # binary, folder
    fewbit=$(realpath "$1")
    mkdir -p "$2"
    cd "$2"
    [[ -z $(ls -A) ]] || { echo "$2 is not empty" >&2; exit 2; }
    export XDG_CACHE_HOME=$PWD/cache NO_COLOR=1 HF_HUB_OFFLINE=1
    mkdir out
    python3 -c 'import json, sys; print(json.dumps(json.load(open(sys.argv[1]))[:12]))' \
        "$recipes/../datasets/tinystories/validation.json" >few.json
    for file in "$recipes"/*.toml; do
        train "$(basename "$file" .toml)" "recipes/$(basename "$file" .toml)"
    done
    train rtn_w4g128 w4 --set quant.scales=f16 --set quant.group_size=32 --set quant.symmetric=true
    train rtn_w4g128 w3 --set quant.bits=3
    train upq_int2 w2
    train bcq_w3 planes
    for run in w4 w3 w2 planes; do
        for format in fewbit dequantized mlx gptq autoround awq compressed_tensors bcq gguf; do
            export_as $run $format
        done
    done
    export_as w4 dequantized dtype=bf16
    export_as w4 mlx scales=f16
    export_as w4 mlx embeddings=4
    export_as w4 gptq version=2
    export_as w4 gptq version=3
    export_as w3 autoround version=1
    export_as w4 compressed_tensors scales=f16
    export_as planes bcq 'precisions=[1,2]'
    local files
    files=$(find out recipes/*/export -type f | sort)
    while read -r file; do
        case $file in
        */manifest.json) sed '/"fewbit": "/d; /"device": "/d; /^  "sha256": "/d' "$file" | sha256sum | sed "s|-$|$file|" ;;
        *) sha256sum "$file" ;;
        esac
    done <<<"$files" >list
    wc -l list
}

lists() { # binary or folder, where to
    if [[ -d $1 ]]; then cp "$1/list" "$2"; else (list "$1" "$2.work") && cp "$2.work/list" "$2"; fi
}

if [[ -f $1 && ! -f $2 ]]; then
    list "$1" "$2"
else
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    lists "$1" "$work/old"
    lists "$2" "$work/new"
    diff "$work/old" "$work/new" && echo "the same bytes"
fi
