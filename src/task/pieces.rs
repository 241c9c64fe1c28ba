//! Windows that are read as a text is written: a first part in one pass, then a few tokens at a time against the
//! keys and values that are held.

use std::fmt;

use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::kind::Refused;
use crate::data::ScoredWindow;
use crate::error::{Error, Result};
use crate::model::{CausalLm, Forward, KvHeld, Positions};
use crate::stop::StopFlag;

/// How a window is read.
pub(super) struct Pieces {
    /// Tokens in the first pass.
    pub(super) prefill: usize,
    /// Tokens in each pass behind it.
    pub(super) piece: usize,
}

/// How windows were read in pieces, and what was held at the end of one.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Cached {
    /// Tokens that were read in one pass and do not count.
    pub prefill: usize,
    /// Tokens that were read together behind them.
    pub piece: usize,
    /// How keys and values were held.
    pub kv_cache: String,
    /// Bytes of a window's keys and values, all that belongs to them included.
    pub kv_bytes: u64,
    /// Bits of a number, on average.
    pub kv_bits: f64,
    /// The same by the size model (docs/generation.md); absent where they are held as computed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_bits_expected: Option<f64>,
}

impl Pieces {
    /// As a task's `prefill` and `piece` ask for it, or because keys and values are `held` in a way of their
    /// own; `None` where windows are read in one pass.
    pub(super) fn asked(
        [prefill, piece]: [Option<usize>; 2],
        held: bool,
        context: usize,
    ) -> Option<Self> {
        let asked = held || prefill.is_some() || piece.is_some();
        asked.then(|| Self { prefill: prefill.unwrap_or(context / 2), piece: piece.unwrap_or(1) })
    }

    /// Refuses sizes that make no sense for windows of `context` tokens.
    ///
    /// # Errors
    /// A usage error that names the key.
    pub(super) fn check(&self, context: usize, packed: Option<usize>) -> Result<(), Refused> {
        let refused = |key, what: String, fix: String| {
            Err(Refused { key, error: Error::usage(what).fix(fix) })
        };
        let Self { prefill, piece } = *self;
        if let Some(length) = packed {
            let what =
                format!("examples packed into windows of {length} tokens are not read in pieces");
            return refused("prefill", what, "leave prefill and piece out".to_owned());
        }
        if prefill == 0 || prefill + 1 >= context {
            let what = format!("prefill = {prefill} leaves nothing to count of {context} tokens");
            return refused("prefill", what, format!("prefill = {}", context / 2));
        }
        if piece == 0 {
            let what = "piece = 0 reads nothing".to_owned();
            return refused("piece", what, "piece = 1".to_owned());
        }
        Ok(())
    }

    /// How many of a window's tokens count: those that were predicted behind the first pass.
    pub(super) fn scored(&self, window: ScoredWindow, context: usize) -> usize {
        window.scored.min(context - 1 - self.prefill)
    }

    /// The final hidden states of windows, `[1, context, width]` each; `cached` is then of the last one.
    ///
    /// # Errors
    /// When the model is not in memory whole, or a signal came.
    pub(super) fn streams<'a>(
        &self,
        model: &(impl Forward + ?Sized),
        windows: impl Iterator<Item = &'a [u32]>,
        device: &Device,
        stop: &StopFlag,
        cached: &mut Option<Cached>,
    ) -> Result<Vec<Tensor<3>>> {
        let one = |tokens| {
            let (hidden, found) = self.stream(model, tokens, device, stop)?;
            *cached = Some(found);
            Ok(hidden)
        };
        windows.map(one).collect()
    }

    /// Those of one window, and what its caches held at its end.
    fn stream(
        &self,
        model: &(impl Forward + ?Sized),
        tokens: &[u32],
        device: &Device,
        stop: &StopFlag,
    ) -> Result<(Tensor<3>, Cached)> {
        let Some(model) = model.whole() else {
            return Err(Error::failed("a model that is read block by block is not read in pieces")
                .fix("leave prefill and piece out"));
        };
        let (config, dtype) = (&model.config, model.dtype());
        let (mut caches, mut parts, mut past) = (Vec::new(), Vec::new(), 0);
        while past < tokens.len() {
            stop.check()?;
            let len = if past == 0 { self.prefill } else { self.piece };
            let len = len.min(tokens.len() - past);
            if config.rotates_anew(past, past + len) {
                let what = "the rotations of this model change within the window";
                return Err(Error::preflight(what).fix("a shorter --context"));
            }
            let positions = Positions::new(config, past, len, dtype, device);
            let piece = CausalLm::tokens(&[&tokens[past..past + len]], device);
            parts.push(model.finish(model.go_on(piece, &positions, &mut caches)));
            past += len;
        }
        let held = KvHeld::of(&caches);
        let setting = model.kv;
        let found = Cached {
            prefill: self.prefill,
            piece: self.piece,
            kv_cache: setting.map_or_else(|| "full".to_owned(), |setting| setting.to_string()),
            kv_bytes: held.bytes as u64,
            kv_bits: held.bits(),
            kv_bits_expected: setting.and_then(|setting| setting.expected_bits(config.head_dim)),
        };
        Ok((Tensor::cat(parts, 1), found))
    }
}

impl Cached {
    /// As entries of a protocol.
    pub(super) fn entries(&self) -> Map<String, Value> {
        match serde_json::to_value(self) {
            Ok(Value::Object(entries)) => entries,
            _ => Map::new(),
        }
    }

    /// What [`Cached::entries`] gave, among others.
    pub(super) fn of_entries(entries: &Map<String, Value>) -> Option<Self> {
        serde_json::from_value(Value::Object(entries.clone())).ok()
    }

    /// What has to stand beside a number, in words and in fewer.
    pub(super) fn marks(&self) -> [String; 2] {
        let Self { prefill, kv_cache, .. } = self;
        [format!("behind {prefill} tokens, keys and values {kv_cache}"), format!("kv {kv_cache}")]
    }
}

impl fmt::Display for Cached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { prefill, piece, kv_cache, kv_bytes, kv_bits, kv_bits_expected } = self;
        write!(
            f,
            "the first {prefill} in one pass and not counted, then {piece} at a time, keys and values {kv_cache}: \
             {:.2} MiB, {kv_bits:.2} bits a number",
            *kv_bytes as f64 / f64::from(1 << 20),
        )?;
        match kv_bits_expected {
            Some(expected) => write!(f, " ({expected:.2} expected)"),
            None => Ok(()),
        }
    }
}
