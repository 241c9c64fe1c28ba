"""Does lm-evaluation-harness answer every row as fewbit does?

    lm_eval_choice.py FEWBIT MODEL WORKDIR [--limit N] [--golden FILE] BENCHMARK=ROWS[,EXAMPLES]...

MODEL is a Hugging Face folder. ROWS is a file (for mmlu a folder) in any form that fewbit reads; this script
turns it into the columns of the data set on the hub by code of its own, and gives those to the harness' own task
definition, with transformers in float32 behind it. Compared are every answer's log-likelihood, the chosen
answers, and the numbers with their standard errors. --golden writes what the harness found, for tests without it.
Needs: pip install lm_eval torch transformers.
"""

import argparse
import csv
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

os.environ["TQDM_DISABLE"] = "1"
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

import lm_eval
import lm_eval.tasks
import yaml

FOLDERS = {
    "arc_easy": "arc", "arc_challenge": "arc", "piqa": "piqa", "openbookqa": "openbookqa",
    "winogrande": "winogrande", "hellaswag": "hellaswag", "boolq": "super_glue/boolq",
}
FILES = {"boolq": "default.yaml", "winogrande": "default.yaml"}
SPLITS = {"arc_easy": "test", "arc_challenge": "test", "openbookqa": "test"}


def adapted(text, word):
    """Question and answers of an instruction that trains adapters."""
    question, rest = re.fullmatch(
        rf"(?s)[^:]*: (.*?)\n\n{word}1: (.*?)\s*Answer format: .*", text.replace("\r", "\r")
    ).groups()
    rest = text[text.index(f"{word}1: ") + len(word) + 3 :]
    rest = rest[: rest.rindex("Answer format: ")]
    rest = rest[:-2] if rest.endswith("\n\n") else rest[:-1]
    return question, re.split(rf"(?:\n\n| ){word}\d: ", rest)


def hub_row(benchmark, row):
    """A row in the columns of the data set on the hub."""
    if "instruction" not in row:
        return row
    right = int(re.search(r"\d+", row["answer"]).group()) - 1
    word = {"piqa": "Solution", "winogrande": "Option"}.get(benchmark, "Answer")
    question, answers = adapted(row["instruction"], word)
    if benchmark == "piqa":
        return {"goal": question, "sol1": answers[0], "sol2": answers[1], "label": right}
    if benchmark == "winogrande":
        return {"sentence": question, "option1": answers[0], "option2": answers[1], "answer": str(right + 1)}
    labels = "ABCDEFGH"[: len(answers)]
    choices = {"text": answers, "label": list(labels)}
    stem = "question_stem" if benchmark == "openbookqa" else "question"
    return {stem: question, "choices": choices, "answerKey": labels[right]}


def rows_of(path):
    text = path.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        return json.loads(text)
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def definition(benchmark, rows, examples, work, limit):
    """A copy of the harness' task on these rows; its name there."""
    source = pathlib.Path(lm_eval.tasks.__file__).parent / FOLDERS[benchmark]
    folder = work / "tasks" / benchmark
    shutil.copytree(source, folder)
    for file in folder.glob("*.yaml"):
        if file.name != FILES.get(benchmark, f"{benchmark}.yaml") and not (
            benchmark == "arc_challenge" and file.name == "arc_easy.yaml"
        ):
            file.unlink()
    name = f"our_{benchmark}"
    split = SPLITS.get(benchmark, "validation")
    files = {split: str(work / f"{benchmark}.jsonl")}
    write_lines(work / f"{benchmark}.jsonl", [hub_row(benchmark, row) for row in rows_of(rows)][:limit])
    shots = ""
    if examples:
        file, _, count = str(examples).partition(":")
        write_lines(
            work / f"{benchmark}_examples.jsonl",
            [hub_row(benchmark, row) for row in rows_of(pathlib.Path(file))],
        )
        files["train"] = str(work / f"{benchmark}_examples.jsonl")
        shots = "fewshot_split: train\nfewshot_config:\n  sampler: first_n\n"
    for file in folder.glob("*.yaml"):
        text = file.read_text(encoding="utf-8")
        text = re.sub(r"(?m)^dataset_path: .*$", "dataset_path: json", text)
        text = re.sub(r"(?m)^dataset_name: .*$", "dataset_name: null", text)
        if file.name == "arc_easy.yaml" and benchmark == "arc_challenge":
            text = re.sub(r"(?m)^task: .*$", "task: our_base", text)
        else:
            text = re.sub(r"(?m)^task: .*$", f"task: {name}", text)
        text = re.sub(r"(?m)^(training|validation|test)_split: .*\n", "", text)
        text = re.sub(r"(?m)^fewshot_split: .*\n", "", text)
        text += f"\n{'test' if split == 'test' else 'validation'}_split: {split}\n{shots}"
        text += "dataset_kwargs:\n  data_files:\n"
        text += "".join(f"    {key}: {value}\n" for key, value in files.items())
        file.write_text(text, encoding="utf-8")
    return name


