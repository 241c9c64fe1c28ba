//! A run of positions: rotations, masks and rows of a learned table, for each kind of attention.

use std::sync::Arc;

use burn::tensor::{DType, Device, Int, Tensor, TensorData};

use super::arch::{ModelConfig, Span};
use crate::ops::{Attending, Forest, Scores, Sight};

/// Rotations and masks of one run of positions.
#[derive(Clone, Debug)]
pub struct Positions {
    /// One for each of the description's spans.
    spans: Vec<Attending>,
    /// Rows of a learned table, `[1 or batch, seq]`.
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
        Run { config, past, seq, starts: None, dtype, device }.positions()
    }

    /// As [`Positions::new`] for sequences with documents of their own: each token counts its position
    /// from the start of its document and sees nothing before that.
    ///
    /// `starts` are places in the sequence, the cached ones included, `[batch, seq]`: not falling along
    /// a sequence, and none behind its token.
    pub fn with_starts(
        config: &ModelConfig,
        past: usize,
        starts: &[&[u32]],
        dtype: DType,
        device: &Device,
    ) -> Self {
        let seq = starts.first().map_or(0, |row| row.len());
        let starts = Some(Arc::new(starts.concat()));
        Run { config, past, seq, starts, dtype, device }.positions()
    }

    /// Positions of sequences that share their beginnings, packed into one of `forest.len` tokens.
    pub fn of_forest(
        config: &ModelConfig,
        forest: &Arc<Forest>,
        dtype: DType,
        device: &Device,
    ) -> Self {
        let run = Run { config, past: 0, seq: forest.len, starts: None, dtype, device };
        run.positions_at(&[forest.depths()], Some(forest))
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

    /// Rows of a learned table, `[1 or batch, seq]`.
    pub(super) fn rows(&self) -> Option<Tensor<2, Int>> {
        self.rows.clone()
    }
}

struct Run<'a> {
    config: &'a ModelConfig,
    past: usize,
    seq: usize,
    /// `[batch, seq]`.
    starts: Option<Arc<Vec<u32>>>,
    dtype: DType,
    device: &'a Device,
}

impl Run<'_> {
    fn positions(&self) -> Positions {
        self.positions_at(&self.sequences(), None)
    }

    /// Of tokens at these positions in their sequences, `[1 or batch, seq]`.
    fn positions_at(&self, sequences: &[Vec<usize>], forest: Option<&Arc<Forest>>) -> Positions {
        let rows = self.config.arch.positions.as_ref().map(|table| {
            let row = |position: usize| ((position + table.offset) as u32).cast_signed();
            let ids: Vec<i32> = sequences.iter().flatten().copied().map(row).collect();
            Tensor::from_data(TensorData::new(ids, [sequences.len(), self.seq]), self.device)
        });
        let spans = self.config.arch.spans.iter();
        let spans = spans.map(|span| self.span(span, sequences, forest)).collect();
        Positions { spans, rows, len: self.seq }
    }

    /// The position of each token of each sequence, counted from its document; one sequence where all
    /// are alike.
    fn sequences(&self) -> Vec<Vec<usize>> {
        let places = self.past..self.past + self.seq;
        let Some(starts) = &self.starts else { return vec![places.collect()] };
        let from = |starts: &[u32]| {
            places.clone().zip(starts).map(|(place, start)| place - *start as usize).collect()
        };
        starts.chunks(self.seq.max(1)).map(from).collect()
    }

    fn span(
        &self,
        span: &Span,
        sequences: &[Vec<usize>],
        forest: Option<&Arc<Forest>>,
    ) -> Attending {
        let Self { config, past, seq, .. } = *self;
        let copies = config.n_heads / config.n_kv_heads;
        let half = span.rope.as_ref().map_or(1, |rope| rope.dims / 2);
        let [mut cos, mut sin] = [(); 2].map(|()| Vec::with_capacity(sequences.len() * seq * half));
        for positions in sequences {
            let total = positions.iter().max().map_or(0, |last| last + 1);
            // Without rotation one pair is turned by nothing.
            let (frequencies, size) = match &span.rope {
                Some(rope) => (rope.inverse_frequencies(total), rope.attention_factor()),
                None => (vec![0.0], 1.0),
            };
            for position in positions {
                let angles = frequencies.iter().map(|w| f64::from(*position as f32 * w));
                let turned =
                    angles.map(|angle| [angle.cos(), angle.sin()].map(|x| (size * x) as f32));
                for [x, y] in turned {
                    cos.push(x);
                    sin.push(y);
                }
            }
        }
        let table = |values: Vec<f32>| {
            let shape = [sequences.len(), 1, seq, half];
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
            cos: table(cos),
            sin: table(sin),
            query_factors: self.query_factors(sequences),
            sight: match forest {
                Some(forest) => Sight::of_forest(Arc::clone(forest), copies, span.window),
                None => Sight::new([past, seq, copies], span.window, self.starts.clone()),
            },
        }
    }

    fn query_factors(&self, sequences: &[Vec<usize>]) -> Option<Tensor<3>> {
        let scaling = self.config.arch.query_scaling?;
        let factor = |position: &usize| {
            (1.0 + scaling.beta * (1.0 + (*position as f64 / scaling.original).floor()).ln()) as f32
        };
        let factors: Vec<f32> = sequences.iter().flatten().map(factor).collect();
        let factors = TensorData::new(factors, [sequences.len(), self.seq, 1]);
        Some(Tensor::<3>::from_data(factors, self.device).cast(self.dtype))
    }
}
