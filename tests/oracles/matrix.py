"""Models, grids, formats and loaders, each with each: exports all, has all loaders read them, and
writes what came of it to WORKDIR/matrix.md.

    matrix.py FEWBIT WORKDIR [--without LOADER]... [--models NAME,...] [--grids WORDS,...]

An export that fewbit refuses (exit code 3) is recorded with its sentence; every other failure, of an
export or of a reader, and every loader that is not installed, makes the exit code 1.
"""

import argparse
import collections
import importlib.util
import json
import pathlib
import re
import shutil
import subprocess
import sys
import time

import numpy as np
from safetensors.numpy import load_file, save_file

from check_packed import mlx
from llama import read_config
from random_models import make_all

HERE = pathlib.Path(__file__).resolve().parent
STORIES = HERE.parent.parent / "datasets/tinystories/validation.json"
EMBEDDED = "embedded:tinystories-656k"
REFUSED = 3

RTN = "[stage.calibrate]\nmethod.rtn = {}\n"
BCQ = "[stage.calibrate]\nmethod.bcq = {}\n"
LEARNED = """[stage.distill]
method.%s = {}
objective.jsd = {}
steps = 1
batch = 2
learning_rate = 1e-3
"""
SEQ, TERNARY = LEARNED % "seq", LEARNED % "ternary"

# name: the [quant] table, the stage
GRIDS = {
    "w4 sym g32": ("bits = 4\ngroup_size = 32\nsymmetric = true", RTN),
    "w4 asym g64": ("bits = 4\ngroup_size = 64", RTN),
    "w4 asym channel": ("bits = 4", RTN),
    "w3 asym channel": ("bits = 3", RTN),
    "w3 sym g32": ("bits = 3\ngroup_size = 32\nsymmetric = true", RTN),
    "w2 asym g64": ("bits = 2\ngroup_size = 64", RTN),
    "w2 sym g64": ("bits = 2\ngroup_size = 64\nsymmetric = true", RTN),
    "w8 sym g128": ("bits = 8\ngroup_size = 128\nsymmetric = true", RTN),
    "w2 seq channel": ("bits = 2", SEQ),
    "w2 seq g64": ("bits = 2\ngroup_size = 64", SEQ),
    "ternary channel": ("bits = 2", TERNARY),
    "ternary g64": ("bits = 2\ngroup_size = 64", TERNARY),
    "bcq 3 channel": ("bits = 3", BCQ),
}

RECIPE = """output = "run"
device = "cpu"
model.path = "{model}"
[data]
validation.path = "few.json"
train = {{ path = "text.json", length = 64 }}
[quant]
scales = "f16"
{quant}
[[stage]]
{stage}[[stage]]
[stage.export]
format.fewbit = {{}}
"""

# mlx-embeddings is mlx with embedding and head as wide as the linears, as mistral.rs wants them.
FORMATS = (
    "dequantized", "mlx", "mlx-embeddings", "gguf", "gptq", "autoround", "awq",
    "compressed_tensors", "bcq",
)  # fmt: skip

TORCH = ("torch", "transformers")

# name: script and options, the modules it needs, the formats it reads
LOADERS = {
    "numpy": (
        "check_packed.py",
        (),
        {"mlx", "gptq", "autoround", "awq", "compressed_tensors", "bcq"},
    ),
    "mlx-lm": ("check_mlx.py", ("mlx_lm",), {"mlx", "mlx-embeddings"}),
    "mistral.rs": ("check_mistralrs.py", ("mistralrs",), {"mlx-embeddings"}),
    "gguf-py": ("check_gguf.py", ("gguf",), {"gguf"}),
    "llama.cpp": ("check_llamacpp.py", ("xllamacpp", "gguf"), {"gguf"}),
    "transformers": ("check_hf.py", TORCH, {"dequantized"}),
    "compressed-tensors": ("check_hf.py", (*TORCH, "compressed_tensors"), {"compressed_tensors"}),
    "auto-round": ("check_hf.py", (*TORCH, "auto_round"), {"autoround"}),
    "gptqmodel": ("check_hf.py", (*TORCH, "gptqmodel", "optimum"), {"gptq", "awq"}),
    "gptqmodel-plain": ("check_hf.py --plain", (*TORCH, "gptqmodel", "optimum"), {"gptq", "awq"}),
}

WORDS = {
    "exact": "exact",
    "within": "within tolerance",
    "cannot": "loader cannot",
    "fails": "FAILS",
}