def mmlu_definition(rows, examples, work, limit):
    source = pathlib.Path(lm_eval.tasks.__file__).parent / "mmlu/default"
    folder = work / "tasks/mmlu"
    shutil.copytree(source, folder)
    data = work / "mmlu"
    data.mkdir()
    there = set()
    for kind, place in [("test", rows), ("dev", examples)]:
        for file in sorted(place.glob("*.csv")):
            subject = re.sub(r"_(val|dev|test)$", "", file.stem)
            there.add(subject)
            lines = list(csv.reader(file.open(encoding="utf-8", newline="")))
            made = [
                {"question": q, "subject": subject, "choices": answers, "answer": "ABCD".index(right)}
                for q, *answers, right in lines
            ]
            write_lines(data / f"{subject}.{kind}.jsonl", made if kind == "dev" else made[:limit])
    for file in folder.iterdir():
        if not file.is_file():
            continue
        text = file.read_text(encoding="utf-8")
        text = text.replace("dataset_path: cais/mmlu", "dataset_path: json")
        found = re.search(r'"dataset_name": "(.*)"\n', text)
        if found:
            subject = found.group(1)
            if subject not in there:
                file.unlink()
                continue
            files = f"    test: {data}/{subject}.test.jsonl\n    dev: {data}/{subject}.dev.jsonl\n"
            text = text.replace(found.group(0), f'"dataset_name": null\ndataset_kwargs:\n  data_files:\n{files}')
        file.write_text(text, encoding="utf-8")
    return "mmlu"


def tokenizer(model):
    """The model's tokenizer.json as it stands. (transformers 5 makes a LlamaTokenizer's anew from its vocabulary, and
    some lose their unknown token by that.)"""
    from transformers import PreTrainedTokenizerFast

    settings = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    names = [f"{kind}_token" for kind in ("bos", "eos", "unk", "pad")]
    text = lambda token: token["content"] if isinstance(token, dict) else token
    tokens = {name: text(settings[name]) for name in names if settings.get(name)}
    return PreTrainedTokenizerFast(tokenizer_file=str(model / "tokenizer.json"), **tokens)


def theirs(model, names, work):
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(pretrained=str(model), tokenizer=tokenizer(model), dtype="float32", device="cpu", batch_size=8)
    manager = TaskManager(include_path=str(work / "tasks"), include_defaults=False)
    found = {}
    for benchmark, (name, shots) in names.items():
        results = lm_eval.simple_evaluate(
            lm, tasks=[name], num_fewshot=shots, task_manager=manager, log_samples=True, bootstrap_iters=100
        )
        found[benchmark] = results
    return found


def ours(fewbit, model, benchmark, rows, examples, shots, limit, work):
    samples = work / f"{benchmark}.samples.jsonl"
    command = [fewbit, "eval", "--model", model, "--task", f"{benchmark}={rows}", "--json"]
    command += ["--samples", samples, "--set", f"shots={shots}"]
    command += ["--limit", str(limit)] if limit else []
    command += ["--set", f"examples={examples}"] if examples else []
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"fewbit: {done.stderr}")
    lines = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    return json.loads(done.stdout), lines


