//! `export`: every format asked for, each behind the parity gate.

use serde::{Deserialize, Serialize};

use super::evaluate;
use super::{ExportRecord, Packed, StageContext};
use crate::error::{Error, Result};
use crate::export::{self, Format, FormatsConfig, ModelParts, OpenModel, Parity};
use crate::model::{Loader, WeightSource};
use crate::report::{Event, Reporter};
use crate::task::{self, Perplexity, PplConfig};

/// Windows of the validation text that the gate's perplexity is measured on, at most.
pub const PARITY_WINDOWS: usize = 64;

/// Keys of `[stage.export]`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ExportConfig {
    /// The formats to write.
    pub format: FormatsConfig,
}

impl ExportConfig {
    pub(super) fn check(&self) -> Result<()> {
        if self.format.formats().is_empty() {
            return Err(Error::usage("stage.export names no format").fix("format.fewbit = {}"));
        }
        Ok(())
    }
}

pub(super) fn run(config: &ExportConfig, ctx: &mut StageContext<'_>) -> Result<()> {
    let task = PplConfig { windows: Some(PARITY_WINDOWS), ..PplConfig::default() };
    let mut dense = ctx.model.tuned.clone();
    dense.extend(ctx.model.dense.clone());
    // Without validation text the gate still compares every code and weight.
    // By whether it is computed with codes: formats that compute alike share the number.
    let mut measured: [Option<Perplexity>; 2] = [None, None];
    for format in config.format.formats() {
        ctx.stop.check()?;
        // Computed as the folder will be: with codes, or with the weights they stand for.
        let packed = Packed(ctx.model);
        let source: &dyn WeightSource = match format {
            Format::Fewbit => &packed,
            _ => ctx.model,
        };
        let known = &mut measured[usize::from(format == Format::Fewbit)];
        if known.is_none() && ctx.data.validation.is_some() {
            *known = Some(evaluate::perplexity(ctx, source, ctx.model.tap(), &task)?);
        }
        let trained = known.clone();
        let target = ctx.run_dir.join("export").join(format.name());
        let mut measure = |opened: &OpenModel| -> Result<f64> {
            let corpus = evaluate::validation(ctx)?;
            let device = &ctx.device.device;
            let loader =
                Loader { config: &opened.config, source: opened, device, dtype: ctx.compute };
            let model = loader.model()?.with_tap(opened.tap());
            let stream = &corpus.stream;
            let measured = task::measure(
                &model,
                &opened.config,
                stream,
                &task,
                device,
                ctx.stop,
                &mut |_, _| (),
            );
            measured.map(|result| result.perplexity)
        };
        let parity =
            trained.as_ref().zip(ctx.data.validation.as_ref()).map(|(trained, corpus)| Parity {
                trained: trained.perplexity,
                tokens: trained.tokens,
                context: trained.context,
                data_sha256: corpus.sha256.clone(),
                format: corpus.format,
                measure: &mut measure,
            });
        let weights = if ctx.model.quantized.is_empty() { "weights" } else { "codes" };
        let checked = if parity.is_some() {
            format!("{weights} and perplexity exact")
        } else {
            format!("{weights} exact")
        };
        let parts = ModelParts {
            dir: &ctx.model.dir,
            source: &ctx.model.checkpoint,
            quantized: &ctx.model.quantized,
            dense: &dense,
            activations: ctx.model.activations.if_on(),
            options: config.format.clone(),
            provenance: ctx.provenance.clone(),
        };
        let exported = export::write(&parts, format, &target, parity)?;
        if format == Format::Dequantized && ctx.model.activations.quant.is_on() {
            let text = "other runtimes read this folder as a dense model with float activations; \
                        fewbit quantizes them as manifest.json says";
            ctx.report.emit(&Event::Note { text: text.to_owned() });
        }
        ctx.report.emit(&Event::Exported {
            format: format.name().to_owned(),
            path: exported.path.display().to_string(),
            bytes: exported.bytes,
            bits_per_weight: exported.bits_per_weight,
            parity: checked,
            seconds: exported.seconds,
        });
        ctx.results.exports.retain(|record| record.format != format.name());
        ctx.results.exports.push(ExportRecord {
            format: format.name().to_owned(),
            path: exported.path,
            bytes: exported.bytes,
            bits_per_weight: exported.bits_per_weight,
        });
    }
    Ok(())
}
