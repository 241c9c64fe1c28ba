//! The parity gate: the re-opened folder holds and computes what was trained.

use super::folder::OpenModel;
use super::format::Writing;
use super::manifest::{LogitsRecord, Manifest, ParityRecord};
use super::record::MANIFEST_FILE;
use crate::error::{Error, Result};
use crate::model::{WeightSource, weight_name};
use crate::store::TensorSource;
use crate::task::{Gauge, Gauged};

/// The half of the gate that runs the model: measured as trained before, and on the re-opened
/// folder.
pub struct Gate<'a> {
    /// Measures a model.
    pub gauge: &'a Gauge<'a>,
    /// What it said of the model as trained.
    pub trained: &'a Gauged,
}

/// The weights of the re-opened folder are those that were meant, and nothing is missing.
///
/// # Errors
/// Exit code 5 where they are not.
pub(super) fn compare(writing: &Writing<'_>, opened: &OpenModel) -> Result<()> {
    let differs = |what: &str, name: &str| {
        Err(Error::gate(format!("the exported {what} is not what was trained"))
            .at(name)
            .fix("report this: nothing was written"))
    };
    for name in writing.linears() {
        let stored = writing.stored(name)?;
        if let Some(packed) = opened.quantized(name)?
            && packed != stored.weight
        {
            return differs("code or grid", name);
        }
        let shape = [stored.weight.layout.out, stored.weight.layout.inputs];
        let exported = opened.weight(&weight_name(name), &shape)?;
        if stored.decoded.iter().zip(&exported).any(|(a, b)| a.to_bits() != b.to_bits()) {
            return differs("weight", name);
        }
    }
    let recorded = opened.manifest.as_ref().and_then(|m| m.activations.as_ref());
    if recorded != writing.parts.activations.as_ref() {
        return differs("grid of the activations", MANIFEST_FILE);
    }
    for name in writing.dense_names() {
        let tensor = writing.dense(name)?;
        let same = match opened.gguf_values(name, &tensor.shape) {
            Some(values) => {
                // A gain that a file holds with 1 added loses what that sum loses in any forward.
                let offset = writing.config.gain_offset(name);
                let multiplied = |values: Vec<f32>| values.into_iter().map(move |w| w + offset);
                multiplied(values?).eq(multiplied(tensor.to_f32()?))
            }
            None => opened.checkpoint.read(&writing.stored_as(name))? == tensor,
        };
        if !same {
            return differs("tensor", name);
        }
    }
    Ok(())
}

/// The same weights compute the same numbers.
pub(super) fn check_equal(trained: &Gauged, exported: &Gauged) -> Result<()> {
    let failed = |what: String| Err(Error::gate(what).fix("report this: nothing was written"));
    if trained.logits_sha256() != exported.logits_sha256() {
        return failed(format!(
            "the exported model's logits differ from the trained model's by {:e}",
            trained.logits_differ(exported)
        ));
    }
    if trained.prompts_nll.to_bits() != exported.prompts_nll.to_bits() {
        return failed(format!(
            "the exported model's loss on the prompts {} is not the trained model's {}",
            exported.prompts_nll, trained.prompts_nll
        ));
    }
    match (&trained.perplexity, &exported.perplexity) {
        (Some(a), Some(b)) if a.perplexity.to_bits() != b.perplexity.to_bits() => failed(format!(
            "the exported model's perplexity {} is not the trained model's {}",
            b.perplexity, a.perplexity
        )),
        _ => Ok(()),
    }
}

/// Records what the gate measured.
pub(super) fn record(manifest: &mut Manifest, gate: &Gate<'_>, gauged: &Gauged) {
    manifest.logits = Some(LogitsRecord {
        prompts: gate.gauge.prompts.clone(),
        next: gauged.next_tokens(),
        sha256: gauged.logits_sha256(),
        differ: gate.trained.logits_differ(gauged),
        nll: gauged.prompts_nll,
    });
    let text = gate.gauge.text.as_ref();
    let measured = text.zip(gate.trained.perplexity.as_ref()).zip(gauged.perplexity.as_ref());
    manifest.parity = measured.map(|((text, trained), exported)| ParityRecord {
        trained: trained.perplexity,
        exported: exported.perplexity,
        tokens: exported.tokens,
        context: exported.context,
        stride: (exported.stride != exported.context).then_some(exported.stride),
        windows: Some(exported.windows),
        data_sha256: text.sha256.clone(),
        reading: text.reading.clone(),
    });
}
