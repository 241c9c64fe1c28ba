"""Loads MLX folders with mistral.rs: log-probabilities along a greedy continuation.

It reads folders whose embedding and head are packed too.
"""

import os
import pathlib
import sys
import tempfile

import mistralrs
from tokenizers import Tokenizer

from llama import Cannot, Llama, greedy, judge, log_softmax, read_config, reference

PROMPT = "the tide and eleven apples"
TEMPLATE = "{{ messages[0]['content'] }}"
STEPS, LIKELIEST, TOLERANCE = 16, 20, 1e-4


def continued(folder, template):
    """Log-probabilities of the likeliest tokens, by id, at each step of a greedy continuation."""
    model = mistralrs.Which.Plain(
        model_id=str(folder.resolve()),
        arch=mistralrs.Architecture.Llama,
        dtype=mistralrs.ModelDType.F32,
    )
    request = mistralrs.ChatCompletionRequest(
        model="model",
        messages=[{"role": "user", "content": PROMPT}],
        max_tokens=STEPS,
        temperature=0.0,
        logprobs=True,
        top_logprobs=LIKELIEST,
    )
    runner = mistralrs.Runner(which=model, jinja_explicit=template)
    answer = runner.send_chat_completion_request(request)
    steps = answer.choices[0].logprobs.content
    return [{token.token: token.logprob for token in step.top_logprobs} for step in steps]


def check(folder, _):
    if read_config(folder)["quantization_config"].get("model.embed_tokens") is False:
        raise Cannot("it wants embedding and head packed too, and this export keeps them dense")
    config = read_config(folder)
    width, heads = config["hidden_size"], config["num_attention_heads"]
    if config.get("head_dim", width // heads) * heads != width:
        raise Cannot("its Llama has heads of hidden_size / heads, whatever head_dim says")
    model = Llama(config, reference(folder))
    prompt = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(PROMPT).ids
    tokens, logits = greedy(model, prompt, STEPS)
    with tempfile.TemporaryDirectory() as place:
        template = pathlib.Path(place) / "plain.jinja"
        template.write_text(TEMPLATE, encoding="utf-8")
        steps = continued(folder, str(template))
    worst = 0.0
    for at, likely in enumerate(steps):
        row = log_softmax(logits[len(prompt) - 1 + at])
        worst = max([worst, *(abs(p - row[token]) for token, p in likely.items())])
        if max(likely, key=likely.get) != row.argmax():  # a near-tie, or the distance tells
            break
    passed = steps and worst <= TOLERANCE
    return "within" if passed else "fails", f"{at + 1} steps within {worst:.1e} nats"


if __name__ == "__main__":
    os.environ["MISTRALRS_CPU_KV_F32"] = "1"
    sys.exit(judge(__doc__, check))
