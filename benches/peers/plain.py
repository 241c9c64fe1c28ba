#!/usr/bin/env python3
"""Training steps in plain eager PyTorch, on a CPU, to put beside fewbit.

peers.py beside this file compares the methods as their authors wrote them; this one asks a simpler
question: how long does the same arithmetic take, and how much memory does it need, when it is
written the way a PyTorch user writes it, as a row of operations that autograd records?

    plain.py block   --model DIR | --synthetic llama-1b-block  --fewbit BIN
    plain.py distill --model DIR                               --fewbit BIN
    plain.py kernels [--criterion target/criterion]

Protocol of `block` and `distill`:

* Both programs get the same folder, tokens, steps, rates and start, f32, as many cores and threads.
  The batch is the whole data set, so the order of the data does not matter, and the loss of the
  first step agrees to about six digits. Where weights were rounded to 16 bits it may be three: some
  (127 of the 49152 of a linear of tinystories-656k) lie exactly between two codes, and the last bit
  of exp(δ) decides. The last loss need not agree: PyTorch 2.15 drops the gradient of an entry on a
  bound of `clamp` (see the README).
* torch, fewbit, torch, fewbit, …, `--rounds` times, each in a process of its own; the smallest
  time and peak of each count, because neighbours only ever add.
* `ms/step`: median over the steps but the first, which allocates the optimizer's state; `fastest`:
  their minimum, for when a neighbour spoils every median. A step is drawing the batch, forward,
  backward, update, reading the loss. Nothing else is in the clock: no start of a process, no
  loading, no target. Ours is taken between two log lines, in `distill` `--log-every` steps apart,
  so that our `fastest` there is a mean over so many steps.
* Peak memory is the kernel's VmHWM, which begins anew with each program. The maximum that a parent
  gets from `wait4` does not: it contains what the process was before exec. The whole process holds
  the interpreter and torch's libraries (several hundred MB) on their side, and on ours whatever the
  run does before and after the steps. `above the start` is what torch's steps add to what is
  resident right before the first one, weights and learned parameters included: gradients, optimizer
  state, and what autograd keeps.
* Attention is written out; `--attention sdpa` takes torch's fused one. Optimizers as PyTorch's
  defaults choose them, which is one tensor after the other on a CPU.

Protocol of `kernels`: torch's forward and gradient in this process, median of 10 after 3; ours are
criterion's medians from `cargo bench`, to be run with RAYON_NUM_THREADS as `--threads` here.
"""

import argparse
import contextlib
import ctypes
import functools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import peers
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn

DATASETS = Path(__file__).resolve().parents[2] / "datasets"
MAX_CODE = 15  # 4 bits
SEQ_MARGIN = 0.99
BETA = 0.5


def main():
    args = arguments()
    if hasattr(os, "sched_setaffinity"):  # processes started here inherit it
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    torch.set_num_threads(args.threads)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan
    settings = {k: v for k, v in vars(args).items() if k not in ("run", "json", "fewbit")}
    title, lines, measured = args.run(args)
    title += f", f32, torch {torch.__version__}, {args.threads} threads"
    print(f"{title}, load average {load:.1f} at the start")
    print("", *lines, sep="\n")
    if args.json:
        found = {"load_average_at_start": load, "torch": torch.__version__, **measured}
        found["settings"] = settings
        Path(args.json).write_text(json.dumps(found, indent=2, default=str) + "\n")


