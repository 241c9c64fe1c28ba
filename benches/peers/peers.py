#!/usr/bin/env python3
"""Block reconstruction with the methods' original quantizers, on a CPU, to put beside fewbit.

The quantizer classes are imported from a checkout that the caller names; nothing of them is kept
here. Everything around them (model, data, loop, errors, clocks) is written for this comparison and
the same for every method. README.md beside this file has the protocol and the commands.
"""

import argparse
import copy
import hashlib
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import nn

LINEARS = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
]


def main():
    args = arguments()
    warnings.filterwarnings("ignore", "_aminmax is deprecated")  # in the FlexRound code
    # Both programs get the same cores: the child inherits the restriction.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    torch.set_num_threads(args.threads)
    model = Llama(args.model)
    tokens = calibration(model, args)
    peer = PEERS[args.peer](args)
    shown = min(args.blocks or model.n_blocks, model.n_blocks)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan
    if args.fewbit:
        run_fewbit(args, model, "--dry-run")  # refuse now rather than after their half
    theirs, ours = [], []
    if args.clamp == "authors":
        torch.clamp = torch.Tensor.clamp = authors_clamp
    for _ in range(args.rounds):
        torch.manual_seed(args.seed)
        theirs.append(reconstruct(model, tokens, peer, args, shown))
        if args.fewbit:
            ours.append(run_fewbit(args, model)[:shown])
    result = {
        "settings": {k: v for k, v in vars(args).items() if k not in ("json", "fewbit")},
        "torch": torch.__version__,
        "quantizer": {"file": str(peer.source), "sha256": sha256(peer.source)},
        "load_average_at_start": load,
        "theirs": quickest(theirs),
    }
    if ours:
        result["fewbit"] = quickest(ours)
    print(table(args, result))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2, default=str) + "\n")


def arguments():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--peer", required=True, choices=sorted(PEERS))
    p.add_argument("--checkout", required=True, help="folder with the authors' code")
    p.add_argument("--model", required=True, help="Llama folder: config, safetensors, tokenizer.json")
    p.add_argument("--calibration", required=True, nargs="+", help="JSON lists of texts, in order")
    p.add_argument("--bits", type=int, default=4)
    p.add_argument("--group", type=int, default=0, help="weights per scale; 0: one scale per row")
    p.add_argument("--steps", type=int, default=200, help="per block")
    p.add_argument("--lr", type=float, nargs="+", help="one or two rates, see the README")
    p.add_argument("--blocks", type=int, help="only the first N blocks")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--samples", type=int, default=128)
    p.add_argument("--length", type=int, default=128)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--clamp", choices=["authors", "torch"], default="authors", help="see the README")
    p.add_argument("--rounds", type=int, default=1, help="repeat; a block's best times count")
    p.add_argument("--fewbit", help="also run this fewbit binary, afterwards, on the same settings")
    p.add_argument("--json", help="write everything measured to this file")
    args = p.parse_args()
    wanted = PEERS[args.peer].lr
    args.lr = args.lr or list(wanted)
    if len(args.lr) != len(wanted):
        p.error(f"--peer {args.peer} takes {len(wanted)} learning rate(s)")
    if args.peer == "lrq" and args.group:
        p.error("lrq is per row only in the authors' code: drop --group")
    return args


# --- model and data ---------------------------------------------------------------------------


