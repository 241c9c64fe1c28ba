//! What a decoder block does: matrix products, norm, gated activation, attention, and its error.

use burn::tensor::{Device, Tensor, TensorData};
use fewbit::ops::{self, Attending, Scores, Sight};
use proptest::prelude::*;

use crate::{Dice, Matrix, Outcome, Sum, alike, cases, close, length};

/// Sums of f32 products.
const TOLERANCE: f64 = 3e-6;

/// `A B` of `[rows, inner]` and `[inner, columns]`.
fn product(
    a: impl Fn(usize, usize) -> f64,
    b: impl Fn(usize, usize) -> f64,
    [rows, inner, columns]: [usize; 3],
) -> Vec<Sum> {
    let one = |i: usize| (0..inner).map(|j| a(i / columns, j) * b(j, i % columns)).collect();
    (0..rows * columns).map(one).collect()
}

/// What a product and its gradients have to be: `x`, `w` and the gradient of `x w`.
fn exact_product(
    x: &Matrix,
    w: impl Fn(usize, usize) -> f64 + Copy,
    g: &Matrix,
    transposed: bool,
) -> [Vec<Sum>; 3] {
    let ([rows, inputs], out) = (x.shape, g.shape[1]);
    let y = product(|i, j| x.at(i, j), w, [rows, inputs, out]);
    let of_x = product(|i, j| g.at(i, j), |i, j| w(j, i), [rows, out, inputs]);
    let of_w = if transposed {
        product(|i, j| g.at(j, i), |i, j| x.at(i, j), [out, rows, inputs])
    } else {
        product(|i, j| x.at(j, i), |i, j| g.at(i, j), [inputs, rows, out])
    };
    [y, of_x, of_w]
}