def arguments():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = p.add_subparsers(required=True, metavar="block | distill | kernels")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--threads", type=int, default=2, help="cores and threads of each program")
    common.add_argument("--json", help="write everything measured to this file")

    steps = argparse.ArgumentParser(add_help=False)
    steps.add_argument("--fewbit", required=True, help="the fewbit binary")
    texts = [str(DATASETS / "tinystories/calibration.json")]
    steps.add_argument("--calibration", nargs="+", default=texts, help="JSON lists of texts")
    steps.add_argument("--tokens", type=int, help="in a step; default 1024, synthetic 512")
    steps.add_argument("--seq", dest="length", type=int, default=128, help="tokens in a sequence")
    steps.add_argument("--steps", type=int, help="default 60, synthetic 6")
    steps.add_argument("--rounds", type=int, default=3, help="the best counts")
    steps.add_argument("--attention", choices=["plain", "sdpa"], default="plain")
    steps.set_defaults(synthetic=None, seed=0)

    block = commands.add_parser("block", parents=[common, steps], help="FlexRound, first block")
    which = block.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", help="Llama folder; its first block is used")
    which.add_argument("--synthetic", choices=["llama-1b-block"], help="random weights instead")
    tokenizer = str(DATASETS / "tinystories-656k")
    block.add_argument("--tokenizer", default=tokenizer, help="folder, for --synthetic")
    block.set_defaults(run=run_block, peer="flexround", bits=4, group=0, lr=[1e-2])

    distill = commands.add_parser("distill", parents=[common, steps], help="SEQ + JSD, all blocks")
    distill.add_argument("--model", required=True, help="Llama folder")
    distill.add_argument("--log-every", type=int, default=10, help="fewbit's log points")
    starts = {"choices": ["mse", "max"], "default": "mse"}
    distill.add_argument("--start", **starts, help="of SEQ's steps; mse takes minutes on a model")
    distill.set_defaults(run=run_distill, lr=[2e-3])

    kernels = commands.add_parser("kernels", parents=[common], help="single operations")
    kernels.add_argument("--criterion", default="target/criterion", help="results of cargo bench")
    kernels.set_defaults(run=run_kernels)

    args = p.parse_args()
    if args.run is not run_kernels:
        args.tokens = args.tokens or (512 if args.synthetic else 1024)
        args.steps = args.steps or (6 if args.synthetic else 60)
        args.batch = args.samples = args.tokens // args.length
        if args.batch * args.length != args.tokens or args.steps < 2:
            p.error("--tokens must be a multiple of --seq, and --steps at least 2")
    return args


# --- the model --------------------------------------------------------------------------------


class Model(peers.Llama):
    """The blocks, and the whole model from tokens to logits."""

    def logits(self, blocks, tokens, rotations):
        """[batch * length, vocab] from tokens [batch, length] and the weights of every block."""
        x = F.embedding(tokens, self.embedding())
        for w in blocks:
            x = self.forward(w, x, rotations)
        x = self.norm(x, self.tensors["model.norm.weight"])
        return F.linear(x, self.tensors.get("lm_head.weight", self.embedding())).flatten(0, 1)


def written_out_attention(q, k, v, is_causal=True):
    """Causal attention as a row of operations, in place of torch's fused one."""
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5 + causal_mask(q.shape[2])
    return scores.softmax(dim=-1) @ v


@functools.cache
def causal_mask(length):
    return torch.full((length, length), -math.inf).triu(1)


def first_block(args, folder):
    """Writes the model cut after its first block, so that neither program does more than that."""
    model = peers.Llama(args.model)
    cut = {
        name: tensor.contiguous()
        for name, tensor in model.tensors.items()
        if not name.startswith("model.layers.") or name.startswith("model.layers.0.")
    }
    write_model(folder, model.folder, {**model.config, "num_hidden_layers": 1}, cut)


def synthetic_block(args, folder):
    """Writes a random model with one block of Llama 3.2 1B's shape and a small vocabulary."""
    source = Path(args.tokenizer)
    d, inner, kv = 2048, 8192, 512
    config = json.loads((source / "config.json").read_text())
    config |= {"hidden_size": d, "intermediate_size": inner, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64}
    config |= {"rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": True}
    shapes = [(d, d), (kv, d), (kv, d), (d, d), (inner, d), (inner, d), (d, inner)]
    shapes = {f"layers.0.{name}": shape for name, shape in zip(peers.LINEARS, shapes, strict=True)}
    shapes["embed_tokens"] = (config["vocab_size"], d)
    torch.manual_seed(args.seed)
    tensors = {f"model.{name}.weight": torch.randn(shape) * 0.02 for name, shape in shapes.items()}
    norms = ["layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm"]
    tensors |= {f"model.{name}.weight": torch.ones(d) for name in norms}
    write_model(folder, source, config, tensors)


