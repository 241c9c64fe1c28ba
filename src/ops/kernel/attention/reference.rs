//! Attention by its definition, in f64 and one query at a time.

use super::super::sample::noise;
use super::{Shape, Tables, attention, attention_backward};

pub(super) struct Case {
    pub(super) shape: Shape,
    pub(super) q: Vec<f32>,
    pub(super) k: Vec<f32>,
    pub(super) v: Vec<f32>,
    pub(super) cos: Vec<f32>,
    pub(super) sin: Vec<f32>,
    pub(super) each: bool,
    pub(super) starts: Option<Vec<u32>>,
    pub(super) d_out: Vec<f32>,
}

impl Case {
    pub(super) fn new([batch, seq, heads, kv_heads, head_dim]: [usize; 5], size: f32) -> Self {
        let shape = Shape {
            batch,
            seq,
            heads,
            kv_heads,
            head_dim,
            neighbours: false,
            window: usize::MAX,
            scale: (head_dim as f32).powf(-0.5),
            cap: None,
        };
        let (wide, narrow) = (batch * seq * heads * head_dim, batch * seq * kv_heads * head_dim);
        let angle = |i: usize| (i / (head_dim / 2)) as f32 * 0.3 / (i % (head_dim / 2) + 1) as f32;
        Self {
            shape,
            q: noise(wide, 0.1, size),
            k: noise(narrow, 0.4, size),
            v: noise(narrow, 0.6, 1.0),
            cos: (0..seq * head_dim / 2).map(|i| angle(i).cos()).collect(),
            sin: (0..seq * head_dim / 2).map(|i| angle(i).sin()).collect(),
            each: false,
            starts: None,
            d_out: noise(wide, 0.8, 1.0),
        }
    }

    /// In each way that families differ: a window, a cap, neighbours, a part of each head, another
    /// scale; documents that sequences are packed with; at last all of them.
    pub(super) fn ways(shape: [usize; 5]) -> Vec<Self> {
        let way = |change: &dyn Fn(&mut Self)| {
            let mut case = Self::new(shape, 1.0);
            change(&mut case);
            case
        };
        let part = |case: &mut Self| {
            let pairs = case.shape.head_dim / 2;
            let kept = pairs.div_ceil(2);
            for table in [&mut case.cos, &mut case.sin] {
                *table = table.chunks(pairs).flat_map(|row| row[..kept].to_vec()).collect();
            }
        };
        let documents = |case: &mut Self| {
            let Shape { batch, seq, .. } = case.shape;
            let length = |b: usize| [5, 23, 64][b % 3];
            let start = |i: usize| (i % seq / length(i / seq) * length(i / seq)) as u32;
            case.starts = Some((0..batch * seq).map(start).collect());
            let pairs = case.cos.len() / seq;
            let place = |i: usize| i / pairs % seq - start(i / pairs) as usize;
            for table in [&mut case.cos, &mut case.sin] {
                *table =
                    (0..batch * seq * pairs).map(|i| table[place(i) * pairs + i % pairs]).collect();
            }
            case.each = true;
        };
        vec![
            way(&|_| ()),
            way(&|case| case.shape.window = 2),
            way(&|case| case.shape.window = 7),
            way(&|case| case.shape.window = 40),
            way(&|case| case.shape.cap = Some(1.5)),
            way(&|case| case.shape.neighbours = true),
            way(&|case| case.shape.scale = 0.7),
            way(&part),
            way(&documents),
            way(&|case| {
                part(case);
                documents(case);
                let Shape { window, cap, neighbours, scale, .. } = &mut case.shape;
                (*window, *cap, *neighbours, *scale) = (19, Some(2.0), true, 0.4);
            }),
        ]
    }

    /// out, log-sum-exp, dq, dk and dv.
    pub(super) fn run(&self) -> [Vec<f32>; 5] {
        let Self { shape, q, k, v, cos, sin, each, starts, d_out } = self;
        let tables = Tables { each: *each, cos, sin, starts: starts.as_deref() };
        let (mut out, mut dq) = (vec![f32::NAN; q.len()], vec![f32::NAN; q.len()]);
        let (mut dk, mut dv) = (vec![f32::NAN; k.len()], vec![f32::NAN; k.len()]);
        let sums = attention(shape, q, k, v, tables, &mut out);
        attention_backward(shape, d_out, q, k, v, tables, &out, &sums, &mut dq, &mut dk, &mut dv);
        [out, sums, dq, dk, dv]
    }

