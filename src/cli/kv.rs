//! How keys and values of earlier tokens are held.

use clap::Args;
use serde_json::{Map, Value, json};

use super::Session;
use crate::error::Result;
use crate::model::{KvHeld, KvMode, KvSetting};
use crate::report::size;

/// Flags of commands that go on from keys and values.
#[derive(Args, Clone, Debug)]
#[allow(clippy::struct_field_names)] // they are the names of the flags, and --bits is another one
pub(super) struct KvArgs {
    /// How keys and values of earlier tokens are held: full; mikv, important tokens at high precision and
    /// the others at --kv-bits; uniform, all at --kv-bits; evict, important tokens alone [default: full]
    #[arg(long, value_name = "MODE", value_parser = mode)]
    kv_cache: Option<KvMode>,
    /// Bits of a number that is not important, 2 to 8 [default: 4]
    #[arg(long, value_name = "BITS", requires = "kv_cache")]
    kv_bits: Option<u8>,
    /// The share of tokens that are important: those that received most attention [default: 0.25]
    #[arg(long, value_name = "SHARE", requires = "kv_cache")]
    kv_ratio: Option<f64>,
    /// The last tokens, which always are [default: 16]
    #[arg(long, value_name = "TOKENS", requires = "kv_cache")]
    kv_recent: Option<usize>,
    /// Numbers of a token that share a step and a minimum, a divisor of a head's width [default: 32 where
    /// it is one, else the head]
    #[arg(long, value_name = "N", requires = "kv_cache")]
    kv_group: Option<usize>,
    /// Bits of an important token's number: 16, or 32 for what was computed [default: 16]
    #[arg(long, value_name = "BITS", requires = "kv_cache")]
    kv_high: Option<u8>,
}

impl KvArgs {
    /// The setting, where one is asked for.
    ///
    /// # Errors
    /// A usage error for sizes that make no sense or do not fit the model.
    pub(super) fn setting(&self, session: &Session) -> Result<Option<KvSetting>> {
        let Some(mode) = self.kv_cache else { return Ok(None) };
        let usual = KvSetting::new(mode);
        let setting = KvSetting {
            mode,
            bits: self.kv_bits.unwrap_or(usual.bits),
            ratio: self.kv_ratio.unwrap_or(usual.ratio),
            recent: self.kv_recent.unwrap_or(usual.recent),
            group: self.kv_group,
            high: self.kv_high.unwrap_or(usual.high),
        };
        setting.check(session.opened.config.head_dim)?;
        Ok(Some(setting))
    }

    /// Whether one is asked for.
    pub(super) fn is_given(&self) -> bool {
        self.kv_cache.is_some()
    }
}

/// What a text's keys and values took, for a line.
pub(super) fn line(setting: &KvSetting, held: KvHeld) -> String {
    format!(
        "keys and values {setting}: {}, {:.2} bits a number\n",
        size(held.bytes as u64),
        held.bits()
    )
}

/// The same as an object.
pub(super) fn object(setting: &KvSetting, held: KvHeld, head_dim: usize) -> Map<String, Value> {
    let entries = json!({
        "kv_cache": setting.to_string(),
        "kv_bytes": held.bytes,
        "kv_bits": held.bits(),
        "kv_bits_expected": setting.expected_bits(head_dim),
    });
    entries.as_object().cloned().unwrap_or_default()
}

fn mode(text: &str) -> Result<KvMode, String> {
    let known = KvMode::NAMES.into_iter().find(|(name, _)| *name == text);
    known
        .map(|(_, mode)| mode)
        .ok_or_else(|| format!("one of: {}", KvMode::NAMES.map(|(name, _)| name).join(", ")))
}