proptest! {
    #![proptest_config(cases(96))]

    /// The weight row-major or as a transposed view; a batch of one dimension or two.
    #[test]
    fn linears(
        [batch, seq] in [1usize..4, 1usize..20],
        inputs in length(),
        out in length(),
        transposed in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let mut dice = Dice::new(seed);
        let x = dice.matrix([batch * seq, inputs], 1.0);
        let shape = if transposed { [out, inputs] } else { [inputs, out] };
        let weight = dice.matrix(shape, 1.0);
        let g = dice.matrix([batch * seq, out], 1.0);
        let w = |i, j| if transposed { weight.at(j, i) } else { weight.at(i, j) };
        let [y, of_x, of_w] = exact_product(&x, w, &g, transposed);
        let view = |w: Tensor<2>| if transposed { w.transpose() } else { w };
        let leaves = [x, weight];
        let flat = Outcome::both(&leaves, &g.values, |[x, w]| ops::linear(x, view(w)));
        let deep = Outcome::both(&leaves, &g.values, |[x, w]| {
            ops::linear(x.reshape([batch, seq, inputs]), view(w))
        });
        for found in flat.into_iter().chain(deep) {
            close("output", &found.values, &y, TOLERANCE);
            close("of x", &found.gradients[0], &of_x, TOLERANCE);
            close("of the weight", &found.gradients[1], &of_w, TOLERANCE);
        }
    }

    #[test]
    fn products(m in length(), k in length(), n in length(), seed in any::<u64>()) {
        let mut dice = Dice::new(seed);
        let (left, right) = (dice.matrix([m, k], 1.0), dice.matrix([k, n], 1.0));
        let g = dice.matrix([m, n], 1.0);
        let [y, of_left, of_right] = exact_product(&left, |i, j| right.at(i, j), &g, false);
        let leaves = [left, right];
        for found in Outcome::both(&leaves, &g.values, |[a, b]| ops::matmul(a, b)) {
            close("product", &found.values, &y, TOLERANCE);
            close("of the left", &found.gradients[0], &of_left, TOLERANCE);
            close("of the right", &found.gradients[1], &of_right, TOLERANCE);
        }
    }

    #[test]
    fn norms(rows in 1usize..40, width in length(), seed in any::<u64>()) {
        const EPS: f64 = 1e-5;
        let mut dice = Dice::new(seed);
        let size = dice.one_of(&[1e-6, 1e-3, 1.0, 1e4]);
        let mut x = dice.matrix([rows, width], size);
        x.values[..width].iter_mut().for_each(|x| *x *= dice.one_of(&[0.0, 1.0, 100.0]));
        let (gain, g) = (dice.matrix([1, width], 1.0), dice.matrix([rows, width], 1.0));
        let (mut y, mut of_x) = (Vec::new(), Vec::new());
        let mut of_gain = vec![Sum::default(); width];
        for row in 0..rows {
            let square = (0..width).map(|i| x.at(row, i).powi(2)).sum::<f64>() / width as f64;
            let inverse = (square + EPS).sqrt().recip();
            let dot: Sum =
                (0..width).map(|i| g.at(row, i) * gain.at(0, i) * x.at(row, i)).collect();
            for (i, of_gain) in of_gain.iter_mut().enumerate() {
                let normalized = x.at(row, i) * inverse;
                y.push(Sum::from(normalized * gain.at(0, i)));
                of_gain.add(g.at(row, i) * normalized);
                let along = dot.times(-inverse.powi(2) / width as f64 * normalized);
                let straight = g.at(row, i) * gain.at(0, i) * inverse;
                let size = straight.abs() + along.size;
                of_x.push(Sum { value: straight + along.value, size });
            }
        }
        let found = Outcome::both(&[x, gain], &g.values, |[x, gain]| {
            ops::rms_norm(x, gain.reshape([width]), EPS)
        });
        for found in found {
            close("output", &found.values, &y, TOLERANCE);
            close("of x", &found.gradients[0], &of_x, TOLERANCE);
            close("of the gain", &found.gradients[1], &of_gain, TOLERANCE);
        }
    }

    #[test]
    fn gated_activations(rows in 1usize..40, width in length(), seed in any::<u64>()) {
        let mut dice = Dice::new(seed);
        let size = dice.one_of(&[0.1, 2.0, 12.0]);
        let inputs = [dice.matrix([rows, width], size), dice.matrix([rows, width], 2.0)];
        let upstream = dice.noise(rows * width, 1.0);
        let (mut values, mut gradients) = (Vec::new(), [Vec::new(), Vec::new()]);
        for (i, g) in upstream.iter().enumerate() {
            let [gate, up] = inputs.each_ref().map(|input| f64::from(input.values[i]));
            let g = f64::from(*g);
            let open = 1.0 / (1.0 + (-gate).exp());
            values.push(Sum::from(gate * open * up));
            let slope: Sum = [open, gate * open * (1.0 - open)].into_iter().collect();
            gradients[0].push(slope.times(g * up));
            gradients[1].push(Sum::from(g * gate * open));
        }
        for found in Outcome::both(&inputs, &upstream, |[gate, up]| ops::swiglu(gate, up)) {
            // The exponential of a gate far from zero carries the rounding of its argument.
            close("output", &found.values, &values, 1e-5);
            close("of the gate", &found.gradients[0], &gradients[0], 1e-5);
            close("of up", &found.gradients[1], &gradients[1], 1e-5);
        }
    }

    #[test]
    fn squared_errors(
        [batch, seq] in [1usize..4, 1usize..20],
        width in length(),
        sum_sequence in any::<bool>(),
        factor in prop::sample::select(vec![1.0f32, -3.0]),
        seed in any::<u64>(),
    ) {
        let mut dice = Dice::new(seed);
        let (output, target) =
            (dice.matrix([batch * seq, width], 1.0), dice.matrix([batch * seq, width], 1.0));
        let share = if sum_sequence { seq as f64 } else { 1.0 } / output.values.len() as f64;
        let both = output.values.iter().zip(&target.values);
        let gaps: Vec<f64> = both.map(|(a, b)| f64::from(*a) - f64::from(*b)).collect();
        let value = Sum::from(gaps.iter().map(|gap| gap * gap).sum::<f64>() * share);
        let gradient: Vec<Sum> = gaps
            .iter()
            .map(|gap| Sum::from(2.0 * share * f64::from(factor) * gap))
            .collect();
        let shape = [batch, seq, width];
        let found = Outcome::both(&[output], &[factor], |[output]| {
            let target = target.on(&output.device()).reshape(shape);
            ops::block_mse(output.reshape(shape), target, sum_sequence)
        });
        for found in found {
            close("value", &found.values, &[value], TOLERANCE);
            close("gradient", &found.gradients[0], &gradient, TOLERANCE);
        }
    }
}

