//! What a stage works with while it runs, and what it does with what it has made: folding, saving,
//! taking it into the model, and saying so.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::nn::Linear;
use burn::tensor::DType;

use super::corpus::Data;
use super::results::Results;
use super::state::{LatentFile, ModelState};
use super::states::mark;
use crate::device::NamedDevice;
use crate::error::{Error, Result};
use crate::export::Provenance;
use crate::export::fewbit::{Saved, latent_names};
use crate::method;
use crate::quant::{
    CodedWeight, Grid, Learned, ObserverConfig, QuantSpec, QuantizedWeight, ScaleDigits,
};
use crate::report::{Event, Reporter, Reporters};
use crate::stop::StopFlag;

/// Everything a stage may touch, nothing else.
pub struct StageContext<'a> {
    /// The model.
    pub model: &'a mut ModelState,
    /// The data.
    pub data: &'a Data,
    /// Where tensors live.
    pub device: &'a NamedDevice,
    /// The type activations are computed in (latent weights and scales are always f32).
    pub compute: DType,
    /// Seed of the run.
    pub seed: u64,
    /// Index of this stage.
    pub stage: usize,
    /// Index of the last stage that quantized, this one included: names the current model.
    pub latest: &'static str,
    /// Steps of all earlier stages.
    pub first_step: u64,
    /// Whether no later stage has begun.
    pub is_last: bool,
    /// Steps of this stage.
    pub steps: u64,
    /// Index of the last earlier stage that changed the model.
    pub left_by: Option<usize>,
    /// What this stage quantizes, by linear.
    pub specs: &'a BTreeMap<String, QuantSpec>,
    /// Whether a later stage may go on from this one's latent weights.
    pub keeps_latents: bool,
    /// What this stage rounds the output head to.
    pub head: Option<QuantSpec>,
    /// The observer of this stage's grids.
    pub observer: &'a ObserverConfig,
    /// `[quant]`, the stage's overrides aside: baselines use its grouping.
    pub default_spec: QuantSpec,
    /// The numbers that scales are, of what this stage leaves.
    pub scales: ScaleDigits,
    /// This stage's folder under `checkpoints/`.
    pub dir: &'a Path,
    /// The run's folder.
    pub run_dir: &'a Path,
    /// Where reports go.
    pub report: &'a mut Reporters,
    /// Set by signals.
    pub stop: &'a StopFlag,
    /// Results so far.
    pub results: &'a mut Results,
    /// Provenance of exports.
    pub provenance: &'a Provenance,
}

