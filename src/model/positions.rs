//! A run of positions: rotations, masks and rows of a learned table, for each kind of attention.

use burn::tensor::{DType, Device, Int, Tensor, TensorData};

use super::arch::{ModelConfig, Span};
use crate::ops::{Attending, Scores};

/// Rotations and masks of one run of positions.
#[derive(Clone, Debug)]
pub struct Positions {
    /// One for each of the description's spans.
    spans: Vec<Attending>,
    /// Rows of a learned table, `[1, seq]`.
    rows: Option<Tensor<2, Int>>,
    len: usize,
}

impl Positions {
    /// Positions `past..past + seq`, attending to `0..past + seq`.
    pub fn new(
        config: &ModelConfig,
        past: usize,
        seq: usize,
        dtype: DType,
        device: &Device,
    ) -> Self {
        let run = Run { config, past, seq, dtype, device };
        let rows = config.arch.positions.as_ref().map(|table| {
            let row = |position: usize| ((position + table.offset) as u32).cast_signed();
            let ids: Vec<i32> = (past..past + seq).map(row).collect();
            Tensor::from_data(TensorData::new(ids, [1, seq]), device)
        });
        Self {
            spans: config.arch.spans.iter().map(|span| run.span(span)).collect(),
            rows,
            len: seq,
        }
    }

    /// Number of positions.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What block `index` attends by.
    pub(super) fn of_block(&self, config: &ModelConfig, index: usize) -> &Attending {
        &self.spans[config.arch.span_of.get(index).copied().unwrap_or(0)]
    }

    /// Rows of a learned table, `[1, seq]`.
    pub(super) fn rows(&self) -> Option<Tensor<2, Int>> {
        self.rows.clone()
    }
}

struct Run<'a> {
    config: &'a ModelConfig,
    past: usize,
    seq: usize,
    dtype: DType,
    device: &'a Device,
}

impl Run<'_> {
    fn span(&self, span: &Span) -> Attending {
        let (config, past, seq) = (self.config, self.past, self.seq);
        // Without rotation one pair is turned by nothing.
        let (frequencies, size) = match &span.rope {
            Some(rope) => (rope.inverse_frequencies(past + seq), rope.attention_factor()),
            None => (vec![0.0], 1.0),
        };
        let shape = [1, 1, seq, frequencies.len()];
        let table = |f: fn(f64) -> f64| {
            let values: Vec<f32> = (past..past + seq)
                .flat_map(|position| {
                    let angle = move |w: &f32| f64::from(position as f32 * w);
                    frequencies.iter().map(move |w| (size * f(angle(w))) as f32)
                })
                .collect();
            Tensor::<4>::from_data(TensorData::new(values, shape), self.device).cast(self.dtype)
        };
        Attending {
            scores: Scores {
                head_dim: config.head_dim,
                neighbours: span.rope.as_ref().is_some_and(|rope| rope.neighbours),
                window: span.window,
                scale: config.arch.attention_scale,
                cap: config.arch.score_cap,
            },
            cos: table(f64::cos),
            sin: table(f64::sin),
            query_factors: self.query_factors(),
            mask: self.mask(span.window),
        }
    }

    fn mask(&self, window: Option<usize>) -> Tensor<4> {
        let copies = self.config.n_heads / self.config.n_kv_heads;
        let (rows, total) = (copies * self.seq, self.past + self.seq);
        let window = window.unwrap_or(usize::MAX);
        let mask: Vec<f32> = (0..rows)
            .flat_map(|row| {
                let live = self.past + row % self.seq + 1;
                let seen = live.saturating_sub(window)..live;
                (0..total).map(move |key| if seen.contains(&key) { 0.0 } else { f32::NEG_INFINITY })
            })
            .collect();
        let mask = TensorData::new(mask, [1, 1, rows, total]);
        Tensor::<4>::from_data(mask, self.device).cast(self.dtype)
    }

    fn query_factors(&self) -> Option<Tensor<3>> {
        let scaling = self.config.arch.query_scaling?;
        let factor = |position: usize| {
            (1.0 + scaling.beta * (1.0 + (position as f64 / scaling.original).floor()).ln()) as f32
        };
        let factors: Vec<f32> = (self.past..self.past + self.seq).map(factor).collect();
        let factors = TensorData::new(factors, [1, self.seq, 1]);
        Some(Tensor::<3>::from_data(factors, self.device).cast(self.dtype))
    }
}