class Llama:
    """The decoder blocks of a Llama checkpoint in f32, as plain tensors."""

    def __init__(self, folder):
        self.folder = Path(folder)
        config = json.loads((self.folder / "config.json").read_text())
        if config.get("attention_bias") or config.get("mlp_bias") or config.get("rope_scaling"):
            sys.exit(f"{folder}: biases and scaled RoPE are not covered here")
        self.config = config
        self.n_blocks = config["num_hidden_layers"]
        self.heads = config["num_attention_heads"]
        self.kv_heads = config.get("num_key_value_heads", self.heads)
        self.head_dim = config.get("head_dim") or config["hidden_size"] // self.heads
        self.eps = config["rms_norm_eps"]
        self.theta = config.get("rope_theta", 10000.0)
        self.tensors = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            with safe_open(file, "pt") as f:
                self.tensors.update({name: f.get_tensor(name).float() for name in f.keys()})

    def embedding(self):
        t = self.tensors
        return t.get("model.embed_tokens.weight", t.get("lm_head.weight"))

    def block(self, index):
        """Weights of one block by short name."""
        prefix = f"model.layers.{index}."
        cut = len(prefix)
        return {
            name[cut:].removesuffix(".weight"): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(prefix)
        }

    def rotations(self, length):
        """cos and sin, [length, head_dim], halves repeated."""
        half = torch.arange(0, self.head_dim, 2).float() / self.head_dim
        angles = torch.outer(torch.arange(length).float(), self.theta**-half).repeat(1, 2)
        return angles.cos(), angles.sin()

    def forward(self, w, x, rotations):
        """One block on x [batch, length, hidden]."""
        x = x + self.attention(w, self.norm(x, w["input_layernorm"]), rotations)
        h = self.norm(x, w["post_attention_layernorm"])
        gated = F.silu(F.linear(h, w["mlp.gate_proj"])) * F.linear(h, w["mlp.up_proj"])
        return x + F.linear(gated, w["mlp.down_proj"])

    def attention(self, w, h, rotations):
        def split(name, heads):
            y = F.linear(h, w[f"self_attn.{name}_proj"])
            return y.unflatten(-1, (heads, self.head_dim)).transpose(1, 2)

        def rotate(y):
            a, b = y.chunk(2, dim=-1)
            return y * rotations[0] + torch.cat((-b, a), dim=-1) * rotations[1]

        repeat = self.heads // self.kv_heads
        q, k = rotate(split("q", self.heads)), rotate(split("k", self.kv_heads))
        k, v = (y.repeat_interleave(repeat, dim=1) for y in (k, split("v", self.kv_heads)))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.linear(y.transpose(1, 2).flatten(2), w["self_attn.o_proj"])

    def norm(self, x, weight):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * weight


