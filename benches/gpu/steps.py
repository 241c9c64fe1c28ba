#!/usr/bin/env python3
"""Training steps in PyTorch on a device, eager or compiled, on random weights of a config.json's shape.

    steps.py block|distill --config config.json --device cuda --mode eager|compiled
             --batch 2 --length 2048 --repeat 10 [--dtype f32|bf16] [--blocks N]

The arithmetic is that of benches/peers/plain.py (FlexRound on a block towards its float output; 2-bit SEQ on
every block towards the float model's distribution by JSD), with torch's fused attention and its fused Adam.
Learned parameters are f32; with `--dtype bf16` the products of a distillation run under autocast, as fewbit's
with `compute = "bf16"`; a block's step is f32 on both sides, without TF32. `ceiling` measures square products
instead. Prints one JSON object. Imports torch, safetensors and tokenizers, by way of benches/peers.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "peers"))

import plain  # noqa: E402 (found by the line above)
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

LINEARS = plain.peers.LINEARS


class Random(plain.Model):
    """A model of random weights, on a device."""

    def __init__(self, config, device, dtype, blocks):
        self.config, self.device, self.dtype = config, device, dtype
        self.n_blocks = blocks or config["num_hidden_layers"]
        self.heads = config["num_attention_heads"]
        self.kv_heads = config.get("num_key_value_heads", self.heads)
        self.head_dim = config.get("head_dim") or config["hidden_size"] // self.heads
        self.eps, self.theta = config["rms_norm_eps"], config.get("rope_theta", 10000.0)
        d = config["hidden_size"]
        self.tensors = {"model.norm.weight": torch.ones(d, device=device)}
        self.table = self.random(config["vocab_size"], d)

    def random(self, *shape):
        return torch.randn(shape, device=self.device, dtype=torch.float32) * 0.02

    def embedding(self):
        return self.table

    def block(self, index):
        d, inner = self.config["hidden_size"], self.config["intermediate_size"]
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes = [(q, d), (kv, d), (kv, d), (d, q), (inner, d), (inner, d), (d, inner)]
        weights = {n: self.random(*shape) for n, shape in zip(LINEARS, shapes, strict=True)}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[norm] = torch.ones(d, device=self.device)
        return weights

    def rotations(self, length):
        return tuple(x.to(self.device) for x in super().rotations(length))


def block_step(model, args):
    """One FlexRound step of one block."""
    rotations, w = model.rotations(args.length), model.block(0)
    x = torch.randn(args.batch, args.length, model.config["hidden_size"], device=args.device)
    with torch.no_grad():
        target = model.forward(w, x, rotations)
    quantizers = {name: plain.FlexRound(w[name]) for name in LINEARS}
    parameters = plain.parameters([quantizers])

    def loss():
        fake = {name: q() for name, q in quantizers.items()}
        output = model.forward({**w, **fake}, x, rotations)
        return (output - target).square().sum(1).mean()

    return parameters, loss


def distill_step(model, args):
    """One step of every block at two bits."""
    rotations = model.rotations(args.length)
    vocab = model.config["vocab_size"]
    tokens = torch.randint(vocab, (args.batch, args.length), device=args.device)
    teacher = [model.block(i) for i in range(model.n_blocks)]
    students = [{name: plain.Seq(w[name], "max") for name in LINEARS} for w in teacher]
    parameters = plain.parameters(students)

    def loss():
        with torch.no_grad():
            goal = model.logits(teacher, tokens, rotations).float()
        fake = [
            {**w, **{name: q() for name, q in student.items()}}
            for w, student in zip(teacher, students, strict=True)
        ]
        return plain.jsd(model.logits(fake, tokens, rotations).float(), goal)

    return parameters, loss


def measure(args, parameters, loss):
    """Seconds of each step but the first, which compiles and allocates, and the peak of the device."""
    fused = args.device.startswith("cuda")
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0, fused=fused)
    loss = torch.compile(loss) if args.mode == "compiled" else loss
    bf16 = args.dtype == "bf16" and args.step == "distill"
    kind = args.device.split(":")[0]
    times = []
    for _ in range(args.repeat + 1):
        wait(args.device)
        start = time.perf_counter()
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=bf16):
            value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        value.item()
        wait(args.device)
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if fused else None
    return {"seconds": statistics.median(times[1:]), "fastest": min(times[1:]), "first": times[0],
            "device_bytes": peak}


def wait(device):
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def ceiling(args):
    """Operations a second of square products, by the type of their factors."""
    found = {}
    side = args.side
    for name, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = (torch.randn(side, side, device=args.device).to(dtype) for _ in range(2))
        times = []
        for _ in range(10):
            wait(args.device)
            start = time.perf_counter()
            c = a @ b
            wait(args.device)
            times.append(time.perf_counter() - start)
        del c
        found[name] = 2 * side**3 / min(times[2:])
    return {"flops": found, "side": side}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("step", choices=["block", "distill", "ceiling"])
    parser.add_argument("--config", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--mode", choices=["eager", "compiled"], default="eager")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--blocks", type=int, help="instead of the config's")
    parser.add_argument("--dtype", choices=["f32", "bf16"], default="bf16")
    parser.add_argument("--side", type=int, default=8192)
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.step == "ceiling":
        found = ceiling(args)
    else:
        model = Random(json.loads(args.config.read_text()), args.device, args.dtype, args.blocks)
        make = block_step if args.step == "block" else distill_step
        found = measure(args, *make(model, args))
    print(json.dumps({"torch": torch.__version__, **found}))


if __name__ == "__main__":
    main()