// --- attention -----------------------------------------------------------------------------------

#[derive(Debug)]
pub(crate) struct AttentionCase {
    batch: usize,
    seq: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    /// Pairs of each head that are rotated.
    rotated: usize,
    /// q, k, v: a row for each position.
    pub(crate) inputs: [Matrix; 3],
    /// `[seq, head_dim / 2]`.
    angles: Matrix,
    upstream: Matrix,
}

impl AttentionCase {
    pub(crate) fn new([batch, seq, kv_heads, stack, half]: [usize; 5], seed: u64) -> Self {
        let mut dice = Dice::new(seed);
        let (heads, head_dim, rows) = (kv_heads * stack, 2 * half, batch * seq);
        let size = dice.one_of(&[0.3, 1.0, 2.0]);
        let mut one = |heads: usize| dice.matrix([rows, heads * head_dim], size);
        let inputs = [one(heads), one(kv_heads), one(kv_heads)];
        let angles = dice.matrix([seq, half], 3.0);
        let upstream = dice.matrix([rows, heads * head_dim], 1.0);
        Self { batch, seq, heads, kv_heads, head_dim, rotated: half, inputs, angles, upstream }
    }

    pub(crate) fn attending(&self, device: &Device, scores: Scores) -> Attending {
        let table = |f: fn(f32) -> f32| {
            let values: Vec<f32> = self.angles.values.iter().map(|x| f(*x)).collect();
            let shape = [1, 1, self.seq, self.head_dim / 2];
            let all = Tensor::<4>::from_data(TensorData::new(values, shape), device);
            // A part of each head may pass.
            all.narrow(3, 0, self.rotated)
        };
        let sizes = [0, self.seq, self.heads / self.kv_heads];
        let (cos, sin) = (table(f32::cos), table(f32::sin));
        let sight = Sight::new(sizes, scores.window, None);
        Attending { scores, cos, sin, query_factors: None, sight }
    }

    pub(crate) fn plain(&self) -> Scores {
        let head_dim = self.head_dim;
        Scores { head_dim, neighbours: false, window: None, scale: None, cap: None }
    }

    pub(crate) fn run(&self, inputs: [Tensor<2>; 3], scores: Scores) -> Tensor<3> {
        let attending = self.attending(&inputs[0].device(), scores);
        let [q, k, v] = inputs.map(|x| {
            let width = x.dims()[1];
            x.reshape([self.batch, self.seq, width])
        });
        ops::causal_attention(q, k, v, &attending)
    }

    /// A head's row, rotated by the angles of its position, or back.
    fn rotate(&self, x: &[f64], position: usize, back: bool) -> Vec<f64> {
        let half = self.head_dim / 2;
        let one = |i: usize| {
            let angle = self.angles.values[position * half + i % half];
            let (cos, sin) = (f64::from(angle.cos()), f64::from(angle.sin()));
            let sin = if (i < half) == back { sin } else { -sin };
            x[i] * cos + x[(i + half) % self.head_dim] * sin
        };
        (0..self.head_dim).map(one).collect()
    }

