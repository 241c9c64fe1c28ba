"""Writes the golden cases beside this file: `python make.py [case ...]` (all without arguments).

Every case is written from its formula with PyTorch on the CPU, in f32 on one thread. Training runs,
losses and gradients (but for those of `seq`) are computed in f64 too and must agree, and a seed is
skipped where a value sits close enough to a rounding tie for f32 noise to move it. README.md lists
the tensors.
"""

import math
import sys
from pathlib import Path

import numpy
import safetensors
import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
MIN_SCALE = 1e-8  # floor of every step
TIE_MARGIN = 1e-4  # how far a value must be from k + 1/2
DRIFT = 2e-6  # allowed difference between the f32 and the f64 run


class Unusable(Exception):
    """This seed gives a value near a tie, a run that f32 noise moves, or a case that tests little."""


def first_good(build, seed):
    """The result of `build(generator)` for the first seed from `seed` on that is usable."""
    for offset in range(100_000):
        try:
            return build(torch.Generator().manual_seed(seed + offset))
        except Unusable:
            continue
    raise RuntimeError(f"no usable seed from {seed} on")


def randn(generator, *shape):
    return torch.randn(*shape, generator=generator)


def away_from_ties(v, margin=TIE_MARGIN):
    if ((v.detach() - torch.floor(v.detach()) - 0.5).abs() < margin).any():
        raise Unusable


def agree(single, double, tolerance=DRIFT):
    """f32 and f64 results, compared relative to the larger of 1 and the largest magnitude."""
    limit = tolerance * max(1.0, double.abs().max().item())
    if (single.double() - double).abs().max().item() > limit:
        raise Unusable


def ste_round(x):
    return x + (torch.round(x) - x).detach()


def clamp(x, low, high):
    """Clamp whose gradient is 1 on the bounds too; that of `Tensor.clamp` is 0 there in this torch."""
    return torch.where(x < low, low, torch.where(x > high, high, x))


# --- rtn -----------------------------------------------------------------------------------------


def asymmetric(w, bits, zero_in_range):
    """Min-max step and zero point of each row of `w`."""
    lo, hi = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    if zero_in_range:
        lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    return step_and_zero(lo, hi, bits, zero_in_range)


def step_and_zero(lo, hi, bits, clamp_zero=True):
    levels = 2**bits - 1
    scale = ((hi - lo) / levels).clamp(min=MIN_SCALE)
    zero = torch.round(-lo / scale) + 0.0
    return scale, zero.clamp(0, levels) if clamp_zero else zero


def symmetric(w, bits, scheme):
    largest = w.abs().amax(1, keepdim=True)
    top = (2**bits - 1) / 2 if scheme == "full_range" else 2 ** (bits - 1) - 1
    scale = (largest / top).clamp(min=MIN_SCALE)
    return scale, torch.zeros_like(scale)


def code_range(bits, is_symmetric):
    half = 2 ** (bits - 1)
    return (-half, half - 1) if is_symmetric else (0, 2**bits - 1)


def quantize(w, scale, zero, bounds):
    codes = (torch.round(w / scale) + zero).clamp(*bounds)
    return codes, scale * (codes - zero)


RTN_BITS = (2, 3, 4, 8)
RTN_GROUPS = {"row": 32, "g8": 8}
RTN_SCHEMES = ("asym", "asym_free", "full_range", "absmax")


def rtn_params(w, bits, scheme):
    if scheme.startswith("asym"):
        return asymmetric(w, bits, scheme == "asym")
    return symmetric(w, bits, scheme)


def rtn_row(kind):
    def build(generator):
        row = randn(generator, 32) * 0.4
        if kind == "outliers":
            row[torch.tensor([3, 20])] *= 6
        elif kind == "zero":
            row = torch.zeros(32)
        elif kind == "positive":
            row = row.abs() + 0.05
        elif kind == "negative":
            row = -row.abs() - 0.05
        elif kind == "constant":
            row = row.abs().amax().expand(32).clone()
        for bits in RTN_BITS:
            for size in RTN_GROUPS.values():
                for scheme in RTN_SCHEMES:
                    check_rtn(row.reshape(-1, size), bits, scheme)
        return row

    return build


def check_rtn(w, bits, scheme):
    scale, _ = rtn_params(w, bits, scheme)
    v = w / scale
    if scheme == "full_range":
        # The largest magnitude is a tie by construction: keep rows where f32 hits it exactly.
        extreme = (w.abs() == w.abs().amax(1, keepdim=True)) & (w != 0)
        if (v[extreme].abs() != (2**bits - 1) / 2).any():
            raise Unusable
        v = v[~extreme]
    away_from_ties(v)
    if scheme.startswith("asym"):
        away_from_ties(w.amin(1) / scale.squeeze(1))


def rtn():
    kinds = ("outliers", "zero", "positive", "negative", "constant", "gauss")
    w = torch.stack([first_good(rtn_row(kind), 100_000 * i) for i, kind in enumerate(kinds)])
    out = {"w": w}
    for bits in RTN_BITS:
        for group, size in RTN_GROUPS.items():
            for scheme in RTN_SCHEMES:
                rows = w.reshape(-1, size)
                scale, zero = rtn_params(rows, bits, scheme)
                bounds = code_range(bits, not scheme.startswith("asym"))
                codes, dequantized = quantize(rows, scale, zero, bounds)
                name = f"b{bits}_{group}_{scheme}"
                out[f"{name}/scale"] = scale.reshape(6, -1)
                out[f"{name}/codes"] = codes.reshape(6, 32)
                out[f"{name}/dequantized"] = dequantized.reshape(6, 32)
                if scheme.startswith("asym"):
                    out[f"{name}/zero_point"] = zero.reshape(6, -1)
    return out


# --- mse_clip ------------------------------------------------------------------------------------

POWER = 2.4
STEPS = 100


def clip_candidates(row, bits):
    """`(lo, hi)` of every candidate interval, in search order."""
    levels = 2**bits - 1
    lo, hi = row.min(), row.max()
    for i in range(1, STEPS + 1):
        if lo >= 0:
            yield torch.zeros(()), hi * i / STEPS
        elif hi <= 0:
            yield lo * i / STEPS, torch.zeros(())
        else:
            width = (hi - lo) * i / STEPS
            step = width / levels
            for z in range(levels + 1):
                yield -z * step, width - z * step


