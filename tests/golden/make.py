"""Writes the golden cases beside this file: `python make.py [case ...]` (all without arguments).

Every case is written from its formula with PyTorch on the CPU, in f32 on one thread. Training runs,
losses and the gradients of `flexround` are computed in f64 too and must agree, and a seed is skipped
where a value sits close enough to a rounding tie for f32 noise to move it. README.md lists the tensors.
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


def seq_gradients(w, step, upstream):
    out = {"w": w, "step": step, "upstream": upstream}
    for name, factor in (("plain", 1.0), ("scaled", 1 / math.sqrt(w.numel()))):
        p = leaves({"w": w, "step": step}, torch.float32)
        w_hat = Seq.apply(p["w"], p["step"], factor)
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


# -------------------------------------------------------------------------------------------------

CASES = (rtn, mse_clip, flexround, seq, jsd, adamw_cosine)


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