impl StageContext<'_> {
    /// The step of a training of `steps` from which scales have as few digits as what the stage
    /// leaves: its last tenth, so that everything else settles on them.
    pub(super) fn shortens_at(&self, steps: u64) -> u64 {
        match self.scales {
            ScaleDigits::F32 => u64::MAX,
            ScaleDigits::F16 | ScaleDigits::Bits7 => steps - steps / 10,
        }
    }

    /// The codes that an earlier stage left of a linear, with what learns of their grid; forwards see the
    /// weight in `compute`.
    pub(super) fn coded(
        &self,
        name: &str,
        learned: Learned,
        compute: DType,
    ) -> Result<CodedWeight> {
        let Some(weight) = self.model.now(name)? else {
            return Err(Error::failed("no stage has left codes of this linear").at(name));
        };
        Ok(CodedWeight::new(&weight, learned, compute, &self.device.device))
    }

    /// Folds one linear and checks the law on the real tensor: the folded weight is the
    /// fake-quantized one, bit for bit on a CPU (a GPU may differ in the last bit; recorded).
    pub(super) fn fold(&mut self, name: &str, linear: &Linear) -> Result<QuantizedWeight> {
        let folded = method::fold(&linear.weight)
            .ok_or_else(|| Error::failed("nothing to fold").at(name))?
            .map_err(|e| e.at(name))?;
        let trained = linear.weight.val().transpose();
        // In bf16 the forward sees the same weights rounded; there is nothing to compare.
        let widest = if trained.dtype() == DType::F32 {
            let trained = trained.into_data();
            let pairs = trained.iter::<f32>().zip(folded.dequantize());
            pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
        } else {
            0.0
        };
        self.results.fold_difference = self.results.fold_difference.max(widest);
        if widest > 0.0 && self.device.name == "cpu" {
            return Err(Error::gate(format!("the folded weight differs by {widest:e}")).at(name));
        }
        folded.with_scales(self.scales).map_err(|e| e.at(name))
    }

    /// Emits the code histogram of everything quantized so far, one per width, after `step` steps, or blocks, of
    /// this stage.
    pub(super) fn report_codes(&mut self, step: u64) {
        let mut widths: BTreeMap<u8, crate::quant::CodeHistogram> = BTreeMap::new();
        for (weight, _) in self.model.quantized.values() {
            let histogram = weight.histogram();
            widths
                .entry(weight.bits.get())
                .and_modify(|sum| sum.merge(&histogram))
                .or_insert(histogram);
        }
        for (bits, histogram) in widths {
            let edges = (0..=histogram.0.len()).map(|code| code as f64 - 0.5).collect();
            self.report.emit(&Event::Histogram {
                stage: self.stage,
                tag: format!("codes/{}_w{bits}", self.latest),
                step,
                global_step: self.first_step + self.steps,
                edges,
                counts: histogram.0,
            });
        }
    }

    /// Emits how far learned steps moved from where they started, `ln(scale / start)`; `at` is as
    /// [`StageContext::report_codes`]'s, and the number of steps done.
    pub(super) fn report_scale_change(&mut self, changes: &[f32], at: [u64; 2]) {
        const BUCKETS: usize = 40;
        let (low, high) =
            changes.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), c| {
                (low.min(f64::from(*c)), high.max(f64::from(*c)))
            });
        if changes.is_empty() || !(high - low).is_finite() {
            return;
        }
        let width = ((high - low) / BUCKETS as f64).max(1e-12);
        let mut counts = vec![0; BUCKETS];
        for change in changes {
            let bucket = ((f64::from(*change) - low) / width) as usize;
            counts[bucket.min(BUCKETS - 1)] += 1;
        }
        self.report.emit(&Event::Histogram {
            stage: self.stage,
            tag: format!("scale_change/{}", self.latest),
            step: at[0],
            global_step: self.first_step + at[1],
            edges: (0..=BUCKETS).map(|i| low + width * i as f64).collect(),
            counts,
        });
    }

    /// The file of block `index`'s linears in this stage.
    pub(super) fn block_file(&self, index: usize) -> PathBuf {
        block_file(self.dir, index)
    }

    /// What block `index` of this stage, once saved, is called in reports.
    pub(super) fn block_mark(&self, index: usize) -> String {
        mark(self.dir, &format!("block-{index:04}"))
    }

    /// Says that this stage goes on from a state of its own. Where it is done again because something
    /// was lost, what later stages reported stays.
    pub(super) fn say_resumed(&mut self, stage: &str, position: String, mark: &str) {
        let mark = if self.is_last { mark.to_owned() } else { String::new() };
        self.report.emit(&Event::Resumed { stage: stage.to_owned(), position, mark });
    }

    /// Loads every linear this stage saved.
    pub(super) fn restore_linears(&mut self) -> Result<()> {
        for index in 0..self.model.config.n_blocks {
            let path = self.block_file(index);
            if path.exists() {
                self.take(Saved::read(&path)?, &path)?;
            }
        }
        let grids = self.model.activations.check(&self.model.config);
        grids.map_err(|e| e.at(self.dir.display()).fix("--fresh to start over"))?;
        for name in self.specs.keys() {
            if !self.model.quantized.contains_key(name) {
                return Err(Error::failed("a finished stage lacks a linear")
                    .at(self.dir.display())
                    .at(name)
                    .fix("--fresh to start over"));
            }
        }
        Ok(())
    }

    /// Puts what a stage made into the model.
    pub(super) fn take(&mut self, mut saved: Saved, file: &Path) -> Result<()> {
        self.note_latents(&saved, file);
        self.model.activations.take(&self.model.config, &mut saved.dense)?;
        for (name, weight, method) in saved.linears {
            self.model.quantized.insert(name, (weight, method));
        }
        self.model.dense.extend(saved.dense);
        Ok(())
    }

    /// Saves what a stage made of a block, then takes it.
    pub(super) fn save_block(&mut self, index: usize, saved: Saved) -> Result<()> {
        let path = self.block_file(index);
        saved.write(&path)?;
        self.take(saved, &path)
    }

    /// Notes where the latents of what a stage made are: beside it, where they were where it left the codes and
    /// moved no more than the steps of even levels, or nowhere any more.
    fn note_latents(&mut self, saved: &Saved, file: &Path) {
        for (name, weight, _) in &saved.linears {
            let [latent, _] = latent_names(name);
            let waits = |(left, _): &(QuantizedWeight, String)| {
                matches!(weight.grid, Grid::Uniform { .. })
                    && (left.bits, left.layout) == (weight.bits, weight.layout)
                    && left.codes == weight.codes
            };
            if saved.latents.contains_key(&latent) {
                self.model.latents.insert(name.clone(), LatentFile(file.to_owned()));
            } else if !self.model.quantized.get(name).is_some_and(waits) {
                self.model.latents.remove(name);
            }
        }
    }

    /// Notes a block's errors, `[before, after]`, in the results.
    pub(super) fn note_block(&mut self, index: usize, mse: [f64; 2]) {
        let list = self.results.block_mse.entry(self.stage).or_default();
        list.truncate(index);
        list.push(mse);
    }
}

/// The file of block `index`'s linears in a stage's folder.
pub(super) fn block_file(dir: &Path, index: usize) -> PathBuf {
    dir.join(format!("block-{index:04}.safetensors"))
}

/// A block's errors as its checkpoint carries them.
pub(super) fn with_mse(
    mut metadata: BTreeMap<String, String>,
    mse: [f64; 2],
) -> BTreeMap<String, String> {
    for (key, mse) in MSE_KEYS.into_iter().zip(mse) {
        metadata.insert(key.to_owned(), format!("{mse:e}"));
    }
    metadata
}

/// What [`with_mse`] put there, `[before, after]`.
pub(super) fn saved_mse(saved: &Saved) -> [f64; 2] {
    MSE_KEYS
        .map(|key| saved.metadata.get(key).and_then(|text| text.parse().ok()).unwrap_or(f64::NAN))
}

const MSE_KEYS: [&str; 2] = ["mse_before", "mse_after"];
