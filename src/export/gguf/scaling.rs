//! The scaling of a file's rotations, as a `config.json` says it.

use serde_json::{Value as Json, json};

use super::own::{File, positive};
use super::rotation;
use crate::error::{Error, Result};
use crate::model::{LONG_FACTORS, ROPE_FACTORS, RopeScaling};

/// By what YaRN multiplies cosines and sines where nothing else is said.
pub(super) fn yarn_attention(factor: f64) -> f64 {
    if factor > 1.0 { 0.1 * factor.ln() + 1.0 } else { 1.0 }
}

/// What is scaled.
pub(super) struct Scaled {
    /// Base of the frequencies.
    pub(super) theta: f64,
    /// Features of a head that are rotated.
    pub(super) dims: usize,
    /// Longest context.
    pub(super) context: f64,
}

const KIND: &str = "rope.scaling.type";
const FACTOR: &str = "rope.scaling.factor";
const OLD_FACTOR: &str = "rope.scale_linear";
const ATTENTION: &str = "rope.scaling.attn_factor";
const ORIGINAL: &str = "rope.scaling.original_context_length";

/// The `rope_scaling` of a file; `divisors` are the values of the tensors that scale its rotations.
///
/// # Errors
/// When a key is unusable, or the scaling is none that fewbit has: the key or the tensor is named.
pub(super) fn scaling(
    file: &File<'_>,
    divisors: &[(&str, Vec<f32>)],
    scaled: &Scaled,
) -> Result<Json> {
    let found = |name: &str| {
        divisors.iter().find(|(other, _)| *other == name).map(|(_, values)| values.as_slice())
    };
    if let (Some(long), Some(short)) = (found(LONG_FACTORS[0]), found(LONG_FACTORS[1])) {
        return longrope(file, [short, long], scaled);
    }
    let stretch = match file.number(FACTOR)? {
        Some(factor) => (file.key(FACTOR), factor),
        None => (file.key(OLD_FACTOR), file.number(OLD_FACTOR)?.unwrap_or(0.0)),
    };
    let linear = match file.text(KIND)? {
        // llama.cpp reads a factor without a kind as linear, and a factor of 0 as none.
        None | Some("linear") if matches!(stretch.1, 0.0 | 1.0) => RopeScaling::Default,
        None | Some("linear") => RopeScaling::Linear { factor: positive(&stretch.0, stretch.1)? },
        Some("none") => RopeScaling::Default,
        Some("yarn") if stretch.1 > 0.0 && divisors.is_empty() => {
            return yarn(file, stretch.1, scaled);
        }
        Some(other) => {
            return Err(Error::preflight(format!(
                "the file scales its rotations by `{}` ({}); fewbit knows none, linear, yarn with its \
                 factor, longrope with its two tensors, and Llama 3.1's",
                other.escape_debug(),
                file.key(KIND)
            ))
            .fix("a model with one of these"));
        }
    };
    if let Some(factor) = file.number(ATTENTION)?.filter(|f| *f != 0.0 && (f - 1.0).abs() > 0.0) {
        return Err(Error::preflight(format!(
            "`{}` is {factor}, and the scaling is neither yarn nor longrope",
            file.key(ATTENTION)
        ))
        .fix("a model with one of these, or without the key"));
    }
    let Some(factors) = found(ROPE_FACTORS) else { return Ok(scaling_json(&linear)) };
    if linear != RopeScaling::Default {
        return Err(Error::preflight(format!(
            "the file scales its rotations twice, by `{}` and by this tensor",
            stretch.0
        ))
        .at(ROPE_FACTORS));
    }
    let found = rotation::scaling(factors, scaled.theta, scaled.dims);
    found.map(|found| scaling_json(&found)).map_err(|error| error.at(ROPE_FACTORS))
}

/// The context of pre-training; the longest one where the file is silent.
fn original(file: &File<'_>, scaled: &Scaled) -> Result<f64> {
    let found = file.number(ORIGINAL)?.filter(|original| *original != 0.0);
    positive(&file.key(ORIGINAL), found.unwrap_or(scaled.context))
}

fn yarn(file: &File<'_>, factor: f64, scaled: &Scaled) -> Result<Json> {
    let mut all = json!({
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": whole(original(file, scaled)?),
    });
    for (theirs, ours) in [("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")] {
        if let Some(turns) = file.own_number(&format!("rope.scaling.{theirs}"))? {
            all[ours] = json!(turns);
        }
    }
    let usual = yarn_attention(factor);
    let mut attention = usual;
    if let Some(by) = file.own_number("rope.scaling.yarn_log_multiplier")?.filter(|by| *by != 0.0) {
        attention /= by * (usual - 1.0) + 1.0;
    }
    if let Some(more) = file.number(ATTENTION)?.filter(|more| *more != 0.0) {
        attention *= positive(&file.key(ATTENTION), more)?;
    }
    if (attention / usual - 1.0).abs() > 0.0 {
        all["attention_factor"] = json!(attention);
    }
    Ok(all)
}

fn longrope(file: &File<'_>, [short, long]: [&[f32]; 2], scaled: &Scaled) -> Result<Json> {
    let original = original(file, scaled)?;
    // The shortest decimal of an f32 is what was meant.
    let decimals = |divisors: &[f32]| -> Vec<f64> {
        divisors.iter().map(|d| d.to_string().parse().unwrap_or_else(|_| f64::from(*d))).collect()
    };
    let mut all = json!({
        "rope_type": "longrope",
        "short_factor": decimals(short),
        "long_factor": decimals(long),
        "original_max_position_embeddings": whole(original),
    });
    let factor = scaled.context / original;
    let usual = if factor > 1.0 { (1.0 + factor.ln() / original.ln()).sqrt() } else { 1.0 };
    let attention = file.number(ATTENTION)?.filter(|attention| *attention != 0.0).unwrap_or(1.0);
    if (attention as f32).to_bits() != (usual as f32).to_bits() {
        all["attention_factor"] = json!(positive(&file.key(ATTENTION), attention)?);
    }
    Ok(all)
}

fn scaling_json(scaling: &RopeScaling) -> Json {
    match scaling {
        RopeScaling::Default
        | RopeScaling::Dynamic { .. }
        | RopeScaling::Yarn { .. }
        | RopeScaling::Long { .. } => Json::Null,
        RopeScaling::Linear { factor } => json!({ "rope_type": "linear", "factor": factor }),
        RopeScaling::Llama3 { factor, low, high, original } => json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": whole(*original),
        }),
    }
}

/// A number of positions is written without a point where it is whole.
fn whole(value: f64) -> Json {
    if value.fract() == 0.0 && (0.0..9e15).contains(&value) {
        json!(value as u64)
    } else {
        json!(value)
    }
}