def said(ended):
    """The first sentence of what a process complains about."""
    lines = [line for line in ended.stderr.splitlines() if line.startswith("error:")]
    return lines[0].removeprefix("error: ") if lines else (ended.stderr.strip() or "nothing")[-300:]


def with_embeddings(folder, dense):
    """The dense folder of an export whose embedding and head were rounded: theirs are decoded in
    numpy, everything else is as trained."""
    own = folder.parent / f"{folder.name}.dequantized"
    shutil.rmtree(own, ignore_errors=True)
    shutil.copytree(dense, own)
    config, packed = read_config(folder)["quantization"], load_file(folder / "model.safetensors")
    weights = load_file(dense / "model.safetensors")
    for name in ("model.embed_tokens", "lm_head"):
        if f"{name}.scales" in packed:
            weights[f"{name}.weight"] = np.ascontiguousarray(mlx(packed, name, config))
    if "lm_head.scales" not in packed:  # tied: one matrix, whatever the source called it
        weights.pop("lm_head.weight", None)
    save_file(weights, own / "model.safetensors")


class Suite:
    def __init__(self, fewbit, work):
        self.fewbit, self.work = fewbit.resolve(), work
        self.folders = work / "exports"
        self.exports, self.findings, self.missing = [], {}, []
        shutil.rmtree(self.folders, ignore_errors=True)

    def run(self, place, *arguments):
        return subprocess.run(
            [self.fewbit, *arguments], cwd=place, capture_output=True, text=True, check=False
        )

    def models(self):
        """Names and paths of the models; the random ones get the embedded one's tokenizer."""
        place = self.work / "models"
        shutil.rmtree(place, ignore_errors=True)
        self.train(place, EMBEDDED, *GRIDS["w8 sym g128"])
        ended = self.run(
            place, "export", "--run", "run", "--format", "dequantized", "--output", "dense"
        )
        if ended.returncode:
            sys.exit(f"the embedded model: {said(ended)}")
        return {"embedded": EMBEDDED} | make_all(place / "dense", place)

    def train(self, place, model, quant, stage):
        place.mkdir(parents=True)
        stories = json.loads(STORIES.read_text(encoding="utf-8"))
        for name, count in (("few.json", 3), ("text.json", 8)):
            (place / name).write_text(json.dumps(stories[:count]), encoding="utf-8")
        recipe = RECIPE.format(model=model, quant=quant, stage=stage)
        (place / "recipe.toml").write_text(recipe, encoding="utf-8")
        return self.run(place, "train", "--recipe", "recipe.toml")

    def export_all(self, model, path, grid):
        """Trains a model to a grid and exports it in every format."""
        place = self.folders / model / grid.replace(" ", "-")
        trained = self.train(place, path, *GRIDS[grid])
        for name in FORMATS:
            entry = {"model": model, "grid": grid, "format": name, "bits": "", "text": ""}
            self.exports.append(entry)
            if trained.returncode:
                entry |= {"status": "fails", "text": f"not trained: {said(trained)}"}
                continue
            settings = self.settings(name, grid)
            words = ["export", "--run", "run", "--format", name.split("-")[0], "--output", name]
            ended = self.run(place, *words, *settings)
            if name == "mlx-embeddings" and not ended.returncode:
                with_embeddings(place / name, place / "dequantized")
            if ended.returncode:
                status = "refused" if ended.returncode == REFUSED else "fails"
                entry |= {"status": status, "text": said(ended)}
                continue
            bits = re.search(r"([\d.]+) bits/weight", ended.stdout + ended.stderr)
            entry |= {"status": "exported", "bits": bits.group(1), "folder": str(place / name)}
        shutil.rmtree(place / "run", ignore_errors=True)

    def settings(self, name, grid):
        """What `fewbit export` is told beside a format."""
        bits = re.search(r"bits = (\d)", GRIDS[grid][0]).group(1)
        return ["--set", f"embeddings={bits}"] if name == "mlx-embeddings" else []

    def read_all(self, loader):
        """Has a loader read every folder it can. One that takes its process down is a failure."""
        command, modules, formats = LOADERS[loader]
        script, *options = command.split()
        if not all(importlib.util.find_spec(module) for module in modules):
            self.missing.append(loader)
            return
        report = self.work / f"{loader}.jsonl"
        report.unlink(missing_ok=True)
        waiting = [e["folder"] for e in self.exports if "folder" in e and e["format"] in formats]
        with (self.work / f"{loader}.log").open("w", encoding="utf-8") as log:
            while waiting:
                words = [sys.executable, HERE / script, *options, "--report", report, *waiting]
                ended = subprocess.run(words, stdout=log, stderr=log, check=False)
                lines = report.read_text(encoding="utf-8").splitlines() if report.exists() else []
                for line in map(json.loads, lines):
                    self.findings[line["folder"], loader] = line
                waiting = [folder for folder in waiting if (folder, loader) not in self.findings]
                if waiting:
                    died = {"status": "fails", "text": f"its process ended with {ended.returncode}"}
                    self.findings[waiting.pop(0), loader] = died

    def rows(self):
        """(export, loader, status, sentence) of every cell, a refused one without a loader."""
        for export in self.exports:
            if export["status"] != "exported":
                yield export, "", export["status"], export["text"]
                continue
            for loader, (_, _, formats) in LOADERS.items():
                if export["format"] not in formats:
                    continue
                found = self.findings.get((export["folder"], loader))
                if found:
                    yield export, loader, WORDS[found["status"]], found["text"]
                else:
                    yield export, loader, "not run", ""


