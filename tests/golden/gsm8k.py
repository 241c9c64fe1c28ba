"""What lm-evaluation-harness finds in made-up answers to GSM8K: tests/golden/gsm8k.jsonl.

    pip install lm_eval
    python tests/golden/gsm8k.py tests/golden/gsm8k.jsonl
    python tests/golden/gsm8k.py big.jsonl --count 200000 --seed 1      # by hand

A line is [answer, target, strict, flexible, strict is right, flexible is right]. The filters and the metric
are made from the task's own gsm8k.yaml.
"""
import argparse
import json
import os
import random

PIECES = ["#### ", "####", "### ", "#### #### ", "12", "7", "1,015", "1,015.", "$20", "$20.00", "-3", "- 4", "3.5", "0", "007", ".5",
          "5.", "..", ",", ".", "$", "-", "--", " ", " ", " ", "\n", "\n", "so she has ", "apples", " = ", " * ", "+", "%", "½", "٣", "１２",
          "[invalid]", "#### x", "The answer is ", "\\boxed{42}", "1e5", "1 000", "€9", "\t", "\r\n", "\u00a0", "A#### 9", "#### -8", "#### $5",
          "...", "10-2", "2/3", "X", "YES", "İ"]


def text(rng):
    return "".join(rng.choice(PIECES) for _ in range(rng.choice([0, 1, 2, 3, 5, 8, 14])))


def number(rng):
    whole = rng.choice([str(rng.randint(0, 20)), f"{rng.randint(0, 10**7):,}", str(rng.randint(-99, 99)), f"{rng.random() * 100:.2f}"])
    return rng.choice(["", "", "", "$", "-"]) + whole + rng.choice(["", "", "", ".", ",", "%"])


def row(rng):
    right = number(rng)
    target = rng.choice([text(rng) + "\n#### " + right] * 6 + ["#### " + right, right, text(rng), "#### " + right + "\n", "#### 1\n#### " + right])
    given = right if rng.random() < 0.7 else number(rng)
    answer = rng.choice([text(rng) + "\n#### " + given + text(rng), text(rng) + given, " #### " + given, given + " " + text(rng), text(rng),
                         target, target.replace("#### ", "####")])
    return answer, target


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("output")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    import lm_eval
    import yaml
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter
    task = yaml.safe_load(open(os.path.join(os.path.dirname(lm_eval.__file__), "tasks/gsm8k/gsm8k.yaml")))
    filters = []
    for one in task["filter_list"]:
        keys = {k: v for k, v in one["filter"][0].items() if k != "function"}
        filters.append(RegexFilter(**keys))
    metric = {k: v for k, v in task["metric_list"][0].items() if k.startswith("ignore") or k.startswith("regexes")}
    rng = random.Random(args.seed)
    with open(args.output, "w", encoding="utf-8", newline="\n") as out:
        for _ in range(args.count):
            answer, target = row(rng)
            found = [f.apply([[answer]], [None])[0][0] for f in filters]
            right = [int(exact_match_hf_evaluate([one], [target], **metric)["exact_match"]) for one in found]
            out.write(json.dumps([answer, target, *found, *right], ensure_ascii=False, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