def write_model(folder, source, config, tensors):
    """A Hugging Face folder with the tokenizer files of `source`."""
    for file in source.glob("*token*.json"):
        shutil.copy(file, folder)
    (Path(folder) / "config.json").write_text(json.dumps(config))
    save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})


# --- fake quantization and losses ---------------------------------------------------------------


def round_through(x):
    return x + (x.round() - x).detach()


class FlexRound(nn.Module):
    """W_hat = exp(δ) · (clamp(round(W / exp(δ + D + d)) + z, 0, 15) - z), a scale for each row."""

    def __init__(self, weight):
        super().__init__()
        low = weight.amin(1, keepdim=True).clamp(max=0.0)
        high = weight.amax(1, keepdim=True).clamp(min=0.0)
        scale = ((high - low) / MAX_CODE).clamp(min=1e-8)
        self.register_buffer("weight", weight)
        self.register_buffer("zero", -torch.round(low / scale))
        self.log_scale = nn.Parameter(scale.log())
        self.log_division = nn.Parameter(torch.zeros_like(weight))
        self.log_row = nn.Parameter(torch.zeros_like(scale))

    def forward(self):
        # The two columns first: one addition of the weight's size less.
        divisor = (self.log_division + (self.log_scale + self.log_row)).exp()
        codes = torch.clamp(round_through(self.weight / divisor) + self.zero, 0, MAX_CODE)
        return (codes - self.zero) * self.log_scale.exp()


class Seq(nn.Module):
    """W_hat = (Δ/2) · (round(2 clamp(W/Δ, ±0.99) - 1/2) + 1/2); W and Δ learn, Δ for each row with
    its gradient scaled by 1/sqrt(numel)."""

    def __init__(self, weight, start):
        super().__init__()
        self.latent = nn.Parameter(weight.clone())
        top = weight.abs().amax(1, keepdim=True)
        self.step = nn.Parameter(self.best_step(weight) if start == "mse" else top)

    @classmethod
    def best_step(cls, weight):
        """Of i/100 of each row's largest magnitude, the one with the smallest squared error."""
        top = weight.abs().amax(1, keepdim=True)
        steps = [top * (i / 100) for i in range(1, 101)]
        errors = [(weight - cls.quantize(weight, s)).square().mean(1, keepdim=True) for s in steps]
        return torch.cat(steps, 1).gather(1, torch.cat(errors, 1).argmin(1, keepdim=True))

    @staticmethod
    def quantize(weight, step):
        inside = torch.clamp(weight / step, -SEQ_MARGIN, SEQ_MARGIN)
        return step / 2 * (round_through(2 * inside - 0.5) + 0.5)

    def forward(self):
        scaled = self.step * self.latent.numel() ** -0.5
        return self.quantize(self.latent, scaled + (self.step - scaled).detach())


def jsd(student, teacher):
    """β KL(p‖m) + (1-β) KL(q‖m), m = βp + (1-β)q; teacher p, student q, mean over the rows."""
    log_q, log_p = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    log_m = torch.logaddexp(log_p + math.log(BETA), log_q + math.log(1 - BETA))
    return BETA * kl(log_p, log_m) + (1 - BETA) * kl(log_q, log_m)


def kl_forward(student, teacher):
    return kl(F.log_softmax(teacher, -1), F.log_softmax(student, -1))


def kl(log_a, log_b):
    """KL(a‖b), mean over the rows."""
    return F.kl_div(log_b, log_a, reduction="batchmean", log_target=True)


# --- steps in torch, each in a process of its own -----------------------------------------------


