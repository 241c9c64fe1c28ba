//! Rotary position embedding: frequencies and how they are stretched, as transformers computes them.

use std::f64::consts::PI;

use super::keys::Keys;
use crate::error::Result;

/// Rotary position embedding (arXiv 2104.09864).
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// Features of a head that are rotated, even; the rest passes.
    pub dims: usize,
    /// Whether neighbours are rotated against each other, not one half against the other.
    pub neighbours: bool,
    /// How frequencies are stretched.
    pub scaling: RopeScaling,
}

/// Frequency scaling of the rotary embedding.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// None.
    Default,
    /// All frequencies divided by a factor.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// A base that grows once a text is longer than the context of pre-training.
    Dynamic {
        /// By how much the context is stretched.
        factor: f64,
        /// Context of pre-training.
        original: f64,
    },
    /// Llama 3.1's: low frequencies divided, high ones kept, a ramp between.
    Llama3 {
        /// The divisor of low frequencies.
        factor: f64,
        /// Wavelengths above `original / low` count as low frequency.
        low: f64,
        /// Wavelengths below `original / high` count as high frequency.
        high: f64,
        /// Context of pre-training.
        original: f64,
    },
    /// YaRN (arXiv 2309.00071): as Llama 3.1's, with a ramp over the features, and larger scores.
    Yarn {
        /// The divisor of low frequencies.
        factor: f64,
        /// Context of pre-training.
        original: f64,
        /// Turns in it that a frequency makes at the ends of the ramp.
        turns: [f64; 2],
        /// The ramp over pairs of features, from kept to divided.
        ramp: [f64; 2],
        /// By what cosines and sines are multiplied.
        attention: f64,
    },
    /// LongRoPE (arXiv 2402.13753): a divisor for each frequency, others for long texts.
    Long {
        /// Divisors up to `original` positions, `[dims / 2]`.
        short: Vec<f64>,
        /// Divisors beyond.
        long: Vec<f64>,
        /// Context of pre-training.
        original: f64,
        /// By what cosines and sines are multiplied.
        attention: f64,
    },
}

impl Rope {
    /// One half of a whole head against the other, frequencies as they are.
    pub fn plain(theta: f64, head_dim: usize) -> Self {
        Self { theta, dims: head_dim, neighbours: false, scaling: RopeScaling::Default }
    }

    /// Inverse frequencies, `[dims / 2]`, of a text of `total` positions; in f32 as transformers
    /// computes them.
    pub fn inverse_frequencies(&self, total: usize) -> Vec<f32> {
        let theta = match self.scaling {
            RopeScaling::Dynamic { factor, original } if total as f64 > original => {
                let stretch = factor * total as f64 / original - (factor - 1.0);
                let dims = self.dims as f64;
                self.theta * stretch.powf(dims / (dims - 2.0))
            }
            _ => self.theta,
        };
        (0..self.dims / 2)
            .map(|i| {
                let exponent = (2 * i) as f32 / self.dims as f32;
                let frequency = 1.0 / (theta as f32).powf(exponent);
                self.scaling.apply(i, frequency, total)
            })
            .collect()
    }

    /// By what cosines and sines are multiplied.
    pub fn attention_factor(&self) -> f64 {
        match self.scaling {
            RopeScaling::Yarn { attention, .. } | RopeScaling::Long { attention, .. } => attention,
            _ => 1.0,
        }
    }
}

impl RopeScaling {
    /// The frequency of pair `i` in a text of `total` positions.
    fn apply(&self, i: usize, frequency: f32, total: usize) -> f32 {
        match self {
            Self::Default | Self::Dynamic { .. } => frequency,
            Self::Linear { factor } => frequency / *factor as f32,
            Self::Llama3 { factor, low, high, original } => {
                let wavelength = 2.0 * PI / f64::from(frequency);
                if wavelength < original / high {
                    frequency
                } else if wavelength > original / low {
                    frequency / *factor as f32
                } else {
                    let ramp = ((original / wavelength - low) / (high - low)) as f32;
                    (1.0 - ramp) * frequency / *factor as f32 + ramp * frequency
                }
            }
            Self::Yarn { factor, ramp: [start, end], .. } => {
                let divided = ((i as f64 - start) / (end - start)).clamp(0.0, 1.0) as f32;
                frequency / *factor as f32 * divided + frequency * (1.0 - divided)
            }
            Self::Long { short, long, original, .. } => {
                let divisors = if total as f64 > *original { long } else { short };
                frequency / divisors.get(i).map_or(1.0, |divisor| *divisor as f32)
            }
        }
    }
}

/// Where a rope's settings stand, and what a family takes for granted.
pub(super) struct RopeDefaults {
    /// Width of a head.
    pub head_dim: usize,
    /// Base where the config has none.
    pub theta: f64,
    /// Share of a head that is rotated where the config has none.
    pub partial: f64,
    /// Longest context.
    pub max_positions: usize,
}

