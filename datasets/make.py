"""Makes the data sets `tinyshakespeare`, `e2e_nlg`, `gsm8k` and `ifeval` from their sources.

    python datasets/make.py tinyshakespeare.txt e2e_devset.csv gsm8k_train.jsonl ifeval_input_data.jsonl

Writes beside this file. Standard library only; the same sources give the same bytes.
"""

import csv
import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent

# Tiny Shakespeare: this part of the speeches, in order, is for training.
TRAIN_PERCENT = 90

# E2E NLG: every eighth meaning representation, in file order, is for validation, and of each the
# first three references are taken.
VALIDATION_EVERY = 8
REFERENCES = 3
# GSM8K: this many rows as examples, and as questions.
GSM8K_EXAMPLES = 32
GSM8K_SAMPLE = 40
# Attribute names in everyday words, which a small vocabulary writes with fewer pieces.
PLAIN = {
    "eatType": "kind",
    "familyFriendly": "family",
    "priceRange": "price",
    "customer rating": "rating",
}


def tinyshakespeare(source):
    """The text split at blank lines into speeches."""
    text = source.read_text(encoding="utf-8")
    speeches = [speech.strip() for speech in text.split("\n\n")]
    speeches = [speech for speech in speeches if speech]
    train = len(speeches) * TRAIN_PERCENT // 100
    folder = HERE / "tinyshakespeare"
    write(folder / "train.json", string_list(speeches[:train]))
    write(folder / "validation.json", string_list(speeches[train:]))


def string_list(texts):
    return "[\n" + ",\n".join(json.dumps(text, ensure_ascii=False) for text in texts) + "\n]\n"


def e2e_nlg(source):
    """Meaning representations as prompts, human references as completions."""
    references = {}
    with source.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            references.setdefault(plain(row["mr"]), []).append(plain(row["ref"]).strip())
    train, validation = [], []
    for index, (meaning, texts) in enumerate(references.items()):
        held_out = index % VALIDATION_EVERY == VALIDATION_EVERY - 1
        for text in texts[:REFERENCES]:
            example = {"prompt": prompt(meaning), "completion": " " + text}
            (validation if held_out else train).append(example)
    folder = HERE / "e2e_nlg"
    write(folder / "train.jsonl", json_lines(train))
    write(folder / "validation.jsonl", json_lines(validation))


def prompt(meaning):
    """`name[The Eagle], food[French]` as `name: The Eagle, food: French`, a line, and `say:`."""
    fields = re.findall(r"([^,\[\]]+)\[([^\]]*)\]", meaning)
    fields = [(name.strip(), value) for name, value in fields]
    return ", ".join(f"{PLAIN.get(name, name)}: {value}" for name, value in fields) + "\nsay:"


def plain(text):
    """The pound sign and the accent of "Café" as letters the built-in model's tokenizer has."""
    return re.sub("£ ?", "GBP ", text).replace("é", "e")


def gsm8k(source):
    """Rows of the training file: the first ones as examples, later ones as questions."""
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    folder = HERE / "gsm8k"
    write(folder / "examples.jsonl", json_lines(rows[:GSM8K_EXAMPLES]))
    write(folder / "sample.jsonl", json_lines(rows[GSM8K_EXAMPLES:GSM8K_EXAMPLES + GSM8K_SAMPLE]))


def ifeval(source):
    """The rows as they are, but for keys without a value."""
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row["kwargs"] = [{k: v for k, v in keys.items() if v is not None} for keys in row["kwargs"]]
    write(HERE / "ifeval" / "sample.jsonl", json_lines(rows))


def json_lines(objects):
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in objects)


def write(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    makers = [tinyshakespeare, e2e_nlg, gsm8k, ifeval]
    if len(sys.argv) != 1 + len(makers):
        sys.exit(__doc__)
    for maker, source in zip(makers, sys.argv[1:]):
        maker(Path(source))