def prepare(args):
    """What a new process does first; the model."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    if args.attention == "plain":
        F.scaled_dot_product_attention = written_out_attention
    return Model(args.model)


def torch_block(args):
    """FlexRound steps on the first block, towards its float output."""
    model = prepare(args)
    rotations = model.rotations(args.length)
    w = model.block(0)
    x = F.embedding(peers.calibration(model, args), model.embedding())
    with torch.no_grad():
        target = model.forward(w, x, rotations)
    quantizers = {name: FlexRound(w[name]) for name in peers.LINEARS}
    optimizer = torch.optim.Adam(parameters([quantizers]), lr=args.lr[0])

    def loss(rows):
        fake = {name: q() for name, q in quantizers.items()}
        output = model.forward({**w, **fake}, x[rows], rotations)
        return (output - target[rows]).square().sum(1).mean()

    found = measure(args, optimizer, loss)
    # fewbit logs the plain mean whatever the loss is.
    return {k: v / args.length if k.endswith("_loss") else v for k, v in found.items()}


def torch_distill(args):
    """2-bit SEQ steps on every block, towards the float model's distribution."""
    model = prepare(args)
    rotations = model.rotations(args.length)
    tokens = first_windows(model, args)
    teacher = [model.block(i) for i in range(model.n_blocks)]
    with torch.no_grad():
        students = [{name: Seq(w[name], args.start) for name in peers.LINEARS} for w in teacher]
    optimizer = torch.optim.AdamW(parameters(students), lr=args.lr[0], weight_decay=0.0)

    def loss(rows):
        with torch.no_grad():
            goal = model.logits(teacher, tokens[rows], rotations)
        fake = [
            {**w, **{name: q() for name, q in student.items()}}
            for w, student in zip(teacher, students, strict=True)
        ]
        return jsd(model.logits(fake, tokens[rows], rotations), goal)

    return measure(args, optimizer, loss)


def parameters(blocks):
    return [p for block in blocks for q in block.values() for p in q.parameters()]


def first_windows(model, args):
    """[batch, length] token ids: the start of the joined texts, each led by BOS."""
    tokenizer = Tokenizer.from_file(str(model.folder / "tokenizer.json"))
    stream = []
    for text in (text for path in args.calibration for text in json.loads(Path(path).read_text())):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        stream += [model.config["bos_token_id"], *ids]
        if len(stream) >= args.tokens:
            return torch.tensor(stream[: args.tokens]).view(-1, args.length)
    sys.exit(f"{len(stream)} tokens in --calibration, expected at least {args.tokens}")


def measure(args, optimizer, loss):
    """Times of `args.steps` steps and what they add to memory; `loss` takes the batch's rows."""
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: (1 + math.cos(math.pi * t / args.steps)) / 2
    )
    order = peers.batches(args.samples, args.batch)
    times, losses = [], []
    earlier, start = restart_peak()
    for _ in range(args.steps):
        begin = time.perf_counter()
        value = loss(next(order))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        losses.append(value.item())
        del value
        times.append(time.perf_counter() - begin)
    peak = resident("VmHWM")
    return {
        **milliseconds(times[1:]),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "peak_mib": max(earlier, peak),
        "above_start_mib": peak - start,
    }


def milliseconds(times):
    return {"ms_per_step": statistics.median(times) * 1e3, "ms_fastest": min(times) * 1e3}


def restart_peak():
    """The peak so far and the memory resident now, from where the peak counts again (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        # What was freed but not returned would hide a part of what the steps take.
        ctypes.CDLL(None).malloc_trim(0)
    earlier = resident("VmHWM")
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return earlier, resident("VmRSS")


def resident(key):
    """A line of this process' memory in MiB; NaN where the system does not tell."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) / 1024
    return math.nan


def apart(function, args):
    """The result of a call in a new process, whose memory nobody has touched."""
    args = argparse.Namespace(**{k: v for k, v in vars(args).items() if k != "run"})
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, args).result()


# --- fewbit -----------------------------------------------------------------------------------