impl Rope {
    /// transformers 5 writes `rope_parameters` with everything in it; older folders write
    /// `rope_theta`, `rope_scaling` and `partial_rotary_factor` side by side. `which` is the kind of
    /// layer where `rope_parameters` has a table for each.
    pub(super) fn read(keys: &Keys<'_>, which: &str, defaults: &RopeDefaults) -> Result<Self> {
        let table = keys.table(&["rope_parameters", "rope_scaling"])?;
        let table = match table {
            Some(table) if table.holds_tables() => table.table(&[which])?,
            table => table,
        };
        let empty = serde_json::Map::new();
        let own = table.unwrap_or_else(|| Keys::new(&empty));
        // Both are asked for, so that neither counts as unread.
        let outside = (keys.positive("rope_theta")?, keys.positive("partial_rotary_factor")?);
        let theta = own.positive("rope_theta")?.or(outside.0).unwrap_or(defaults.theta);
        let partial =
            own.positive("partial_rotary_factor")?.or(outside.1).unwrap_or(defaults.partial);
        let dims = (defaults.head_dim as f64 * partial) as usize;
        if dims < 2 || !dims.is_multiple_of(2) || dims > defaults.head_dim {
            return Err(crate::error::Error::preflight(format!(
                "{dims} of a head's {} features are rotated, and they go in pairs",
                defaults.head_dim
            ))
            .at("partial_rotary_factor, head_dim")
            .fix("an even number of them"));
        }
        let scaling = Self::scaling(keys, &own, theta, dims, defaults)?;
        Ok(Self { theta, dims, neighbours: false, scaling })
    }

    fn scaling(
        keys: &Keys<'_>,
        own: &Keys<'_>,
        theta: f64,
        dims: usize,
        defaults: &RopeDefaults,
    ) -> Result<RopeScaling> {
        let context = defaults.max_positions as f64;
        let original = |own: &Keys<'_>| -> Result<Option<f64>> {
            let outside = keys.positive("original_max_position_embeddings")?;
            Ok(outside.or(own.positive("original_max_position_embeddings")?))
        };
        Ok(match own.text(&["rope_type", "type"])?.unwrap_or("default") {
            "default" => RopeScaling::Default,
            "linear" => RopeScaling::Linear { factor: own.needed_positive("factor")? },
            "dynamic" => RopeScaling::Dynamic {
                factor: own.needed_positive("factor")?,
                original: original(own)?.unwrap_or(context),
            },
            "llama3" => RopeScaling::Llama3 {
                factor: own.needed_positive("factor")?,
                low: own.needed_positive("low_freq_factor")?,
                high: own.needed_positive("high_freq_factor")?,
                original: match original(own)? {
                    Some(original) => original,
                    None => return Err(own.missing("original_max_position_embeddings")),
                },
            },
            "yarn" => {
                let original = original(own)?.unwrap_or(context);
                let factor = own.positive("factor")?.unwrap_or(context / original);
                let larger =
                    |by: f64| if factor > 1.0 { 0.1 * by * factor.ln() + 1.0 } else { 1.0 };
                let both = (own.positive("mscale")?, own.positive("mscale_all_dim")?);
                let attention = match (own.positive("attention_factor")?, both) {
                    (Some(attention), _) => attention,
                    (None, (Some(one), Some(other))) => larger(one) / larger(other),
                    _ => larger(1.0),
                };
                let at = |turns: f64| {
                    dims as f64 * (original / (turns * 2.0 * PI)).ln() / (2.0 * theta.ln())
                };
                let turns = [
                    own.positive("beta_fast")?.unwrap_or(32.0),
                    own.positive("beta_slow")?.unwrap_or(1.0),
                ];
                let [fast, slow] = turns.map(at);
                let whole = own.flag("truncate", true)?;
                let [fast, slow] = if whole { [fast.floor(), slow.ceil()] } else { [fast, slow] };
                let (start, mut end) = (fast.max(0.0), slow.min(dims as f64 - 1.0));
                if end <= start {
                    end = start + 0.001;
                }
                RopeScaling::Yarn { factor, original, turns, ramp: [start, end], attention }
            }
            "longrope" | "su" => {
                let original = original(own)?.unwrap_or(context);
                let factor = own.positive("factor")?.unwrap_or(context / original);
                let [short, long] = ["short_factor", "long_factor"].map(|key| own.positives(key));
                let (short, long) = (short?, long?);
                if short.len() != dims / 2 || long.len() != dims / 2 {
                    return Err(own.refuse(
                        "short_factor",
                        format!("{} and {} long numbers", short.len(), long.len()),
                        &format!("{} of each, one for each pair of features", dims / 2),
                    ));
                }
                let usual =
                    if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / original.ln()).sqrt() };
                let attention = own.positive("attention_factor")?.unwrap_or(usual);
                RopeScaling::Long { short, long, original, attention }
            }
            other => {
                return Err(crate::error::Error::preflight(format!(
                    "rope type `{other}` is not supported"
                ))
                .fix("a model with rope type default, linear, dynamic, llama3, yarn or longrope"));
            }
        })
    }
}