def clip_search(row, bits):
    ends = torch.stack([torch.stack(ends) for ends in clip_candidates(row, bits)])
    lo, hi = ends[:, :1].clamp(max=0), ends[:, 1:].clamp(min=0)
    scale, zero = step_and_zero(lo, hi, bits)
    codes, dequantized = quantize(row, scale, zero, code_range(bits, False))
    errors = ((row - dequantized).abs() ** POWER).mean(1)
    best = min(range(len(errors)), key=lambda i: errors[i].item())  # the first of equals
    precise = ((row.double() - dequantized.double()).abs() ** POWER).mean(1)
    others = torch.cat([precise[:best], precise[best + 1 :]])
    if precise[best] > 0 and others.min() < precise[best] * (1 + 1e-4):
        raise Unusable
    away_from_ties(row / scale[best])
    return scale[best], zero[best], codes[best], dequantized[best], errors[best].reshape(1)


def clip_row(kind):
    def build(generator):
        row = randn(generator, 32) * 0.4
        if kind == "outliers":
            row[torch.tensor([5, 11])] *= 5
        elif kind == "zero":
            row = torch.zeros(32)
        elif kind == "positive":
            row = row.abs() + 0.01
        elif kind == "negative":
            row = -row.abs() - 0.01
        elif kind == "shifted":
            row = row + 0.3
        return row, [clip_search(row, bits) for bits in (2, 3, 4)]

    return build


def mse_clip():
    kinds = ("gauss", "outliers", "positive", "negative", "zero", "shifted")
    rows = [first_good(clip_row(kind), 1_000_000 + 1000 * i) for i, kind in enumerate(kinds)]
    out = {"w": torch.stack([row for row, _ in rows])}
    for b, bits in enumerate((2, 3, 4)):
        for k, what in enumerate(("scale", "zero_point", "codes", "dequantized", "error")):
            out[f"b{bits}/{what}"] = torch.stack([found[b][k] for _, found in rows])
    return out


# --- flexround -----------------------------------------------------------------------------------

FLEX_BITS = 3
LEARNED = ("log_scale", "log_division", "log_row")


def flex_forward(w, p, zero, bounds):
    """`(w_hat, v)`; shapes `[groups, size]` and `[groups, 1]`."""
    v = w / torch.exp(p["log_scale"] + p["log_division"] + p["log_row"])
    away_from_ties(v)
    q = clamp(ste_round(v) + zero, *bounds) - zero
    return torch.exp(p["log_scale"]) * q, v


def leaves(start, dtype):
    return {k: t.to(dtype).clone().requires_grad_() for k, t in start.items()}


def flex_gradients(w, start, zero, bounds, upstream, dtype):
    p = leaves(start, dtype)
    w_hat, v = flex_forward(w.to(dtype), p, zero.to(dtype), bounds)
    (upstream.to(dtype).reshape(w.shape) * w_hat).sum().backward()
    return w_hat.detach(), v.detach(), {k: t.grad for k, t in p.items()}


def flex_by_formula(start, zero, bounds, upstream, v):
    """The gradients written out, without autograd."""
    rounded = torch.round(v) + zero
    inside = ((rounded >= bounds[0]) & (rounded <= bounds[1])).to(v.dtype)
    q = rounded.clamp(*bounds) - zero
    step = torch.exp(start["log_scale"].to(v.dtype))
    per_weight = -upstream * step * v * inside
    per_step = (upstream * step * (q - v * inside)).sum(1, keepdim=True)
    return {
        "log_scale": per_step,
        "log_division": per_weight,
        "log_row": per_weight.sum(1, keepdim=True),
    }


