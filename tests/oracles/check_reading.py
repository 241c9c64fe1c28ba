"""Does fewbit read what mlx-lm packs, embedding and all, and compute the same logits?

    check_reading.py FEWBIT DENSE_FOLDER

DENSE_FOLDER is a dense Hugging Face folder, which mlx-lm quantizes to 4 bits.
"""

import pathlib
import shutil
import subprocess
import sys
import tempfile

import mlx.core as mx
import numpy as np
from mlx_lm import convert
from mlx_lm.utils import load_model
from safetensors.numpy import load_file, save_file

from llama import EMBEDDING, HEAD, TOKENS

TOLERANCE = 2e-5


def main():
    fewbit, dense = sys.argv[1], pathlib.Path(sys.argv[2])
    with tempfile.TemporaryDirectory() as place:
        source, packed = pathlib.Path(place) / "source", pathlib.Path(place) / "packed"
        shutil.copytree(dense, source)
        weights = load_file(source / "model.safetensors")
        if EMBEDDING not in weights:  # mlx-lm wants a tied matrix under this name
            weights[EMBEDDING] = weights.pop(HEAD)
        save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
        convert(str(source), str(packed), quantize=True, q_bits=4, q_group_size=64)
        model, _ = load_model(packed)
        expected = np.array(model(mx.array([TOKENS])).astype(mx.float32))[0]
        output = pathlib.Path(place) / "logits.safetensors"
        words = ["logits", "--model", packed, "--output", output]
        tokens = ",".join(map(str, TOKENS))
        subprocess.run([fewbit, *words, "--tokens", tokens], check=True, stdout=subprocess.DEVNULL)
        found = load_file(output)["logits"][0]
    error = np.abs(found - expected).max() / np.abs(expected).max()
    print(f"fewbit reads what mlx-lm packed: logits {error:.1e}")
    return int(error > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
