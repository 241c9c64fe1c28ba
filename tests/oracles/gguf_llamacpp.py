"""Does llama.cpp read a GGUF file as fewbit means it: same pieces, same next words?

    python gguf_llamacpp.py MODEL.gguf DENSE_FOLDER [--prompt TEXT] [--texts FILE.json]

DENSE_FOLDER is fewbit's `dequantized` export of the same run, with its tokenizer.json. Compared are

* the ids of the prompt, and of every text of a JSON list, with those of Hugging Face's tokenizers;
* a greedy continuation, step by step, with a float64 forward in numpy: the log-probabilities of the
  likeliest pieces, and whether the chosen one is also numpy's. (Texts are shown, not judged: after
  one near-tie they part.)

llama.cpp rounds activations to 8 bits in front of packed weights, so a choice between near-equals
may differ; it counts as wrong only when numpy's margin is beyond the tolerance. Exits with 1 when
anything is wrong.
"""

import argparse
import json
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import xllamacpp
from tokenizers import Tokenizer

from dense_llama import DenseLlama, log_softmax


class Server:
    def __init__(self, path, context):
        params = xllamacpp.CommonParams()
        params.model.path = path
        params.n_ctx = context
        params.n_parallel = 1
        params.n_gpu_layers = 0
        params.verbosity = 0
        params.warmup = False
        params.fit_params = False
        self.server = xllamacpp.Server(params)

    def ids(self, text):
        """Ids of a text, special ones at its ends included; `None` when llama.cpp gives up."""
        body = json.dumps({"content": text, "add_special": True, "parse_special": True})
        request = urllib.request.Request(
            self.server.listening_address + "/tokenize",
            body.encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request) as answer:
                return json.load(answer)["tokens"]
        except urllib.error.HTTPError:
            return None

    def continued(self, prompt, count, top):
        """A greedy continuation of ids: its text, and per piece the likeliest ones by id."""
        answer = self.server.handle_completions(
            {
                "prompt": prompt,
                "n_predict": count,
                "temperature": 0.0,
                "logprobs": top,
                "cache_prompt": False,
            }
        )
        if isinstance(answer, (str, bytes)):
            answer = json.loads(answer)
        if "choices" not in answer:
            raise SystemExit(f"llama.cpp answers {json.dumps(answer)[:300]}")
        choice = answer["choices"][0]
        pieces = (choice.get("logprobs") or {}).get("content") or []
        return choice["text"], [
            (piece["id"], {p["id"]: p["logprob"] for p in piece["top_logprobs"]})
            for piece in pieces
        ]


def check_ids(server, tokenizer, texts):
    different = failed = pieces = 0
    for text in texts:
        expected, got = tokenizer.encode(text).ids, server.ids(text)
        pieces += len(expected)
        failed += got is None
        if got is not None and got != expected:
            different += 1
            if different == 1:
                at = next((i for i, (a, b) in enumerate(zip(got, expected)) if a != b), -1)
                shown = got[max(at, 0) :][:6], expected[max(at, 0) :][:6]
                print(f"  first difference in {text[:40]!r} at {at}: {shown[0]} for {shown[1]}")
    print(f"  ids: {len(texts)} texts, {pieces} pieces, {different} different, {failed} failed")
    return different + failed


def check_steps(server, model, prompt, count, tolerance):
    """Follows numpy's greedy choice; returns its ids and the number of wrong steps."""
    ids, worst, wrong, ties, seen = list(prompt), 0.0, 0, 0, 0
    for _ in range(count):
        ours = log_softmax(model.logits(ids))
        best = int(ours.argmax())
        # A piece that is a part of a character, or a special one, comes without probabilities.
        for chosen, likely in server.continued(ids, 1, 8)[1]:
            seen += 1
            # Far below the likeliest, rounding is large and nobody looks.
            worst = max([worst, *(abs(p - ours[i]) for i, p in likely.items() if p > -8)])
            if best != chosen:
                margin = ours[best] - ours[chosen]
                ties += margin <= tolerance
                wrong += margin > tolerance
                print(f"  step {len(ids)}: {chosen} for numpy's {best}, ahead by {margin:.1e}")
        ids.append(best)
    print(
        f"  greedy: {seen} of {count} steps seen, log-probabilities within {worst:.1e}, "
        f"{ties} near-ties decided otherwise, {wrong} wrong"
    )
    return ids, wrong + (worst > tolerance) + (seen == 0)


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("gguf")
    arguments.add_argument("dense")
    arguments.add_argument("--prompt", default="Once upon a time, there was a")
    arguments.add_argument("--texts", help="JSON list of texts to tokenize")
    arguments.add_argument("--steps", type=int, default=32)
    arguments.add_argument("--tolerance", type=float, default=0.02, help="in nats")
    given = arguments.parse_args()
    model = DenseLlama(given.dense)
    tokenizer = Tokenizer.from_file(str(Path(given.dense) / "tokenizer.json"))
    server = Server(given.gguf, model.config.get("max_position_embeddings", 512))
    texts = [given.prompt]
    if given.texts:
        texts += json.loads(Path(given.texts).read_text(encoding="utf-8"))
    print(given.gguf)
    wrong = check_ids(server, tokenizer, texts)
    prompt = tokenizer.encode(given.prompt).ids
    ids, wrong_steps = check_steps(server, model, prompt, given.steps, given.tolerance)
    text, _ = server.continued(prompt, given.steps, 1)
    ours = tokenizer.decode(ids[len(prompt) :])
    print(f"  text: {text[:60]!r} {'equals' if text.strip() == ours.strip() else 'differs from'} ours")
    wrong += wrong_steps
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