def calibration(model, args):
    """[samples, length] token ids: windows floor(i * N / samples) of the joined, BOS-led texts."""
    tokenizer = Tokenizer.from_file(str(model.folder / "tokenizer.json"))
    texts = [text for path in args.calibration for text in json.loads(Path(path).read_text())]
    stream = []
    for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
        stream += [model.config["bos_token_id"], *encoding.ids]
    windows = len(stream) // args.length
    if windows < args.samples:
        sys.exit(f"{windows} windows of {args.length} tokens, expected at least {args.samples}")
    starts = [i * windows // args.samples * args.length for i in range(args.samples)]
    return torch.tensor([stream[s : s + args.length] for s in starts])


# --- the authors' quantizers ------------------------------------------------------------------


def import_file(path, search=None):
    """The module in `path`; `search` is put on the import path for its own imports."""
    if not path.is_file():
        sys.exit(f"{path} is missing: is --checkout the right repository?")
    if search:
        sys.path.insert(0, str(search))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Clamp(torch.autograd.Function):
    """A clamp whose gradient is 1 on the bounds, as PyTorch's was when the methods were written.

    PyTorch of 2026 gives 1/2 there for tensor bounds and 0 for numbers. Codes sit on the bounds in
    every row, and learned rounding gets visibly elsewhere in the first dozens of steps.
    """

    @staticmethod
    def forward(ctx, x, low, high):
        y = NATIVE_CLAMP(x, low, high)
        ctx.save_for_backward(y == x)
        return y

    @staticmethod
    def backward(ctx, gradient):
        (inside,) = ctx.saved_tensors
        return gradient * inside, None, None


NATIVE_CLAMP = torch.clamp


def authors_clamp(x, min=None, max=None):
    return Clamp.apply(x, min, max)


class Peer:
    """What differs between the methods: quantizer, learning rates, loss, inputs."""

    lr = (1e-2,)  # defaults
    trains_weights = False
    input_prob = 1.0  # share of input entries from the quantized stream
    final_ratio = 0.0  # where the cosine ends
    optimizer = torch.optim.Adam
    source_name = search_name = None
    # fewbit's recipe keys for the same settings; the rates are filled in.
    recipe_lr = "{0}"
    recipe = ""

    def __init__(self, args):
        self.args = args
        root = Path(args.checkout)
        self.source = root / self.source_name
        self.module = import_file(self.source, self.search_name and root / self.search_name)

    def loss(self, output, target):
        return F.mse_loss(output, target)

    def apply(self, quantizer, weight):
        return quantizer(weight)

    def groups(self, quantizers, weights):
        """Parameter groups in the order of the learning rates."""
        return [[p for q in quantizers.values() for p in q.parameters()]]


class FlexRound(Peer):
    source_name = "quant/UniformAffineQuantizer.py"
    mode = "flexround"

    def loss(self, output, target):
        return self.module.lp_loss(output, target)

    def quantizer(self, weight):
        return self.module.UniformAffineQuantizer(
            n_bits=self.args.bits,
            symmetric=False,
            clipping=False,
            channel_wise=True,
            mode=self.mode,
            org_weight=self.grouped(weight),
        )

    def apply(self, quantizer, weight):
        return quantizer(self.grouped(weight)).reshape(weight.shape)

    def grouped(self, weight):
        # Their class knows rows; a group is a row of the reshaped weight.
        return weight.reshape(-1, group_of(weight.shape[1], self.args.group))


class Lrq(FlexRound):
    mode = "lrq"

    def quantizer(self, weight):
        quantizer = super().quantizer(weight)
        out, inputs = weight.shape
        # Their constructor fixes rank 1024, which has mismatched shapes below that width.
        rank = max(1, min(out, inputs) // 4)
        quantizer.delta2 = nn.Parameter(torch.zeros(out, rank))
        quantizer.delta3 = nn.Parameter(torch.empty(rank, inputs))
        nn.init.kaiming_uniform_(quantizer.delta3, a=math.sqrt(5))
        quantizer.delta4 = nn.Parameter(torch.zeros(out, 1))
        quantizer.delta5 = nn.Parameter(torch.zeros(1, inputs))
        return quantizer


class UniQuanF(Peer):
    lr = (1.5e-2, 1.5e-3)
    input_prob = 0.5
    source_name = "src/bcq_quant_layer.py"
    search_name = "src"
    recipe_lr = "{{ scale = {0}, rounding = {0}, levels = {1} }}"
    recipe = 'input_prob = 0.5\nobjective.mse = { reduction = "mean" }'

    def quantizer(self, weight):
        # Their start moves the weight to a GPU; here that call does nothing.
        with mock.patch.object(torch.Tensor, "cuda", lambda tensor: tensor):
            return self.module.BCQWeightQuantizer(
                n_bits=self.args.bits,
                channel_wise=True,
                org_weight=weight,
                group_size=group_of(weight.shape[1], self.args.group) if self.args.group else -1,
                gradient_filtering=True,
                period=2,
                alternating_update_iters=15,
                grid_search_iters=1,
                mapping_function="lpmapping",
            )

    def groups(self, quantizers, weights):
        uniform = [
            p for q in quantizers.values() for n, p in q.named_parameters() if n != "alpha"
        ]
        return [uniform, [q.alpha for q in quantizers.values()]]


class BlockAp(Peer):
    lr = (5e-3, 1e-3)
    trains_weights = True
    final_ratio = 0.05
    optimizer = torch.optim.AdamW
    source_name = "quantize/quantizer.py"
    recipe_lr = "{{ scale = {0}, weight = {1} }}"
    recipe = 'schedule.cosine = { final_ratio = 0.05 }\nobjective.mse = { reduction = "mean" }'

    def quantizer(self, weight):
        size = group_of(weight.shape[1], self.args.group)
        return self.module.UniformAffineQuantizer(self.args.bits, size, weight)

    def groups(self, quantizers, weights):
        return [*super().groups(quantizers, weights), list(weights.values())]


PEERS = {"flexround": FlexRound, "lrq": Lrq, "uniquanf": UniQuanF, "block_ap": BlockAp}


def group_of(inputs, group):
    """The group size for a row of `inputs`: itself for 0, else the divisor nearest to `group`."""
    divisors = (d for d in range(1, inputs + 1) if inputs % d == 0)
    return min(divisors, key=lambda d: abs(d - group)) if group else inputs


# --- the loop ---------------------------------------------------------------------------------


def reconstruct(model, tokens, peer, args, blocks):
    """Fits the first `blocks` blocks in order; a list with errors and times of each."""
    rotations = model.rotations(args.length)
    full = F.embedding(tokens, model.embedding())
    quantized = full.clone()

    def run(w, x):
        with torch.no_grad():
            return torch.cat([model.forward(w, part, rotations) for part in x.split(args.batch)])

    rows = []
    for index in range(blocks):
        start = time.perf_counter()
        w = model.block(index)
        target = run(w, full)
        frozen = {name: w[name] for name in LINEARS}
        quantizers = {name: peer.quantizer(weight) for name, weight in frozen.items()}
        # On a copy, because a quantizer may count its forwards.
        before = bake(peer, copy.deepcopy(quantizers), frozen)
        before = mse(run({**w, **before}, quantized), target)
        learned, times, loop = train(
            model, peer, args, w, quantizers, (quantized, full, target), rotations
        )
        baked = {**w, **bake(peer, quantizers, learned)}
        quantized, full = run(baked, quantized), target
        rows.append(
            {
                "index": index,
                "mse_before": before,
                "mse_after": mse(quantized, full),
                "ms_per_step_median": statistics.median(times) * 1e3,
                "ms_per_step_mean": loop / args.steps * 1e3,
                "seconds": time.perf_counter() - start,
            }
        )
        note(f"{args.peer} block {index + 1}/{blocks}: mse {rows[-1]['mse_after']:.4g}")
    return rows


def train(model, peer, args, w, quantizers, streams, rotations):
    """Fits one block; its weights to quantize, the seconds of every step, and of the loop."""
    quantized, full, target = streams
    weights = {name: w[name] for name in quantizers}
    if peer.trains_weights:
        weights = {name: nn.Parameter(weight.clone()) for name, weight in weights.items()}
    optimizer = peer.optimizer(
        [
            {"params": params, "lr": lr}
            for params, lr in zip(peer.groups(quantizers, weights), args.lr, strict=True)
        ],
        weight_decay=0.0,
    )
    end = peer.final_ratio
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: end + (1 - end) * (1 + math.cos(math.pi * t / args.steps)) / 2
    )
    order = batches(len(target), args.batch)
    times, loop = [], time.perf_counter()
    for _ in range(args.steps):
        begin = time.perf_counter()
        rows = next(order)
        x = quantized[rows]
        if peer.input_prob < 1.0:
            x = torch.where(torch.rand_like(x) < peer.input_prob, x, full[rows])
        fake = {name: peer.apply(q, weights[name]) for name, q in quantizers.items()}
        loss = peer.loss(model.forward({**w, **fake}, x, rotations), target[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        times.append(time.perf_counter() - begin)
    return weights, times, time.perf_counter() - loop


def batches(n, size):
    """Index batches without end: one random permutation of 0..n after the other."""
    pending = torch.empty(0, dtype=torch.long)
    while True:
        while len(pending) < size:
            pending = torch.cat((pending, torch.randperm(n)))
        yield pending[:size]
        pending = pending[size:]


@torch.no_grad()
def bake(peer, quantizers, weights):
    return {name: peer.apply(q, weights[name]) for name, q in quantizers.items()}


def mse(a, b):
    return (a - b).double().pow(2).mean().item()


# --- fewbit -----------------------------------------------------------------------------------


def run_fewbit(args, model, *extra):
    """The same settings with our program; a list like that of `reconstruct`, for all blocks, or
    nothing after a dry run (`extra` goes on the command line)."""
    with tempfile.TemporaryDirectory() as folder:
        recipe, output = Path(folder) / "recipe.toml", Path(folder) / "run"
        recipe.write_text(fewbit_recipe(args, model))
        command = [args.fewbit, "train", "--recipe", recipe, "--output", output, "--device", "cpu"]
        note(" ".join(["fewbit", *extra, "…"]))
        done = subprocess.run(
            [*map(str, command), *extra],
            env={**os.environ, "RAYON_NUM_THREADS": str(args.threads)},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(f"fewbit ended with {done.returncode}:\n{done.stderr}\n{recipe.read_text()}")
        if extra:
            return []
        lines = (output / "metrics.jsonl").read_text().splitlines()
    return fewbit_blocks([json.loads(line) for line in lines])


def fewbit_recipe(args, model):
    peer = PEERS[args.peer]
    block = model.block(0)
    sizes = {n.split(".")[1]: group_of(block[n].shape[1], args.group) for n in LINEARS}
    overrides = "".join(
        f'[[quant.override]]\nmatch = "*.{name}"\ngroup_size = {size}\n'
        for name, size in sizes.items()
        if args.group and size != args.group
    )
    paths = json.dumps([str(Path(p).resolve()) for p in args.calibration])
    return f"""seed = {args.seed}
device = "cpu"
output = "run"
[model]
path = {json.dumps(str(model.folder.resolve()))}
compute = "f32"
[data.calibration]
path = {paths}
samples = {args.samples}
length = {args.length}
[quant]
bits = {args.bits}
group_size = {args.group or '"channel"'}
symmetric = false
{overrides}
[[stage]]
[stage.reconstruct]
method.{args.peer} = {{}}
steps = {args.steps}
batch = {args.batch}
learning_rate = {peer.recipe_lr.format(*args.lr)}
{peer.recipe}
"""


def fewbit_blocks(events):
    """Errors and times of each block. The loss is logged every few steps: the interval between
    two lines over the steps in it is what `ms_per_step` is made of."""
    points = {}
    for e in events:
        if e["event"] == "block_loss":
            points.setdefault(e["block"], []).append((e["step"], e["time"]))
    rows = []
    for e in events:
        if e["event"] != "block":
            continue
        row = {k: e[k] for k in ("index", "mse_before", "mse_after", "seconds")}
        p = points.get(e["index"], [])
        if len(p) > 1:
            steps = [(t1 - t0) / (s1 - s0) for (s0, t0), (s1, t1) in zip(p, p[1:])]
            row["ms_per_step_median"] = statistics.median(steps) * 1e3
            row["ms_per_step_mean"] = (p[-1][1] - p[0][1]) / (p[-1][0] - p[0][0]) * 1e3
        rows.append(row)
    return rows


def quickest(rounds):
    """The rows of the last round with each block's smallest times: noise only ever adds."""
    last = rounds[-1]
    for index, row in enumerate(last):
        for key in TIMES:
            if key in row:
                row[key] = min(rows[index][key] for rows in rounds)
    return last


# --- output -----------------------------------------------------------------------------------


def table(args, result):
    grid = f"w{args.bits}" + (f"g{args.group}" if args.group else "")
    rates = " / ".join(f"{lr:g}" for lr in args.lr)
    head = (
        f"{args.peer} {grid}, {Path(args.model).name}: {args.samples} x {args.length} tokens, "
        f"batch {args.batch}, {args.steps} steps per block, lr {rates}, {args.threads} threads, "
        f"clamp as {args.clamp}, "
        f"{args.rounds} round(s), load average {result['load_average_at_start']:.1f} at the start"
    )
    theirs, ours = result["theirs"], result.get("fewbit")
    lines = [head, ""]
    lines += markdown("theirs (torch " + result["torch"] + ")", theirs)
    if not ours:
        return "\n".join(lines)
    lines += ["", *markdown("fewbit", ours), ""]
    lines += ["| fewbit / theirs | block MSE | ms/step median | s/step, whole block |"]
    lines += ["|---|---|---|---|"]
    both = list(zip(ours, theirs))
    for a, b in [*both, (mean(ours), mean(theirs))]:
        cells = [ratio(a, b, k) for k in ("mse_after", "ms_per_step_median")]
        whole = [r["seconds"] / args.steps for r in (a, b)]
        cells.append(f"{whole[0]:.4f} / {whole[1]:.4f} ({whole[0] / whole[1]:.2f})")
        lines.append(f"| {label(a)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def markdown(title, rows):
    yield f"| {title} | MSE before | MSE after | ms/step median | ms/step mean | block seconds |"
    yield "|---|---|---|---|---|---|"
    for r in [*rows, mean(rows)]:
        times = [f"{r[k]:.1f}" if k in r else "-" for k in TIMES]
        yield f"| {label(r)} | {r['mse_before']:.4g} | {r['mse_after']:.4g} | {' | '.join(times)} |"


TIMES = ("ms_per_step_median", "ms_per_step_mean", "seconds")


def mean(rows):
    keys = rows[0].keys() - {"index"}
    return {k: statistics.fmean(r[k] for r in rows) for k in keys}


def label(row):
    return f"block {row['index']}" if "index" in row else "mean"


def ratio(ours, theirs, key):
    if key not in ours:
        return "-"
    return f"{ours[key]:.4g} / {theirs[key]:.4g} ({ours[key] / theirs[key]:.2f})"


def note(text):
    print(text, file=sys.stderr, flush=True)


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