def run_fewbit(args, recipe, *extra):
    """The events of a run and the peak memory of its process; `extra` goes on the command line."""
    with tempfile.TemporaryDirectory() as folder:
        path, output = Path(folder) / "recipe.toml", Path(folder) / "run"
        path.write_text(recipe)
        command = [args.fewbit, "train", "--recipe", path, "--output", output, "--device", "cpu"]
        done = subprocess.run(
            [*map(str, command), *extra],
            env={**os.environ, "RAYON_NUM_THREADS": str(args.threads)},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(f"fewbit ended with {done.returncode}:\n{done.stderr}\n{recipe}")
        lines = (output / "metrics.jsonl").read_text().splitlines()
        record = json.loads((output / "run.json").read_text())
    return [json.loads(line) for line in lines], (record["peak_gib"] or math.nan) * 1024


def fewbit_block(args, recipe):
    events, peak = run_fewbit(args, recipe)
    points = [(e["step"], e["time"], e["loss"]) for e in events if e["event"] == "block_loss"]
    return between(points, points[0][2], peak)


def fewbit_distill(args, recipe):
    """One step in `--log-every` also compares the distributions in other ways, which is in the
    clock; the first loss comes from a run of a single step."""
    single, _ = run_fewbit(args, recipe, "--set", "stage.0.distill.steps=1")
    events, peak = run_fewbit(args, recipe)
    single, *points = [
        (e["step"], e["time"], e["values"]["train/loss"])
        for e in (*single, *events)
        if e["event"] == "step"
    ]
    if len(points) < 2:
        sys.exit("fewbit has one log point: --steps must be greater than --log-every")
    return between(points, single[2], peak)


def between(points, first_loss, peak):
    """Times from the intervals between log points, (step, time, loss)."""
    times = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in zip(points, points[1:])]
    losses = {"first_loss": first_loss, "last_loss": points[-1][2]}
    return {**milliseconds(times), **losses, "peak_mib": peak}


def distill_recipe(args):
    paths = json.dumps([str(Path(p).resolve()) for p in args.calibration])
    return f"""seed = {args.seed}
device = "cpu"
output = "run"
[model]
path = {json.dumps(str(Path(args.model).resolve()))}
compute = "f32"
[data.train]
path = {paths}
samples = {args.samples}
length = {args.length}
[quant]
bits = 2
group_size = "channel"
[[stage]]
[stage.distill]
bits = 2
method.seq = {{ start = "{args.start}" }}
objective.jsd = {{ beta = {BETA} }}
steps = {args.steps}
batch = {args.batch}
learning_rate = {args.lr[0]}
log_every = {args.log_every}
checkpoint_every = {args.steps + 1}
"""


# --- sub-commands: a title, the lines of a table, what was measured ------------------------------


def run_block(args):
    name = args.synthetic or Path(args.model).name
    with tempfile.TemporaryDirectory() as folder:
        (synthetic_block if args.synthetic else first_block)(args, Path(folder))
        args.model = folder
        recipe = peers.fewbit_recipe(args, peers.Llama(folder))
        title = f"flexround w4, first block of {name}"
        return compare(args, title, recipe, torch_block, fewbit_block)


def run_distill(args):
    title = f"seq w2 + jsd, {Path(args.model).name}"
    return compare(args, title, distill_recipe(args), torch_distill, fewbit_distill)


def compare(args, title, recipe, in_torch, in_fewbit):
    """Both programs in turn; every number's smallest over the rounds goes into the table."""
    run = {"torch": lambda: apart(in_torch, args), "fewbit": lambda: in_fewbit(args, recipe)}
    rounds = {"torch": [], "fewbit": []}
    for index in range(args.rounds):
        for name, measured in rounds.items():
            measured.append(run[name]())
            found = ", ".join(f"{k} {v:.6g}" for k, v in measured[-1].items())
            peers.note(f"round {index + 1}/{args.rounds} {name}: {found}")
    best = {
        name: {key: min(row[key] for row in measured) for key in measured[0]}
        for name, measured in rounds.items()
    }
    title += f": {args.batch} x {args.length} tokens, {args.steps} steps, best of {args.rounds}"
    return title, table(best), {"rounds": rounds, "best": best}


