//! How keys and values are held, and what that should take.

use std::fmt;

use crate::error::{Error, Result};

/// Groups of a token's numbers that share a grid, unless it is said: where they divide a head's width.
const GROUP: usize = 32;

/// How keys and values of earlier positions are held.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum KvMode {
    /// As they were computed.
    Full,
    /// Important tokens alone; the others are dropped (H2O, arXiv 2306.14048).
    Evict,
    /// All tokens as codes of a few bits.
    Uniform,
    /// Important tokens at high precision, the others as codes of a few bits (MiKV, arXiv 2402.18096).
    Mikv,
}

impl KvMode {
    /// All, with their names.
    pub const NAMES: [(&'static str, Self); 4] = [
        ("full", Self::Full),
        ("mikv", Self::Mikv),
        ("uniform", Self::Uniform),
        ("evict", Self::Evict),
    ];

    /// How it goes by.
    pub fn name(self) -> &'static str {
        let known = Self::NAMES.into_iter().find(|(_, mode)| *mode == self);
        known.map_or("full", |(name, _)| name)
    }

    /// Whether tokens are weighed.
    pub(super) fn weighs(self) -> bool {
        matches!(self, Self::Evict | Self::Mikv)
    }

    /// Whether tokens are held as codes.
    pub(super) fn codes(self) -> bool {
        matches!(self, Self::Uniform | Self::Mikv)
    }
}

/// A mode with its sizes. Those that a mode does not use are ignored.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct KvSetting {
    /// How.
    pub mode: KvMode,
    /// Bits of a code, 2 to 8.
    pub bits: u8,
    /// The share of a text's tokens that are important.
    pub ratio: f64,
    /// Tokens at the end that always are.
    pub recent: usize,
    /// Numbers of a token that share a grid, a divisor of a head's width; absent: 32 where it divides that,
    /// else the whole head.
    pub group: Option<usize>,
    /// Bits of an important token's number: 16 or 32.
    pub high: u8,
}

impl KvSetting {
    /// A mode with the sizes that it has unless others are asked for.
    pub fn new(mode: KvMode) -> Self {
        Self { mode, bits: 4, ratio: 0.25, recent: 16, group: None, high: 16 }
    }

    /// Whether keys and values are held in another way than they were computed.
    pub fn is_mixed(&self) -> bool {
        self.mode != KvMode::Full
    }

    /// Refuses sizes that make no sense, or do not fit heads of this width.
    ///
    /// # Errors
    /// A usage error that names the option.
    pub fn check(&self, head_dim: usize) -> Result<()> {
        let refused = |what: String, option: &str, fix: String| {
            Err(Error::usage(what).at(format!("--kv-{option}")).fix(format!("--kv-{option} {fix}")))
        };
        if !(2..=8).contains(&self.bits) {
            let what = format!("codes of keys and values have 2 to 8 bits, not {}", self.bits);
            return refused(what, "bits", "4".to_owned());
        }
        if !(0.0..=1.0).contains(&self.ratio) {
            let what = format!("the share of important tokens is 0 to 1, not {}", self.ratio);
            return refused(what, "ratio", "0.25".to_owned());
        }
        if ![16, 32].contains(&self.high) {
            let what = format!("important tokens are held in 16 or 32 bits, not {}", self.high);
            return refused(what, "high", "16".to_owned());
        }
        match self.group {
            Some(group) if group == 0 || !head_dim.is_multiple_of(group) => refused(
                format!("groups of {group} do not divide heads of {head_dim}"),
                "group",
                fitting(head_dim).to_string(),
            ),
            _ => Ok(()),
        }
    }

    /// Numbers of a token that share a grid, in heads of this width.
    pub fn group_of(&self, head_dim: usize) -> usize {
        self.group.unwrap_or_else(|| fitting(head_dim))
    }

    /// How many of so many tokens are important.
    pub(super) fn important(&self, tokens: usize) -> usize {
        if self.mode == KvMode::Uniform {
            return 0;
        }
        let share = (self.ratio * tokens as f64).round() as usize;
        share.max(self.recent).min(tokens)
    }

    /// Bits that a number of a long text should take: `r h + (1 - r) (b + 32 / g)`, of a share `r` of important
    /// tokens in `h` bits, codes of `b` bits, and an f16 step and minimum for every `g` of them. `None` where
    /// they are held as computed.
    pub fn expected_bits(&self, head_dim: usize) -> Option<f64> {
        let codes = f64::from(self.bits) + 32.0 / self.group_of(head_dim) as f64;
        let high = self.ratio * f64::from(self.high);
        match self.mode {
            KvMode::Full => None,
            KvMode::Evict => Some(high),
            KvMode::Uniform => Some(codes),
            KvMode::Mikv => Some(high + (1.0 - self.ratio) * codes),
        }
    }
}

/// The mode with the sizes that it uses.
impl fmt::Display for KvSetting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.mode.name())?;
        if self.mode.codes() {
            write!(f, " {} bits", self.bits)?;
        }
        if self.mode.weighs() {
            write!(f, " ratio {} recent {} high {}", self.ratio, self.recent, self.high)?;
        }
        Ok(())
    }
}

fn fitting(head_dim: usize) -> usize {
    if head_dim.is_multiple_of(GROUP) { GROUP } else { head_dim }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_follow_the_model_and_what_makes_no_sense_is_refused() {
        let mikv =
            KvSetting { bits: 2, ratio: 0.2, group: Some(64), ..KvSetting::new(KvMode::Mikv) };
        // 0.2 * 16 + 0.8 * (2 + 0.5)
        assert!((mikv.expected_bits(128).unwrap() - 5.2).abs() < 1e-9);
        assert_eq!(KvSetting::new(KvMode::Mikv).group_of(64), 32);
        assert_eq!(KvSetting::new(KvMode::Mikv).group_of(24), 24);
        assert_eq!([10, 16, 64, 128].map(|n| mikv.important(n)), [10, 16, 16, 26]);
        assert!(mikv.check(128).is_ok());
        let refused = |setting: KvSetting| setting.check(64).unwrap_err().to_string();
        assert_eq!(
            refused(KvSetting { group: Some(48), ..mikv }),
            "groups of 48 do not divide heads of 64\n  at   --kv-group\n  try  --kv-group 32"
        );
        for (setting, option) in [
            (KvSetting { bits: 1, ..mikv }, "--kv-bits"),
            (KvSetting { bits: 9, ..mikv }, "--kv-bits"),
            (KvSetting { ratio: 1.5, ..mikv }, "--kv-ratio"),
            (KvSetting { ratio: f64::NAN, ..mikv }, "--kv-ratio"),
            (KvSetting { high: 8, ..mikv }, "--kv-high"),
            (KvSetting { group: Some(0), ..mikv }, "--kv-group"),
        ] {
            assert!(refused(setting).contains(option), "{setting:?}");
        }
    }
}