    /// Output, and the gradients of q, k and v.
    fn exact(&self) -> [Vec<f64>; 4] {
        let Self { batch, seq, heads, kv_heads, head_dim: width, .. } = *self;
        let [q, k, v] = &self.inputs;
        let mut all = [q, q, k, v].map(|like| vec![0.0; like.values.len()]);
        let scale = (width as f64).powf(-0.5);
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let add = |to: &mut [f64], factor: f64, what: &[f64]| {
            to.iter_mut().zip(what).for_each(|(to, what)| *to += factor * what);
        };
        for (sequence, head) in (0..batch).flat_map(|b| (0..heads).map(move |h| (b, h))) {
            let kv = head / (heads / kv_heads);
            // Where the head's part of a position lies.
            let of_q = |t: usize| ((sequence * seq + t) * heads + head) * width;
            let of_k = |t: usize| ((sequence * seq + t) * kv_heads + kv) * width;
            let part = |x: &Matrix, at: usize| -> Vec<f64> {
                x.values[at..at + width].iter().map(|x| f64::from(*x)).collect()
            };
            for t in 0..seq {
                let query = self.rotate(&part(q, of_q(t)), t, false);
                let key = |s: usize| self.rotate(&part(k, of_k(s)), s, false);
                let scores: Vec<f64> = (0..=t).map(|s| scale * dot(&query, &key(s))).collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let total: f64 = scores.iter().map(|s| (s - max).exp()).sum();
                let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp() / total).collect();
                let g = part(&self.upstream, of_q(t));
                let slopes: Vec<f64> = (0..=t).map(|s| dot(&g, &part(v, of_k(s)))).collect();
                let mean = dot(&weights, &slopes);
                for (s, (weight, slope)) in weights.iter().zip(&slopes).enumerate() {
                    add(&mut all[0][of_q(t)..][..width], *weight, &part(v, of_k(s)));
                    let through = scale * weight * (slope - mean);
                    let to_query = self.rotate(&key(s), t, true);
                    add(&mut all[1][of_q(t)..][..width], through, &to_query);
                    let to_key = self.rotate(&query, s, true);
                    add(&mut all[2][of_k(s)..][..width], through, &to_key);
                    add(&mut all[3][of_k(s)..][..width], *weight, &g);
                }
            }
        }
        all
    }
}

proptest! {
    #![proptest_config(cases(96))]

    #[test]
    fn attention(
        sizes in [1usize..3, 1usize..40, 1usize..4, 1usize..4, 1usize..10],
        seed in any::<u64>(),
    ) {
        let case = AttentionCase::new(sizes, seed);
        let exact = case.exact().map(alike);
        for found in Outcome::both(&case.inputs, &case.upstream.values, |inputs| case.run(inputs, case.plain())) {
            close("output", &found.values, &exact[0], 1e-5);
            for (i, name) in ["of q", "of k", "of v"].iter().enumerate() {
                close(name, &found.gradients[i], &exact[i + 1], 1e-5);
            }
        }
    }

    /// Windows, caps, neighbours, scales and heads of which a part is rotated: one answer in both forms.
    #[test]
    fn attention_of_other_families(
        sizes in [1usize..3, 1usize..40, 1usize..4, 1usize..4, 1usize..10],
        window in proptest::option::of(1usize..20),
        cap in proptest::option::of(0.5f64..4.0),
        scale in proptest::option::of(0.1f64..2.0),
        neighbours in any::<bool>(),
        part in 1usize..10,
        seed in any::<u64>(),
    ) {
        let mut case = AttentionCase::new(sizes, seed);
        case.rotated = part.min(case.head_dim / 2);
        let scores = Scores { window, cap, scale, neighbours, ..case.plain() };
        let upstream = &case.upstream.values;
        let [a, b] = Outcome::both(&case.inputs, upstream, |inputs| case.run(inputs, scores));
        let wide = |x: &[f32]| alike(x.iter().map(|x| f64::from(*x)).collect());
        close("output", &a.values, &wide(&b.values), 1e-5);
        for (i, name) in ["of q", "of k", "of v"].iter().enumerate() {
            // Where a gradient is a difference of products that cancel, their rounding is left of it.
            close(name, &a.gradients[i], &wide(&b.gradients[i]), 1e-4);
        }
    }
}

#[test]
fn long_attention() {
    // More than a tile of queries, and enough work for two threads.
    let case = AttentionCase::new([1, 150, 2, 2, 16], 5);
    let exact = case.exact().map(alike);
    for found in
        Outcome::both(&case.inputs, &case.upstream.values, |inputs| case.run(inputs, case.plain()))
    {
        close("output", &found.values, &exact[0], 1e-5);
        for (i, name) in ["of q", "of k", "of v"].iter().enumerate() {
            close(name, &found.gradients[i], &exact[i + 1], 1e-5);
        }
    }
}