COLUMNS = {
    "ms_per_step": ("ms/step", ".1f"),
    "ms_fastest": ("fastest", ".1f"),
    "peak_mib": ("peak MiB, whole process", ".0f"),
    "above_start_mib": ("peak MiB above the start", ".0f"),
    "first_loss": ("loss, first step", ".7g"),
    "last_loss": ("last step", ".5g"),
}


def table(best):
    yield "| | " + " | ".join(head for head, _ in COLUMNS.values()) + " |"
    yield "|---" * (len(COLUMNS) + 1) + "|"
    for name, row in best.items():
        cells = (f"{row[k]:{form}}" if k in row else "-" for k, (_, form) in COLUMNS.items())
        yield f"| {name} | " + " | ".join(cells) + " |"
    ours, theirs = best["fewbit"], best["torch"]
    cells = (f"{ours[k] / theirs[k]:.5g}" if k in ours else "-" for k in COLUMNS)
    yield "| fewbit / torch | " + " | ".join(cells) + " |"


def run_kernels(args):
    rows = []
    for group, size, run in kernels():
        row = {"kernel": group, "size": size, "torch": median_ms(run)}
        for function in ("fused", "composed"):
            row[function] = criterion_ms(Path(args.criterion) / group / function / size)
        rows.append(row)
        peers.note(f"{group} {size}: {row['torch']:.2f} ms")
    lines = [
        "| forward + gradient | size | torch ms | fused ms | composed ms "
        "| fused / torch | composed / fused |",
        "|---" * 7 + "|",
    ]
    for r in rows:
        times = [r["torch"], r["fused"], r["composed"]]
        cells = [f"{t:.2f}" if t else "" for t in times]
        pairs = ((times[1], times[0]), (times[2], times[1]))
        cells += [f"{a / b:.2f}" if a and b else "" for a, b in pairs]
        lines.append(f"| {r['kernel']} | {r['size']} | " + " | ".join(cells) + " |")
    return "medians", lines, {"kernels": rows}


def kernels():
    """(criterion group, size, forward and gradient) of each operation."""
    torch.manual_seed(0)
    for rows, columns in ((2048, 8192), (128, 384)):
        yield "flexround", f"{rows}x{columns}", through(FlexRound, rows, columns)
    yield "seq", "2048x8192", through(Seq, 2048, 8192)
    losses = {"jsd": jsd, "kl_forward": kl_forward, "cross_entropy": F.cross_entropy}
    for name, loss in losses.items():
        for tokens, vocab in ((512, 32000), (128, 128256)):
            yield name, f"{tokens}x{vocab}", on_logits(loss, tokens, vocab)


def through(quantizer, rows, columns):
    """Fake quantization and the gradients of its parameters, the upstream gradient given."""
    with torch.no_grad():
        quantizer = quantizer(torch.randn(rows, columns) * 0.02)
    learned = list(quantizer.parameters())
    upstream = torch.randn(rows, columns)
    return lambda: torch.autograd.grad(quantizer(), learned, grad_outputs=upstream)


def on_logits(loss, tokens, vocab):
    """A loss and its gradient to the student's logits; the other side is not tracked."""
    student = torch.randn(tokens, vocab, requires_grad=True)
    goal = torch.randn(tokens, vocab)
    if loss is F.cross_entropy:
        goal = torch.randint(vocab, (tokens,))
    return lambda: torch.autograd.grad(loss(student, goal), student)


def median_ms(run, repeats=10, warmup=3):
    times = []
    for _ in range(warmup + repeats):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[warmup:]) * 1e3


def criterion_ms(folder):
    """Criterion's median in a benchmark's folder; None when it was not run."""
    with contextlib.suppress(FileNotFoundError):
        estimates = json.loads((folder / "new/estimates.json").read_text())
        return estimates["median"]["point_estimate"] / 1e6


if __name__ == "__main__":
    main()