def flex_train(w, start, zero, bounds, x, shape, dtype):
    p = leaves(start, dtype)
    x, w, zero = x.to(dtype), w.to(dtype), zero.to(dtype)
    target = x @ w.reshape(shape).T
    optimizer = torch.optim.Adam(p.values(), lr=1e-2, betas=(0.9, 0.999), eps=1e-8)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = ((x @ flex_forward(w, p, zero, bounds)[0].reshape(shape).T - target) ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    final = {k: t.detach() for k, t in p.items()}
    return {**final, "losses": torch.stack(losses), "w_hat": flex_forward(w, final, zero, bounds)[0]}


def flex_config(size, is_symmetric):
    def build(generator):
        shape = (5, 16)
        w = (randn(generator, *shape) * 0.4).reshape(-1, size)
        upstream, x = randn(generator, *shape), randn(generator, 12, 16)
        scale, zero = (
            symmetric(w, FLEX_BITS, "absmax") if is_symmetric else asymmetric(w, FLEX_BITS, True)
        )
        bounds = code_range(FLEX_BITS, is_symmetric)
        start = {
            "log_scale": torch.log(scale),
            "log_division": 0.1 * randn(generator, *w.shape),
            "log_row": 0.1 * randn(generator, len(w), 1),
        }
        w_hat, v, grads = flex_gradients(w, start, zero, bounds, upstream, torch.float32)
        _, v64, grads64 = flex_gradients(w, start, zero, bounds, upstream, torch.float64)
        formula = flex_by_formula(start, zero, bounds, upstream.double().reshape(w.shape), v64)
        for k in LEARNED:
            agree(grads[k], grads64[k])
            assert torch.allclose(grads64[k], formula[k], rtol=1e-12, atol=1e-12), k
        if (grads["log_division"] == 0).sum() < 2:
            raise Unusable  # too few saturated weights to test
        trained = flex_train(w, start, zero, bounds, x, shape, torch.float32)
        for k, t in flex_train(w, start, zero, bounds, x, shape, torch.float64).items():
            agree(trained[k], t)
        out = {"w": w, "x": x, "upstream": upstream, "zero_point": zero, "w_hat": w_hat}
        out["codes"] = (torch.round(v) + zero).clamp(*bounds)
        out |= start | {f"grad_{k}": t for k, t in grads.items()}
        out |= {f"trained_{k}": t for k, t in trained.items()}
        whole = ("x", "upstream", "trained_losses")
        return {k: t if k in whole else t.reshape(5, -1) for k, t in out.items()}

    return build


def flexround():
    configs = {"channel": 16, "group": 8}
    out = {}
    for name, size in configs.items():
        for kind in ("asym", "sym"):
            seed = 2_000_000 + 10_000 * len(out)
            tensors = first_good(flex_config(size, kind == "sym"), seed)
            out |= {f"{name}_{kind}/{k}": t for k, t in tensors.items()}
    return out


# --- seq -----------------------------------------------------------------------------------------

CLIP = 0.99


class Seq(torch.autograd.Function):
    """Two-bit levels ±1/4 and ±3/4 of the step, with the step gradient of learned step sizes."""

    @staticmethod
    def forward(ctx, w, step, factor):
        v = w / step
        position = 2 * v.clamp(-CLIP, CLIP) - 0.5
        away_from_ties(position)
        if ((v.abs() - CLIP).abs() < TIE_MARGIN).any():
            raise Unusable
        level = (torch.round(position) + 0.5) / 2
        ctx.save_for_backward(v, level)
        ctx.factor = factor
        return step * level

    @staticmethod
    def backward(ctx, upstream):
        v, level = ctx.saved_tensors
        inside = (v.abs() <= CLIP).to(v.dtype)
        # Outside the clip `level` already is the extreme ±3/4.
        per_step = (upstream * (level - v * inside)).sum(1, keepdim=True)
        return upstream * inside, ctx.factor * per_step, None


def seq_gradients(w, step, upstream, op=Seq):
    out = {"w": w, "step": step, "upstream": upstream}
    for name, factor in (("plain", 1.0), ("scaled", 1 / math.sqrt(w.numel()))):
        p = leaves({"w": w, "step": step}, torch.float32)
        w_hat = op.apply(p["w"], p["step"], factor)
        (upstream * w_hat).sum().backward()
        out |= {"w_hat": w_hat.detach(), "grad_w": p["w"].grad}
        out[f"grad_step_{name}"] = p["step"].grad
    return out


def seq_train(w, step, x, factor, dtype):
    p = leaves({"w": w, "step": step}, dtype)
    x, target = x.to(dtype), x.to(dtype) @ w.to(dtype).T
    optimizer = torch.optim.AdamW(
        p.values(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
    )
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = ((x @ Seq.apply(p["w"], p["step"], factor).T - target) ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    final = {k: t.detach() for k, t in p.items()}
    w_hat = Seq.apply(final["w"], final["step"], factor)
    return {**final, "w_hat": w_hat, "losses": torch.stack(losses)}


def seq_rows(generator):
    w = randn(generator, 5, 16) * 0.3
    largest = w.abs().amax(1, keepdim=True)
    step = largest * (0.6 + 0.5 * torch.rand(5, 1, generator=generator))
    out = {f"rows/{k}": t for k, t in seq_gradients(w, step, randn(generator, 5, 16)).items()}
    x = randn(generator, 12, 16)
    out |= {"train/w": w, "train/step": largest, "train/x": x}
    for name, factor in (("plain", 1.0), ("scaled", 1 / math.sqrt(w.numel()))):
        trained = seq_train(w, largest, x, factor, torch.float32)
        for k, t in seq_train(w, largest, x, factor, torch.float64).items():
            agree(trained[k], t)
        out |= {f"trained_{name}/{k}": t for k, t in trained.items()}
    return out


def seq():
    w = torch.tensor([[-1.0, -0.4, -0.1, 0.1, 0.6, 0.8]])
    hand = seq_gradients(w, torch.ones(1, 1), torch.ones_like(w))
    expected = torch.tensor([[-0.75, -0.25, -0.25, 0.25, 0.75, 0.75]])
    assert torch.equal(hand["w_hat"], expected)
    assert abs(hand["grad_step_plain"].item() + 0.5) < 1e-6
    assert abs(hand["grad_step_scaled"].item() + 0.204124) < 1e-6
    return {f"hand/{k}": t for k, t in hand.items()} | first_good(seq_rows, 3_000_000)


# --- jsd -----------------------------------------------------------------------------------------


def log_probs(logits, temperature):
    return torch.log_softmax(logits / temperature, -1)


def kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def jsd_tokens(student, teacher, beta, temperature):
    log_p, log_q = log_probs(teacher, temperature), log_probs(student, temperature)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def forward_kl(student, teacher, temperature):
    return kl(log_probs(teacher, temperature), log_probs(student, temperature))


def reverse_kl(student, teacher, temperature):
    return kl(log_probs(student, temperature), log_probs(teacher, temperature))


def label_loss(student, labels):
    return -log_probs(student, 1.0).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def loss_and_grad(per_token, student, mask):
    """Mean over the positions where `mask` is 1, and its gradient; checked against f64."""
    results = []
    for dtype in (torch.float32, torch.float64):
        logits = student.to(dtype).clone().requires_grad_()
        loss = (per_token(logits) * mask.to(dtype)).sum() / mask.to(dtype).sum()
        loss.backward()
        results.append((loss.detach().reshape(1), logits.grad))
    for single, double in zip(*results):
        agree(single, double)
    return dict(zip(("loss", "grad"), results[0]))


def divergences(student, teacher, mask, temperature):
    def run(per_token, *args):
        return loss_and_grad(
            lambda s: per_token(s, teacher.to(s.dtype), *args, temperature), student, mask
        )

    out = {f"jsd_b{round(100 * b):02}": run(jsd_tokens, b) for b in (0.1, 0.5, 0.9)}
    return out | {"forward_kl": run(forward_kl), "reverse_kl": run(reverse_kl)}


def large_logits(generator):
    signs = torch.randint(0, 2, (2, 7, 33), generator=generator) * 2.0 - 1
    logits = 200 * signs + randn(generator, 2, 7, 33)
    logits[0, 1] = -200.0  # one certain token
    return logits


def jsd():
    jsd_by_hand()
    g = torch.Generator().manual_seed(4_000_000)
    student, teacher = 2 * randn(g, 2, 7, 33), 2 * randn(g, 2, 7, 33)
    mask = torch.ones(2, 7)
    mask[0, 0] = mask[1, 5] = mask[1, 6] = 0
    labels = torch.randint(0, 33, (2, 7), generator=g)
    large_student, large_teacher = large_logits(g), large_logits(g)
    large_student[0, 1, 4] = large_teacher[0, 1, 9] = 200.0  # certain, and of different tokens
    out = {"student": student, "teacher": teacher, "mask": mask, "labels": labels.float()}
    out |= {"large_student": large_student, "large_teacher": large_teacher}
    found = {}
    for t in (1, 2):
        for k, v in divergences(student, teacher, mask, float(t)).items():
            found[f"{k}_t{t}"] = v
    for k, v in divergences(large_student, large_teacher, mask, 1.0).items():
        found[f"large_{k}"] = v
    found["cross_entropy"] = loss_and_grad(lambda s: label_loss(s, labels), student, mask)
    found["large_cross_entropy"] = loss_and_grad(
        lambda s: label_loss(s, labels), large_student, mask
    )
    # Position t predicts label t + 1; the last position predicts nothing.
    found["next_token"] = loss_and_grad(
        lambda s: label_loss(s[:, :-1], labels[:, 1:]), student, torch.ones(2, 6)
    )
    return out | {f"{k}/{what}": t for k, v in found.items() for what, t in v.items()}


def jsd_by_hand():
    teacher, student = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()
    for beta, value in ((0.5, 0.101749), (0.1, 0.043074), (0.9, 0.033603)):
        assert abs(jsd_tokens(student, teacher, beta, 1.0).item() - value) < 1e-6
    assert abs(forward_kl(student, teacher, 1.0).item() - 0.510826) < 1e-6
    assert abs(reverse_kl(student, teacher, 1.0).item() - 0.368064) < 1e-6


# --- adamw_cosine --------------------------------------------------------------------------------


def adamw_run(start, grads, dtype):
    p = leaves(start, dtype)
    optimizer = torch.optim.AdamW(
        p.values(), lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20, eta_min=0.0)
    steps = {k: [] for k in (*start, "lr", "norm")}
    for i in range(20):
        for k, t in p.items():
            t.grad = grads[k][i].to(dtype).clone()
        norm = torch.nn.utils.clip_grad_norm_(p.values(), max_norm=1.0)
        steps["norm"].append(norm.detach())
        steps["lr"].append(torch.tensor(optimizer.param_groups[0]["lr"], dtype=dtype))
        optimizer.step()
        schedule.step()
        for k, t in p.items():
            steps[k].append(t.detach().clone())
    return {k: torch.stack(v) for k, v in steps.items()}


def adamw_cosine():
    def build(g):
        start = {"a": randn(g, 4, 8), "b": randn(g, 4, 1)}
        # Sizes from 0.02 to 0.6 an entry: some steps are clipped and some are not.
        sizes = torch.logspace(math.log10(0.02), math.log10(0.6), 20)
        sizes = sizes[torch.randperm(20, generator=g)].reshape(20, 1, 1)
        grads = {"a": sizes * randn(g, 20, 4, 8), "b": sizes * randn(g, 20, 4, 1)}
        after = adamw_run(start, grads, torch.float32)
        for k, t in adamw_run(start, grads, torch.float64).items():
            agree(after[k], t)
        assert 3 <= (after["norm"] > 1).sum() <= 17
        out = {f"start/{k}": t for k, t in start.items()}
        out |= {f"grads/{k}": t for k, t in grads.items()}
        out |= {f"after/{k}": after[k] for k in start}
        return out | {"lr": after["lr"], "norm": after["norm"]}

    return first_good(build, 5_000_000)


# --- shared by the cases below -------------------------------------------------------------------

SHAPE = (5, 16)
GROUPS = {"channel": 1, "group": 2}  # groups per row


def clamp_ste(x, low, high):
    """Clamp with the gradient 1 everywhere."""
    return x + (x.clamp(low, high) - x).detach()


def per_group(t, w):
    """One value per group `[rows, groups]`, repeated for every weight of its group."""
    return t.repeat_interleave(w.shape[1] // t.shape[1], 1)


def group_extremes(w, groups):
    """Smallest and largest weight of each group, `[rows, groups]` both."""
    cut = w.reshape(len(w), groups, -1)
    return cut.amin(2), cut.amax(2)


def away_from(x, bound, margin=TIE_MARGIN):
    if ((x.detach() - bound).abs() < margin).any():
        raise Unusable


def some_in_each_group(clipped, groups):
    """A gradient that only clipped weights feed is a sum that cancels to 0 (or to noise, which Adam
    turns into full steps) in a group without any: keep such groups out."""
    if not clipped.reshape(len(clipped), groups, -1).any(2).all():
        raise Unusable


def cast(tensors, dtype):
    return {k: t.to(dtype) for k, t in tensors.items()}


def checked(run):
    """`run(dtype)` in f32, which must agree with f64."""
    single, double = run(torch.float32), run(torch.float64)
    for k, t in double.items():
        agree(single[k], t)
    return single


def at_point(forward, start, fixed, upstream, dtype, result="w_hat"):
    """Everything `forward` returns, and the gradients of sum(upstream * result)."""
    p = leaves(start, dtype)
    out = forward(p | cast(fixed, dtype))
    (upstream.to(dtype) * out[result]).sum().backward()
    found = {k: t.detach() for k, t in out.items()}
    return found | {f"grad_{k}": t.grad for k, t in p.items()}


def reconstruction(forward, p, fixed, x, target):
    return ((x @ forward(p | fixed)["w_hat"].T - target) ** 2).mean()


def train(forward, start, fixed, rates, x, dtype):
    """20 steps of Adam, one learning rate per parameter, towards the layer's own first outputs."""
    p, fixed, x = leaves(start, dtype), cast(fixed, dtype), x.to(dtype)
    target = x @ (start | fixed)["w"].to(dtype).T
    groups = [{"params": [p[k]], "lr": rate} for k, rate in rates.items()]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.999), eps=1e-8)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = reconstruction(forward, p, fixed, x, target)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    final = {k: t.detach() for k, t in p.items()}
    w_hat = forward(final | fixed)["w_hat"]
    return {**final, "losses": torch.stack(losses), "w_hat": w_hat}


def learned(forward, start, fixed, rates, generator, trainer=train):
    """All tensors of one configuration."""
    upstream, x = randn(generator, *SHAPE), randn(generator, 12, SHAPE[1])
    out = start | fixed | {"upstream": upstream, "x": x}
    out |= checked(lambda dtype: at_point(forward, start, fixed, upstream, dtype))
    trained = checked(lambda dtype: trainer(forward, start, fixed, rates, x, dtype))
    return out | {f"trained_{k}": t for k, t in trained.items()}


def grouped_case(configs, seed):
    """`configs`: name to `build(generator)`; the tensors of all, with the name in front."""
    out = {}
    for i, (name, build) in enumerate(configs.items()):
        tensors = first_good(build, seed + 10_000 * i)
        out |= {f"{name}/{k}": t for k, t in tensors.items()}
    return out


def assert_close(found, expected, tolerance=1e-6):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert (found.detach().double() - expected).abs().max() < tolerance, (found, expected)


# --- lrq -----------------------------------------------------------------------------------------

LRQ_BITS = 3
LRQ_RANK = 3


def lrq_forward(bounds):
    def forward(p):
        w, low_rank = p["w"], p["log_left"] @ p["log_right"]
        log_scale, zero = per_group(p["log_scale"], w), per_group(p["zero_point"], w)
        v = w / torch.exp(log_scale + (low_rank + p["log_row"] + p["log_column"]))
        away_from_ties(v)
        codes = clamp(ste_round(v) + zero, *bounds)
        return {"w_hat": torch.exp(log_scale) * (codes - zero), "codes": codes}

    return forward


def lrq_by_formula(start, fixed, bounds, upstream):
    """The gradients written out, in f64."""
    p = cast(start | fixed, torch.float64)
    w, upstream = p["w"], upstream.double()
    step, zero = per_group(p["log_scale"], w).exp(), per_group(p["zero_point"], w)
    v = w / step / torch.exp(p["log_left"] @ p["log_right"] + p["log_row"] + p["log_column"])
    rounded = torch.round(v) + zero
    inside = (rounded >= bounds[0]) & (rounded <= bounds[1])
    theta = -upstream * step * v * inside
    per_weight = theta + upstream * step * (rounded.clamp(*bounds) - zero)
    return {
        "log_scale": per_weight.reshape(*p["log_scale"].shape, -1).sum(2),
        "log_left": theta @ p["log_right"].T,
        "log_right": p["log_left"].T @ theta,
        "log_row": theta.sum(1, keepdim=True),
        "log_column": theta.sum(0, keepdim=True),
    }


def lrq_config(groups, is_symmetric, at_start=False):
    def build(generator):
        w = randn(generator, *SHAPE) * 0.4
        rows = w.reshape(len(w) * groups, -1)
        scale, zero = rtn_params(rows, LRQ_BITS, "absmax" if is_symmetric else "asym")
        bounds = code_range(LRQ_BITS, is_symmetric)
        noise = 0.0 if at_start else 1.0
        right = torch.rand(LRQ_RANK, SHAPE[1], generator=generator) * 2 - 1
        start = {
            "log_scale": torch.log(scale).reshape(-1, groups),
            "log_left": noise * 0.2 * randn(generator, SHAPE[0], LRQ_RANK) + 0.0,
            "log_right": right / math.sqrt(SHAPE[1]) * (1 + noise),
            "log_row": noise * 0.1 * randn(generator, SHAPE[0], 1) + 0.0,
            "log_column": noise * 0.1 * randn(generator, 1, SHAPE[1]) + 0.0,
        }
        fixed = {"w": w, "zero_point": zero.reshape(-1, groups)}
        rates = dict.fromkeys(start, 1e-2)
        out = learned(lrq_forward(bounds), start, fixed, rates, generator)
        for k, t in lrq_by_formula(start, fixed, bounds, out["upstream"]).items():
            agree(out[f"grad_{k}"], t)
        rounded = out["codes"] == quantize(rows, scale, zero, bounds)[0].reshape(SHAPE)
        if at_start:
            assert rounded.all() and (out["grad_log_right"] == 0).all()
        elif rounded.sum() > 72:
            raise Unusable  # the learned part hardly changes a code
        return out

    return build


def lrq():
    lrq_by_hand()
    configs = {
        "channel_asym": lrq_config(1, False),
        "channel_sym": lrq_config(1, True),
        "group_asym": lrq_config(2, False),
        "start": lrq_config(1, False, at_start=True),
    }
    return grouped_case(configs, 6_000_000)


def lrq_by_hand():
    found = lrq_forward((-8, 7))({
        "w": torch.tensor([[0.6, -0.9], [0.2, 0.4]]),
        "log_scale": torch.full((2, 1), 0.5).log(),
        "zero_point": torch.zeros(2, 1),
        "log_left": torch.tensor([[-0.3], [0.2]]),
        "log_right": torch.tensor([[1.0, -1.0]]),
        "log_row": torch.tensor([[0.0], [0.1]]),
        "log_column": torch.zeros(1, 2),
    })
    assert_close(found["w_hat"], [[1.0, -0.5], [0.0, 0.5]])


# --- uniquanf ------------------------------------------------------------------------------------


def all_signs(planes, dtype):
    """`[2^planes, planes]`: row `code` holds +1 where the code has the column's bit, else -1."""
    codes = torch.arange(2**planes).unsqueeze(1)
    return ((codes >> torch.arange(planes)) & 1).to(dtype) * 2 - 1


def uniquanf_parts(p):
    """Step, scaled weight `v`, level, signs, code and the filter of every weight."""
    w, planes = p["w"], p["alpha"].shape[1]
    step = per_group(p["log_scale"], w).exp()
    exponent = per_group(p["log_scale"], w) + p["log_division"] + per_group(p["log_row"], w)
    v = w / torch.exp(exponent)
    center = per_group(p["zero_binary"], w) + (2**planes - 1) / 2
    u = v + per_group(p["zero_unified"], w) - center
    alpha = p["alpha"].reshape(len(w), -1, planes)
    alpha = alpha.repeat_interleave(w.shape[1] // alpha.shape[1], 1)
    choices = all_signs(planes, w.dtype)
    distances = (u.unsqueeze(2) - alpha @ choices.T).abs().detach()
    nearest = distances.sort(2).values
    if (nearest[..., 1] - nearest[..., 0] < TIE_MARGIN * u.detach().abs().clamp(min=1)).any():
        raise Unusable
    code = distances.argmin(2)
    signs = choices[code]
    limit = alpha.detach().abs().amin(2)
    away_from(nearest[..., 0] - limit, 0.0)
    keep = (nearest[..., 0] <= limit).to(w.dtype)
    return step, v, u, (alpha * signs).sum(2), center, signs, code, keep


def uniquanf_forward(p):
    step, _, u, level, center, _, code, keep = uniquanf_parts(p)
    # The value is the level; its gradient goes to `u` (1) and to alpha (the signs) where kept.
    level = level.detach() + keep * ((u - u.detach()) + (level - level.detach()))
    w_hat = step * (level + center - per_group(p["zero_unified"], p["w"]))
    return {"w_hat": w_hat, "codes": code, "kept": keep}


def uniquanf_by_formula(start, fixed, upstream):
    """The gradients written out, in f64."""
    p = cast(start | fixed, torch.float64)
    step, v, _, level, center, signs, _, keep = uniquanf_parts(p)
    outer = upstream.double() * step
    inner = outer * keep
    shape = (*p["log_scale"].shape, -1)
    bar = level + center - per_group(p["zero_unified"], p["w"])
    per_plane = (inner.unsqueeze(2) * signs).reshape(len(p["alpha"]), -1, signs.shape[2])
    return {
        "log_scale": (outer * bar - inner * v).reshape(shape).sum(2),
        "log_division": -inner * v,
        "log_row": (-inner * v).reshape(shape).sum(2),
        "alpha": per_plane.sum(1),
    }


def fold(p):
    """Level spacings and offset in the units of the weights."""
    center = (2 ** p["alpha"].shape[1] - 1) / 2
    step = p["log_scale"].exp()
    return {
        "folded_alpha": step.reshape(-1, 1) * p["alpha"],
        "folded_offset": step * (p["zero_binary"] + center - p["zero_unified"]),
    }


def uniquanf_config(planes, groups):
    def build(generator):
        w = randn(generator, *SHAPE) * 0.4
        lo, hi = group_extremes(w, groups)
        step = 0.8 * (hi - lo) / (2**planes - 1)
        uniform = 2.0 ** (planes - 2 - torch.arange(planes).float())
        start = {
            "log_scale": torch.log(step),
            "log_division": 0.1 * randn(generator, *SHAPE),
            "log_row": 0.1 * randn(generator, *step.shape),
            "alpha": uniform * (1 + 0.1 * randn(generator, step.numel(), planes)),
        }
        fixed = {
            "w": w,
            "zero_unified": -lo / step,
            "zero_binary": 0.1 * randn(generator, *step.shape),
        }
        rates = dict.fromkeys(start, 1e-2) | {"alpha": 1e-3}
        out = learned(uniquanf_forward, start, fixed, rates, generator)
        for k, t in uniquanf_by_formula(start, fixed, out["upstream"]).items():
            agree(out[f"grad_{k}"], t)
        if not 4 <= (out["kept"] == 0).sum() <= 40:
            raise Unusable  # too few filtered, or too few kept
        out |= fold(start | fixed)
        folded = out["folded_alpha"].reshape(len(w), groups, 1, planes)
        signs = all_signs(planes, w.dtype)[out["codes"]].reshape(len(w), groups, -1, planes)
        folded = (folded * signs).sum(3) + out["folded_offset"].unsqueeze(2)
        assert_close(folded.reshape(SHAPE), out["w_hat"])
        return out

    return build


def uniquanf():
    by_hand = fold({
        "log_scale": torch.full((1, 1), 0.2).log(),
        "alpha": torch.tensor([[2.0, 1.0, 0.5]]),
        "zero_unified": torch.full((1, 1), 4.0),
        "zero_binary": torch.zeros(1, 1),
    })
    assert_close(by_hand["folded_alpha"], [[0.4, 0.2, 0.1]])
    assert_close(by_hand["folded_offset"], [[-0.1]])
    configs = {
        f"k{planes}_{name}": uniquanf_config(planes, groups)
        for planes in (2, 3)
        for name, groups in GROUPS.items()
    }
    return grouped_case(configs, 7_000_000)


# --- block_ap ------------------------------------------------------------------------------------


def block_ap_forward(bits, every_group_clips=True):
    top = 2**bits - 1

    def forward(p):
        w, step = p["w"], per_group(p["step"], p["w"])
        away_from_ties(p["zero"])
        zero_point = clamp_ste(ste_round(p["zero"]), 0, top)
        zero, v = per_group(zero_point, w), w / step
        away_from_ties(v)
        free = ste_round(v) + zero
        if every_group_clips:
            some_in_each_group((free < 0) | (free > top), p["step"].shape[1])
        codes = clamp(free, 0, top)
        return {"w_hat": (codes - zero) * step, "codes": codes, "zero_point": zero_point}

    return forward


def block_ap_config(bits, groups):
    def build(generator):
        w = 1.2 * randn(generator, *SHAPE)
        lo, hi = group_extremes(w, groups)
        step = 0.55 * (hi - lo) / (2**bits - 1)
        zero = -lo / step * 0.6 + 0.3 * randn(generator, *step.shape)
        zero[0, 0] = -0.8  # rounds to -1, which the clamp raises to 0
        start = {"w": w, "step": step, "zero": zero}
        rates = {"w": 1e-3, "step": 1e-2, "zero": 1e-2}
        return learned(block_ap_forward(bits), start, {}, rates, generator)

    return build


def block_ap():
    # Four groups of one weight: the gradients of each by itself.
    start = {"w": torch.tensor([[-1.4, -0.2, 0.3, 0.9]]), "step": torch.full((1, 4), 0.5)}
    start["zero"] = torch.full((1, 4), 2.0)
    forward = block_ap_forward(2, every_group_clips=False)
    hand = at_point(forward, start, {}, torch.ones(1, 4), torch.float32)
    assert_close(hand["w_hat"], [[-1.0, 0.0, 0.5, 0.5]])
    assert_close(hand["grad_w"], [[0.0, 1.0, 1.0, 0.0]])
    assert_close(hand["grad_step"], [[-2.0, 0.4, 0.4, 1.0]])
    assert_close(hand["grad_zero"], [[-0.5, 0.0, 0.0, -0.5]])
    configs = {
        f"b{bits}_{name}": block_ap_config(bits, groups)
        for bits in (2, 3)
        for name, groups in GROUPS.items()
    }
    return grouped_case(configs, 8_000_000)


# --- lsq -----------------------------------------------------------------------------------------

LSQ_RANGE = (-4, 3)


def lsq_forward(low, high):
    def forward(p):
        w, step = p["w"], per_group(p["step"], p["w"])
        shift = per_group(p["shift"], w) if "shift" in p else torch.zeros_like(w)
        v = (w - shift) / step
        away_from_ties(v)
        away_from(v, low)
        away_from(v, high)
        if "shift" in p:
            some_in_each_group((v < low) | (v > high), p["step"].shape[1])
        codes = ste_round(clamp(v, low, high))
        return {"w_hat": step * codes + shift, "codes": codes - low}

    return forward


def lsq_config(groups, has_shift):
    def build(generator):
        w = 0.8 * randn(generator, *SHAPE)
        lo, hi = group_extremes(w, groups)
        largest = torch.maximum(-lo, hi)
        low, high = LSQ_RANGE
        step = largest / high * (0.45 + 0.25 * torch.rand(*largest.shape, generator=generator))
        start = {"w": w, "step": step}
        if has_shift:
            start["shift"] = 0.1 * randn(generator, *step.shape)
        rates = dict.fromkeys(start, 1e-2) | {"w": 1e-3}
        out = learned(lsq_forward(low, high), start, {}, rates, generator)
        plain = out.pop("grad_step")
        factor = 1 / math.sqrt(w.numel() * high)
        return out | {"grad_step_plain": plain, "grad_step_scaled": factor * plain}

    return build


def lsq():
    start = {"w": torch.tensor([[-1.3, -0.4, 0.2, 0.9]]), "step": torch.full((1, 1), 0.5)}
    hand = at_point(lsq_forward(-2, 1), start, {}, torch.ones(1, 4), torch.float32)
    assert_close(hand["w_hat"], [[-1.0, -0.5, 0.0, 0.5]])
    assert_close(hand["grad_step"], [[-1.6]])
    configs = {
        name + suffix: lsq_config(groups, bool(suffix))
        for suffix in ("", "_plus")
        for name, groups in GROUPS.items()
    }
    return grouped_case(configs, 9_000_000)


# --- ternary and sign ----------------------------------------------------------------------------


class Ternary(torch.autograd.Function):
    """Levels 0 and ±2/3 of the step; clip and gradients as in `Seq`."""

    @staticmethod
    def forward(ctx, w, step, factor):
        v = w / step
        position = 1.5 * v.clamp(-CLIP, CLIP)
        away_from_ties(position)
        away_from(v.abs(), CLIP)
        level = torch.round(position) / 1.5
        ctx.save_for_backward(v, level)
        ctx.factor = factor
        return step * level

    # Outside the clip the level already is the extreme ±2/3.
    backward = Seq.backward


class Sign(torch.autograd.Function):
    """Levels ± the step; 0 counts as positive."""

    @staticmethod
    def forward(ctx, w, step, factor):
        v = w / step
        away_from(v[v != 0], 0.0)
        away_from(v.abs(), 1.0)
        sign = torch.where(v >= 0, 1.0, -1.0).to(w.dtype)
        ctx.save_for_backward(v, sign)
        ctx.factor = factor
        return step * sign

    @staticmethod
    def backward(ctx, upstream):
        v, sign = ctx.saved_tensors
        inside = (v.abs() <= 1).to(v.dtype)
        per_step = (upstream * sign).sum(1, keepdim=True)
        return upstream * inside, ctx.factor * per_step, None


def few_levels(op, hand_w, first_step, spread):
    """The tensors of `seq` for another grid, with the run on the unscaled gradient only.
    `first_step(w)` is the usual start; the `rows` have random multiples of it."""

    def forward(p):
        return {"w_hat": op.apply(p["w"], p["step"], 1.0)}

    def build(generator):
        w = randn(generator, *SHAPE) * 0.3
        usual = first_step(w)
        step = usual * (0.6 + spread * torch.rand(*usual.shape, generator=generator))
        found = seq_gradients(w, step, randn(generator, *SHAPE), op)
        point = checked(
            lambda dtype: at_point(forward, {"w": w, "step": step}, {}, found["upstream"], dtype)
        )
        assert torch.equal(point["grad_step"], found["grad_step_plain"])
        start = {"w": w, "step": usual}
        x, rates = randn(generator, 12, SHAPE[1]), {"w": 1e-3, "step": 1e-2}
        trained = checked(lambda dtype: train(forward, start, {}, rates, x, dtype))
        out = {f"rows/{k}": t for k, t in found.items()}
        out |= {"train/w": w, "train/step": usual, "train/x": x}
        return out | {f"trained_plain/{k}": t for k, t in trained.items()}

    hand_w = torch.tensor([hand_w])
    hand = seq_gradients(hand_w, torch.ones(1, 1), torch.ones_like(hand_w), op)
    return {f"hand/{k}": t for k, t in hand.items()}, build


def ternary():
    def largest(w):
        return w.abs().amax(1, keepdim=True)

    hand, build = few_levels(Ternary, [-1.0, -0.4, -0.1, 0.1, 0.6, 0.8], largest, 0.5)
    assert_close(hand["hand/w_hat"], [[-2 / 3, -2 / 3, 0.0, 0.0, 2 / 3, 2 / 3]])
    assert_close(hand["hand/grad_w"], [[0.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
    assert_close(hand["hand/grad_step_plain"], [[-1.0]])
    return hand | first_good(build, 10_000_000)


def sign():
    def mean(w):
        return w.abs().mean(1, keepdim=True)

    hand, build = few_levels(Sign, [-1.5, -0.4, 0.0, 0.1, 0.6, 1.2], mean, 0.8)
    assert_close(hand["hand/w_hat"], [[-1.0, -1.0, 1.0, 1.0, 1.0, 1.0]])
    assert_close(hand["hand/grad_w"], [[0.0, 1.0, 1.0, 1.0, 1.0, 0.0]])
    assert_close(hand["hand/grad_step_plain"], [[2.0]])
    return hand | first_good(build, 11_000_000)


# --- lwc -----------------------------------------------------------------------------------------

LWC_FLOOR = 1e-5


def lwc_forward(bits):
    top = 2**bits - 1

    def forward(p):
        lo, hi = group_extremes(p["w"], p["clip_high"].shape[1])
        high, low = torch.sigmoid(p["clip_high"]) * hi, torch.sigmoid(p["clip_low"]) * lo
        step = ((high - low) / top).clamp(min=LWC_FLOOR)
        away_from_ties(low / step)
        zero_point = torch.round(-low / step).detach() + 0.0
        h, zero = per_group(step, p["w"]), per_group(zero_point, p["w"])
        v = p["w"] / h
        away_from_ties(v)
        codes = clamp(ste_round(v) + zero, 0, top)
        return {"w_hat": (codes - zero) * h, "codes": codes, "step": step, "zero_point": zero_point}

    return forward


def lwc_config(groups):
    def build(generator):
        w = 0.4 * randn(generator, *SHAPE)
        w[0] = w[0].abs() + 0.3  # one-sided: its zero points are negative
        shape = (SHAPE[0], groups)
        start = {
            "clip_high": 4 + 0.5 * randn(generator, *shape),
            "clip_low": 4 + 0.5 * randn(generator, *shape),
        }
        rates = dict.fromkeys(start, 1e-2)
        out = learned(lwc_forward(3), start, {"w": w}, rates, generator)
        free = torch.round(w / per_group(out["step"], w)) + per_group(out["zero_point"], w)
        if ((free < 0) | (free > 7)).sum() < 2:
            raise Unusable  # too few saturated weights to test
        return out

    return build


def lwc():
    found = lwc_forward(2)({
        "w": torch.tensor([[-0.9, -0.2, 0.3, 0.6]]),
        "clip_high": torch.full((1, 1), 4.0),
        "clip_low": torch.full((1, 1), 4.0),
    })
    assert_close(found["w_hat"], [[-0.982014, 0.0, 0.491007, 0.491007]])
    configs = {name: lwc_config(groups) for name, groups in GROUPS.items()}
    return grouped_case(configs, 12_000_000)


# --- signround -----------------------------------------------------------------------------------

SIGNROUND_BITS = 4
SIGNROUND_LIMITS = {"rounding": (-0.5, 0.5), "max_factor": (0, 1), "min_factor": (0, 1)}


def signround_forward(p):
    top = 2**SIGNROUND_BITS - 1
    lo, hi = group_extremes(p["w"], p["max_factor"].shape[1])
    high, low = hi.clamp(min=0) * p["max_factor"], lo.clamp(max=0) * p["min_factor"]
    scale = (high - low) / top
    away_from_ties(low / scale)
    zero_point = clamp_ste(ste_round(-low / scale), 0, top)
    step, zero = per_group(scale, p["w"]), per_group(zero_point, p["w"])
    v = p["w"] / step + p["rounding"]
    away_from_ties(v)
    codes = clamp(ste_round(v) + zero, 0, top)
    found = {"w_hat": (codes - zero) * step, "codes": codes}
    return found | {"scale": scale, "zero_point": zero_point}


def sign_descent(forward, start, fixed, rates, x, dtype):
    """20 steps along the signs of the gradients; each rate falls linearly."""
    p, fixed, x = leaves(start, dtype), cast(fixed, dtype), x.to(dtype)
    target = x @ fixed["w"].T
    losses = []
    for i in range(20):
        loss = reconstruction(forward, p, fixed, x, target)
        losses.append(loss.detach())
        for (k, t), grad in zip(p.items(), torch.autograd.grad(loss, list(p.values()))):
            size = grad.abs()
            if ((size > 0) & (size < 1e-4 * size.max())).any():
                raise Unusable  # a sign that noise could turn
            with torch.no_grad():
                t.sub_(rates[k] * (1 - i / 20) * torch.sign(grad)).clamp_(*SIGNROUND_LIMITS[k])
    final = {k: t.detach() for k, t in p.items()}
    w_hat = forward(final | fixed)["w_hat"]
    return {**final, "losses": torch.stack(losses), "w_hat": w_hat}


def signround_config(groups):
    def build(generator):
        shape = (SHAPE[0], groups)
        start = {
            "rounding": 0.96 * (torch.rand(*SHAPE, generator=generator) - 0.5),
            "max_factor": 1 - 0.3 * torch.rand(*shape, generator=generator),
            "min_factor": 1 - 0.3 * torch.rand(*shape, generator=generator),
        }
        start["max_factor"][0, 0] = start["min_factor"][1, 0] = 1.0
        fixed = {"w": 0.4 * randn(generator, *SHAPE)}
        rates = dict.fromkeys(start, 5e-3)
        out = learned(signround_forward, start, fixed, rates, generator, sign_descent)
        if (out["grad_rounding"] == 0).sum() < 2:
            raise Unusable  # too few saturated weights to test
        for k, (low, high) in SIGNROUND_LIMITS.items():
            ends = out[f"trained_{k}"]
            if not ((ends == low) | (ends == high)).any():
                raise Unusable  # nothing ran into its limit
        return out

    return build


def signround():
    configs = {name: signround_config(groups) for name, groups in GROUPS.items()}
    return grouped_case(configs, 13_000_000)


# --- cakld ---------------------------------------------------------------------------------------


def cakld_tokens(student, teacher, gamma, temperature):
    reverse = reverse_kl(student, teacher, temperature)
    return gamma * reverse + (1 - gamma) * forward_kl(student, teacher, temperature)


def cakld():
    by_hand = cakld_tokens(torch.tensor([0.9, 0.1]).log(), torch.tensor([0.5, 0.5]).log(), 0.7, 1.0)
    assert_close(by_hand, 0.410893)
    g = torch.Generator().manual_seed(14_000_000)
    student, teacher = 2 * randn(g, 7, 11), 2 * randn(g, 7, 11)
    mask = torch.ones(7)
    mask[0] = mask[5] = 0
    out = {"student": student, "teacher": teacher, "mask": mask}
    for gamma in (0.0, 0.3, 0.7, 1.0):
        for t in (1, 2):
            found = loss_and_grad(
                lambda s: cakld_tokens(s, teacher.to(s.dtype), gamma, float(t)), student, mask
            )
            name = f"g{round(100 * gamma):02}_t{t}"
            out |= {f"{name}/{what}": value for what, value in found.items()}
    largest = log_probs(teacher, 1.0).exp().amax(-1)
    return out | {"confidence": ((largest * mask).sum() / mask.sum()).reshape(1)}


# --- act -----------------------------------------------------------------------------------------


def dynamic_tokens(x, bits):
    """Step and zero point from the extremes of each row, which need not enclose 0."""
    top = 2**bits - 1
    lo, hi = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    scale = ((hi - lo) / top).clamp(min=MIN_SCALE)
    away_from_ties(lo / scale)
    away_from_ties(x / scale)
    zero = torch.round(-lo / scale).clamp(0, top) + 0.0
    codes = torch.maximum(torch.minimum(torch.round(x / scale), top - zero), -zero) + zero
    return {
        "scale": scale,
        "zero_point": zero,
        "codes": codes,
        "x_hat": scale * (codes - zero),
    }


def static_tensor(bits):
    top = 2**bits - 1

    def forward(p):
        v = p["x"] / p["scale"]
        away_from_ties(v)
        away_from_ties(p["zero"])
        zero_point = clamp_ste(ste_round(p["zero"]), 0, top)
        codes = clamp(ste_round(v) + zero_point, 0, top)
        x_hat = (codes - zero_point) * p["scale"]
        return {"x_hat": x_hat, "codes": codes, "zero_point": zero_point}

    return forward


def act_tensors(generator):
    x = randn(generator, 6, 16)
    x[1, 3] *= 8  # an outlier
    x[2] = x[2].abs() + 0.2
    x[3] = -x[3].abs() - 0.2
    x[4] = 0.0
    upstream = randn(generator, 6, 16)
    out = {"x": x, "upstream": upstream}
    for bits in (8, 4):
        found = checked(lambda dtype: dynamic_tokens(x.to(dtype), bits))
        out |= {f"dynamic_b{bits}/{k}": t for k, t in found.items()}
    learned_parts = {
        "b8": (8, 3.0 / 255, 127.3),
        "b4": (4, 3.0 / 15, 6.7),
        "b4_below": (4, 3.0 / 15, -1.3),  # rounds to -1, which the clamp raises to 0
    }
    for name, (bits, scale, zero) in learned_parts.items():
        start = {"x": x, "scale": torch.tensor([scale]), "zero": torch.tensor([zero])}
        found = checked(
            lambda dtype: at_point(static_tensor(bits), start, {}, upstream, dtype, "x_hat")
        )
        found |= {"scale": start["scale"], "zero": start["zero"]}
        out |= {f"static_{name}/{k}": t for k, t in found.items()}
    return out


def act():
    return first_good(act_tensors, 15_000_000)


# -------------------------------------------------------------------------------------------------

CASES = (
    *(rtn, mse_clip, flexround, seq, jsd, adamw_cosine),
    *(lrq, uniquanf, block_ap, lsq, ternary, sign, lwc, signround, cakld, act),
)


def quantizers_by_hand():
    # 0.3 is half a step of `full_range`: f64 hits the tie, f32 falls just beside it.
    w = torch.tensor([[-0.9, -0.2, 0.3, 0.6]], dtype=torch.float64)
    expected = {
        "asym": [-1.0, 0.0, 0.5, 0.5],
        "full_range": [-1.2, 0.0, 0.0, 0.6],
        "absmax": [-0.9, 0.0, 0.0, 0.9],
    }
    for scheme, values in expected.items():
        params = rtn_params(w, 2, scheme)
        found = quantize(w, *params, code_range(2, scheme != "asym"))[1]
        assert torch.allclose(found, torch.tensor([values]).double()), scheme


def main():
    torch.set_num_threads(1)
    versions = f"torch {torch.__version__}, safetensors {safetensors.__version__}"
    print(f"{versions}, numpy {numpy.__version__}, python {sys.version.split()[0]}")
    quantizers_by_hand()
    wanted = sys.argv[1:] or [case.__name__ for case in CASES]
    for case in CASES:
        if case.__name__ not in wanted:
            continue
        tensors = {k: t.detach().float().contiguous().clone() for k, t in case().items()}
        assert all(torch.isfinite(t).all() for t in tensors.values())
        path = HERE / f"{case.__name__}.safetensors"
        save_file(tensors, path, metadata={"made_with": versions})
        path.chmod(0o644)
        print(f"{path.name}: {len(tensors)} tensors, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