    /// What [`Case::run`] should give, in f64 and one query at a time.
    #[allow(clippy::many_single_char_names)] // the operands' own names
    pub(super) fn reference(&self) -> [Vec<f64>; 5] {
        let Shape { batch, seq, heads, kv_heads, head_dim, window, scale, cap, .. } = self.shape;
        let [q, k] = [&self.q, &self.k].map(|x| self.turned(&widen(x), 1.0));
        let (v, d_out) = (widen(&self.v), widen(&self.d_out));
        let scale = f64::from(scale);
        let cap = cap.map(f64::from);
        let capped = |score: f64| cap.map_or(score, |cap| cap * (score / cap).tanh());
        let [mut out, mut dq] = [(); 2].map(|()| vec![0.0; q.len()]);
        let [mut dk, mut dv] = [(); 2].map(|()| vec![0.0; k.len()]);
        let mut sums = vec![0.0; batch * heads * seq];
        for (row, sum) in sums.iter_mut().enumerate() {
            let (b, head, t) = (row / seq / heads, row / seq % heads, row % seq);
            let wide = ((b * seq + t) * heads + head) * head_dim;
            let narrow =
                |key: usize| ((b * seq + key) * kv_heads + head / (heads / kv_heads)) * head_dim;
            let dot = |a: &[f64], at: usize, b: &[f64], bt: usize| -> f64 {
                (0..head_dim).map(|i| a[at + i] * b[bt + i]).sum()
            };
            let start = self.starts.as_ref().map_or(0, |starts| starts[b * seq + t] as usize);
            let seen = (t + 1).saturating_sub(window).max(start)..t + 1;
            let score = |key| capped(scale * dot(&q, wide, &k, narrow(key)));
            let scores: Vec<f64> = seen.clone().map(score).collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            *sum = max + scores.iter().map(|s| (s - max).exp()).sum::<f64>().ln();
            let weights: Vec<f64> = scores.iter().map(|s| (s - *sum).exp()).collect();
            let slopes: Vec<f64> =
                seen.clone().map(|key| dot(&d_out, wide, &v, narrow(key))).collect();
            let mean: f64 = weights.iter().zip(&slopes).map(|(w, s)| w * s).sum();
            for (i, key) in seen.enumerate() {
                let (weight, score) = (weights[i], scores[i]);
                let slope = cap.map_or(1.0, |cap| 1.0 - (score / cap).powi(2));
                let d_score = weight * (slopes[i] - mean) * scale * slope;
                for i in 0..head_dim {
                    let at = narrow(key) + i;
                    out[wide + i] += weight * v[at];
                    dv[at] += weight * d_out[wide + i];
                    dq[wide + i] += d_score * k[at];
                    dk[at] += d_score * q[wide + i];
                }
            }
        }
        [out, sums, self.turned(&dq, -1.0), self.turned(&dk, -1.0), dv]
    }

    pub(super) fn turned(&self, x: &[f64], turn: f64) -> Vec<f64> {
        let Shape { batch, seq, head_dim, neighbours, .. } = self.shape;
        let sequences = if self.each { batch } else { 1 };
        let (half, width) = (self.cos.len() / seq / sequences, x.len() / batch / seq);
        let turned = |i: usize| {
            let (position, feature) = (i / width % seq, i % head_dim);
            if feature >= 2 * half {
                return x[i];
            }
            let (pair, first, step) = if neighbours {
                (feature / 2, feature % 2 == 0, 1)
            } else {
                (feature % half, feature < half, half)
            };
            let sequence = if self.each { i / width / seq } else { 0 };
            let angle = (sequence * seq + position) * half + pair;
            let (cos, sin) = (f64::from(self.cos[angle]), f64::from(self.sin[angle]) * turn);
            let sin_side = if first { -x[i + step] } else { x[i - step] };
            x[i] * cos + sin_side * sin
        };
        (0..x.len()).map(turned).collect()
    }
}

fn widen(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(*x)).collect()
}
