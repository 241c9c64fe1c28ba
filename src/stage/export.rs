//! `export`: every format asked for, each behind the parity gate.

use std::collections::{BTreeMap, BTreeSet};

use burn::tensor::DType;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::context::StageContext;
use super::cost::{Cost, Scene};
use super::gate;
use super::kind::{Before, Stage};
use super::results::{ExportRecord, Measured};
use super::state::Packed;
use crate::data::{TokenStream, Tokenizer};
use crate::error::{Error, Result};
use crate::export::{self, Exported, Format, FormatsConfig, Gate, Loss, ModelParts};
use crate::model::{WeightSource, weight_name};
use crate::quant::Repr;
use crate::report::terminal::Bar;
use crate::report::{Event, Reporter};
use crate::task::{Gauge, GaugeText, Gauged, PplConfig};

/// Windows of a text that a perplexity is measured on where no record says more.
pub const PARITY_WINDOWS: usize = 64;
/// Tokens that the gate's perplexity is measured on, at most; twice for each format.
const PARITY_TOKENS: usize = 24 << 10;

/// Keys of `[stage.export]`.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ExportConfig {
    /// The formats to write.
    pub format: FormatsConfig,
    /// Export, with a warning, a model that the quality gate finds worse than plain rounding.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub allow_worse: bool,
}

impl Stage for ExportConfig {
    fn check(&self) -> Result<()> {
        if self.format.formats().is_empty() {
            return Err(Error::usage("stage.export names no format").fix("format.fewbit = {}"));
        }
        Ok(())
    }

    fn follows(&self, before: &Before<'_>) -> Result<()> {
        if before.repr == Repr::Dense && (self.format.fewbit.is_some() || !before.tuned) {
            return Err(Error::usage(
                "export needs quantized weights, and no earlier stage makes any",
            )
            .fix("a stage.calibrate, stage.reconstruct or stage.distill before it"));
        }
        Ok(())
    }

    fn summary(&self, _spec: &str) -> String {
        let formats = self.format.formats();
        formats.iter().map(|format| format.name()).collect::<Vec<_>>().join(", ")
    }

    fn cost(&self, scene: &Scene<'_>) -> Cost {
        let all = self.format.formats();
        let config = scene.config();
        let norms = scene.config().n_blocks as u64 * 4 * config.d_model as u64;
        let rest = scene.stored * (scene.rest + norms);
        let bytes = |format: &Format| match format {
            Format::Dequantized => 4 * scene.linears + rest,
            _ => scene.codes + rest,
        };
        // Values are there twice while the last folder is put together.
        let largest = all.iter().map(bytes).max().unwrap_or(0);
        let text = scene.data.validation.as_ref();
        let text = text.map_or(0, |corpus| corpus.stream.tokens.len().min(PARITY_TOKENS)) as u64;
        // On the prompts, too.
        let tokens = (text + 128) * (1 + all.len() as u64);
        let work = scene.measured(tokens, 2048).map(|measured| {
            measured
                + all.len() as f64 * scene.load(8 * scene.linears + 4 * scene.rest).unwrap_or(0.0)
        });
        // A linear as it was and as it is read again, in floats and in bytes.
        Cost {
            device: scene.measuring(text.clamp(128, 4096), false).max(12 * scene.widest),
            disk: all.iter().map(bytes).sum::<u64>() + largest,
            seconds: work.unwrap_or(0.2 + (scene.linears + scene.rest) as f64 * 2e-8),
            ..Cost::default()
        }
    }

    fn exports(&self) -> Option<&FormatsConfig> {
        Some(&self.format)
    }

    fn neutralize(&mut self) {
        self.allow_worse = false;
    }