def samples_of(results):
    """Rows of all tasks of a result, in order of the tasks' names."""
    rows = []
    for task in sorted(results["samples"]):
        for sample in sorted(results["samples"][task], key=lambda sample: sample["doc_id"]):
            sums = [float(answer[0][0]) if isinstance(answer[0], (list, tuple)) else float(answer[0]) for answer in sample["filtered_resps"]]
            acc = {key: sample[key] for key in ("acc", "acc_norm") if key in sample}
            rows.append({"log_likelihoods": sums, **acc})
    return rows


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("fewbit")
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("work", type=pathlib.Path)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--golden", type=pathlib.Path)
    parser.add_argument("benchmarks", nargs="+")
    args = parser.parse_args()
    shutil.rmtree(args.work, ignore_errors=True)
    work = args.work.resolve()
    (work / "tasks").mkdir(parents=True)
    names, asked = {}, {}
    for text in args.benchmarks:
        benchmark, _, files = text.partition("=")
        rows, _, rest = files.partition(",")
        examples, _, shots = rest.partition(":")
        shots = int(shots) if shots else (5 if examples else 0)
        asked[benchmark] = (rows, examples, shots)
        if benchmark == "mmlu":
            name = mmlu_definition(pathlib.Path(rows), pathlib.Path(examples), work, args.limit)
        else:
            name = definition(benchmark, pathlib.Path(rows), examples, work, args.limit)
        names[benchmark] = (name, shots)
    found = theirs(args.model, names, work)
    if args.golden:
        lines = [
            {"benchmark": benchmark, "row": index}
            | row
            | {"log_likelihoods": [round(value, 4) for value in row["log_likelihoods"]]}
            for benchmark in asked
            for index, row in enumerate(samples_of(found[benchmark]))
        ]
        write_lines(args.golden, lines)
    wrong = 0
    print(f"{'benchmark':<14} {'rows':>5} {'number':<24} {'theirs':>9} {'fewbit':>9}  differ  widest")
    for benchmark, (rows, examples, shots) in asked.items():
        score, mine = ours(args.fewbit, args.model, benchmark, rows, examples, shots, args.limit, work)
        their_rows = samples_of(found[benchmark])
        if len(their_rows) != len(mine):
            sys.exit(f"{benchmark}: {len(their_rows)} rows there, {len(mine)} here")
        widest, differ, differ_norm = 0.0, 0, 0
        for there, here in zip(their_rows, mine):
            pairs = list(zip(there["log_likelihoods"], here["log_likelihoods"], strict=True))
            widest = max([widest, *(abs(a - b) for a, b in pairs)])
            differ += int(there["acc"] != (here["answer"] == here["right"]))
            best = max(range(len(pairs)), key=lambda i: (there["log_likelihoods"][i], -i))
            differ += int(there["acc"] == (here["answer"] == here["right"]) and best != here["answer"])
            if "acc_norm" in there:
                differ_norm += int(there["acc_norm"] != (here["answer_norm"] == here["right"]))
        name = names[benchmark][0]
        numbers = {**found[benchmark].get("groups", {}), **found[benchmark]["results"]}
        told = {"acc": (name, "acc"), "acc_norm": (name, "acc_norm")}
        told |= {group: (f"mmlu_{group}", "acc") for group in ("stem", "humanities", "social_sciences", "other")}
        for ours_name, (task, key) in told.items():
            for ending in ("", "_stderr"):
                there = numbers.get(task, {}).get(f"{key}{ending},none")
                here = score.get(f"{ours_name}{ending}")
                if not isinstance(there, float) or here is None:
                    continue
                bad = abs(there - here) > 1e-9
                wrong += bad
                shown = differ_norm if ours_name == "acc_norm" else differ
                line = f"{benchmark:<14} {len(mine):>5} {ours_name + ending:<24} {there:>9.6f} {here:>9.6f}"
                print(f"{line}  {shown:>6}  {widest:.1e}{'  DIFFERS' if bad else ''}")
        wrong += differ + differ_norm
    print("all rows answered alike" if not wrong else f"{wrong} differences")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