def cell(text):
    return text.replace("|", "\\|").replace("\n", " ")


def summary(rows):
    """Lines of a table grid x format, over all models and loaders."""
    cells = collections.defaultdict(list)
    for export, loader, status, _ in rows:
        cells[export["grid"], export["format"]].append((export, loader, status))
    yield f"| grid | {' | '.join(FORMATS)} |"
    yield "|---" * (len(FORMATS) + 1) + "|"
    for grid in dict.fromkeys(grid for grid, _ in cells):
        yield f"| {grid} | {' | '.join(brief(cells[grid, name]) for name in FORMATS)} |"


def brief(found):
    """What came of one grid in one format: bits per weight, and the loaders by result."""
    if not found:
        return ""
    results = collections.defaultdict(set)
    for _, loader, status in found:
        results[status].add(loader)
    bits = sorted({export["bits"] for export, _, _ in found if export["bits"]}, key=float)
    shown = ["–".join(dict.fromkeys((bits[0], bits[-1]))) + " bits"] if bits else []
    for status, loaders in results.items():
        names = ", ".join(sorted(loaders - {""}))
        shown.append(f"{status}: {names}" if names else status)
    return "; ".join(shown)


def details(rows):
    """Lines of a table of every cell, per model."""
    model = None
    for export, loader, status, text in rows:
        if export["model"] != model:
            model = export["model"]
            yield from ("", f"## {model}", "")
            yield "| grid | format | bits/weight | loader | result | |"
            yield "|---|---|---|---|---|---|"
        shown = (export["grid"], export["format"], export["bits"], loader, status, cell(text))
        yield f"| {' | '.join(shown)} |"


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("fewbit", type=pathlib.Path)
    parser.add_argument("work", type=pathlib.Path, help="folder for exports and results")
    parser.add_argument("--without", action="append", default=[], choices=LOADERS)
    parser.add_argument("--models", help="names, with commas; otherwise all")
    parser.add_argument("--grids", help="names, with commas; otherwise all")
    return parser.parse_args()


def chosen(names, everything):
    names = names.split(",") if names else list(everything)
    unknown = set(names) - set(everything)
    if unknown:
        sys.exit(f"unknown: {', '.join(unknown)}; there are {', '.join(everything)}")
    return names


def main():
    given = parse()
    given.work.mkdir(parents=True, exist_ok=True)
    suite = Suite(given.fewbit, given.work.resolve())
    started = time.monotonic()

    def step(text):
        print(f"{time.monotonic() - started:6.0f} s  {text}", flush=True)

    models = suite.models()
    for model in chosen(given.models, models):
        step(f"exporting {model}")
        for grid in chosen(given.grids, GRIDS):
            suite.export_all(model, models[model], grid)
    for loader in LOADERS:
        if loader not in given.without:
            step(loader)
            suite.read_all(loader)
    rows = list(suite.rows())
    counts = collections.Counter(status for _, _, status, _ in rows)
    total = ", ".join(f"{count} {status}" for status, count in counts.items())
    lines = ["# Exports and their readers", "", total, "", *summary(rows), *details(rows)]
    (given.work / "matrix.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    step(total)
    failed = [row for row in rows if row[2] in ("fails", WORDS["fails"])]
    for export, loader, _, text in failed:
        print(f"FAILS  {export['model']}, {export['grid']}, {export['format']}, {loader}: {text}")
    if suite.missing:
        print(f"NOT RUN, not installed: {', '.join(suite.missing)}")
    return 1 if failed or suite.missing else 0


if __name__ == "__main__":
    sys.exit(main())