    fn run(&self, ctx: &mut StageContext<'_>) -> Result<()> {
        gate::before_export(self.allow_worse, ctx)?;
        let tokenizer = ctx.model.dir.join("tokenizer.json").is_file();
        let tokenizer = tokenizer.then(|| Tokenizer::load(&ctx.model.dir)).transpose()?;
        // Without validation text the gate still compares every code, weight and the prompts.
        let text = ctx.data.validation.as_ref().map(|corpus| GaugeText {
            stream: &corpus.stream,
            task: protocol(ctx, &corpus.stream),
            sha256: corpus.sha256.clone(),
            reading: corpus.reading.clone(),
        });
        let bar = Bar::new("export", "comparing with what was trained");
        let gauge = Gauge {
            device: &ctx.device.device,
            // What `verify` measures in.
            dtype: DType::F32,
            prompts: Gauge::prompts(tokenizer.as_ref(), &ctx.model.config),
            text,
            stop: ctx.stop,
            progress: &|done, of| bar.at(done, of),
        };
        ctx.results.weight_errors = weight_errors(ctx)?;
        let mut dense = ctx.model.tuned.clone();
        dense.extend(ctx.model.dense.clone());
        // By whether it is computed with codes: formats that compute alike share the numbers.
        let mut measured: [Option<Gauged>; 2] = [None, None];
        for format in self.format.formats() {
            ctx.stop.check()?;
            // Computed as the folder will be: with codes, or with the weights they stand for.
            let packed = Packed(ctx.model);
            let source: &dyn WeightSource = match format {
                Format::Fewbit => &packed,
                _ => ctx.model,
            };
            let known = &mut measured[usize::from(format == Format::Fewbit)];
            let trained = match known.take() {
                Some(trained) => trained,
                None => gauge.measure(&ctx.model.config, source, ctx.model.tap())?,
            };
            let trained = known.insert(trained);
            let target = ctx.run_dir.join("export").join(format.name());
            let parts = ModelParts {
                dir: &ctx.model.dir,
                source: &ctx.model.checkpoint,
                quantized: &ctx.model.quantized,
                dense: &dense,
                activations: ctx.model.activations.if_on(),
                provenance: ctx.provenance.clone(),
            };
            let gate = Gate { gauge: &gauge, trained };
            let exported = export::write(&parts, format, &self.format, &target, &gate)?;
            if format == Format::Dequantized && ctx.model.activations.quant.is_on() {
                let text = "other runtimes read this folder as a dense model with float activations; \
                            fewbit quantizes them as manifest.json says";
                ctx.report.emit(&Event::Note { text: text.to_owned() });
            }
            bar.clear();
            let parity = checked(&exported, trained, ctx.model.quantized.is_empty());
            ctx.report.emit(&Event::Exported {
                format: format.name().to_owned(),
                path: exported.path.display().to_string(),
                bytes: exported.bytes,
                bits_per_weight: exported.bits_per_weight,
                bits_per_parameter: exported.bits_per_parameter,
                parity,
                seconds: exported.seconds,
            });
            ctx.results.exports.retain(|record| record.format != format.name());
            ctx.results.exports.push(ExportRecord {
                format: format.name().to_owned(),
                path: exported.path,
                bytes: exported.bytes,
                bits_per_weight: exported.bits_per_weight,
                lossy: exported.lossy,
            });
        }
        Ok(())
    }
}

/// How far each quantized linear is from the float model's. None of a run that has no float model, and none
/// of blocks whose norms were changed to balance inputs: there the weights are others by design.
fn weight_errors(ctx: &StageContext<'_>) -> Result<BTreeMap<String, f64>> {
    let model = &*ctx.model;
    let Ok(float) = model.float() else { return Ok(BTreeMap::new()) };
    let float = model.tuned_on(float);
    let block = |name: &str| model.config.inner(name).map(|(block, _)| block);
    let balanced: BTreeSet<usize> = model.dense.keys().filter_map(|name| block(name)).collect();
    let mut errors = BTreeMap::new();
    for (name, (weight, _)) in &model.quantized {
        ctx.stop.check()?;
        if block(name).is_some_and(|block| balanced.contains(&block)) {
            continue;
        }
        let trained =
            float.weight(&weight_name(name), &[weight.layout.out, weight.layout.inputs])?;
        let loss = Loss::between(&trained, &weight.dequantize());
        errors.insert(name.clone(), loss.map_or(0.0, |loss| loss.relative));
    }
    Ok(errors)
}

/// The protocol of the last evaluation of this run, so that a folder says the number that the run
/// said; but of no more text than tells two models apart.
fn protocol(ctx: &StageContext<'_>, stream: &TokenStream) -> PplConfig {
    let perplexity = |measured: &Measured| measured.task.perplexity().cloned();
    // An export that was lost and is written again knows no more than the first one did.
    let before = ctx.results.measured.iter().filter(|measured| measured.stage < ctx.stage);
    let task = before.rev().find_map(perplexity).unwrap_or_default();
    let Ok((context, _)) = task.windows(&ctx.model.config, stream.packed) else {
        return PplConfig { windows: Some(PARITY_WINDOWS), ..PplConfig::default() };
    };
    let most = (PARITY_TOKENS / context).max(1);
    let whole = stream.tokens.len() <= PARITY_TOKENS;
    let windows = if whole { task.windows } else { Some(task.windows.unwrap_or(most).min(most)) };
    PplConfig { windows, ..task }
}

/// What the gate found, in a few words.
fn checked(exported: &Exported, trained: &Gauged, dense: bool) -> String {
    let weights = if dense { "weights" } else { "codes" };
    let worst = exported.losses.values().map(|loss| loss.relative).fold(0.0, f64::max);
    match (&trained.perplexity, &exported.gauged.perplexity) {
        (Some(before), Some(after)) if exported.lossy => format!(
            "lossy: {} linears changed by up to {:.2} %, perplexity {:.4} to {:.4}",
            exported.losses.len(),
            100.0 * worst,
            before.perplexity,
            after.perplexity
        ),
        _ if exported.lossy => format!(
            "lossy: {} linears changed by up to {:.2} %",
            exported.losses.len(),
            100.0 * worst
        ),
        (Some(_), _) => format!("{weights}, logits and perplexity exact"),
        (None, _) => format!("{weights} and logits exact"),
    }
}
