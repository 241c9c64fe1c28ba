"""Loads folders with mistral.rs and compares the log-probabilities of the 20 likeliest next tokens, with those of the same weights dense, and with a float64 forward pass."""

import json
import pathlib
import shutil
import sys
import tempfile

import mistralrs
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from llama import Llama, Verdict, folders, read_config, reference

PROMPT = "the tide and eleven apples"


def likeliest(folder):
    model = mistralrs.Which.Plain(
        model_id=str(folder.resolve()),
        arch=mistralrs.Architecture.Llama,
        dtype=mistralrs.ModelDType.F32,
    )
    request = mistralrs.ChatCompletionRequest(
        model="model",
        messages=[{"role": "user", "content": PROMPT}],
        max_tokens=1,
        temperature=0.0,
        logprobs=True,
        top_logprobs=20,
    )
    answer = mistralrs.Runner(which=model).send_chat_completion_request(request)
    tokens = answer.choices[0].logprobs.content[0].top_logprobs
    return np.sort([token.logprob for token in tokens])[::-1]


def dense_copy(folder, target, weights):
    """The same model without packing: what the runtime makes of the weights themselves."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, target / name)
    config = read_config(folder)
    for key in ("quantization", "quantization_config"):
        config.pop(key, None)
    (target / "config.json").write_text(json.dumps(config))
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})


def main():
    verdict = Verdict()
    for folder in folders(__doc__):
        weights, _ = reference(folder)
        config = read_config(folder)
        prompt = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(PROMPT).ids
        logits = Llama(config, weights).logits([config["bos_token_id"], *prompt])[-1]
        logits = np.sort(logits - logits.max())[::-1]
        wanted = (logits - np.log(np.exp(logits).sum()))[:20]
        with tempfile.TemporaryDirectory() as target:
            dense_copy(folder, pathlib.Path(target), weights)
            dense = likeliest(pathlib.Path(target))
        packed = likeliest(folder)
        to_dense, to_forward = (
            float(np.abs(packed - other).max()) for other in (dense, wanted)
        )
        # The runtime rounds activations on its way, with dense weights just as much.
        passed = to_dense < 1e-5 and to_forward < 2e-2
        verdict.say(folder, passed, f"from dense {to_dense:.1e}, from float64 {to_forward:.1e}")
    return verdict.exit_code()


if __name__ == "__main__":
    sys.exit(main())
