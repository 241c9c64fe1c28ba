//! What a run will need, and whether this machine has it.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::fit::{Peak, choose_memory, fitting};
use super::limits;
use crate::device::NamedDevice;
use crate::error::{Error, Result};
use crate::export::OpenModel;
use crate::quant::QuantSpec;
use crate::recipe::{Plan, PlannedStage, QuantSection};
use crate::report::{Event, memory, size};
use crate::stage::{Data, ModelState, Probe, Scene, Speed};
use crate::stop::StopFlag;
use crate::store::folder::{bytes_below, free_bytes};

/// Memory of the process itself where the system does not tell: code, tokenizer, texts.
const BASE_BYTES: u64 = 100 << 20;
/// What else the process grows by: threads with their stacks and their parts of the allocator, buffers.
const GROWTH_BYTES: u64 = 8 << 20;

/// What a run will need: an estimate.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Needs {
    /// Memory on the device, when it has its own.
    pub device_bytes: Option<u64>,
    /// Main memory.
    pub host_bytes: u64,
    /// Disk space in the output folder.
    pub disk_bytes: u64,
    /// Seconds.
    pub seconds: f64,
    /// Whether the seconds rest on a timed probe of one block.
    #[serde(default)]
    pub probed: bool,
    /// What an hour of the machine costs, where that was said, and the run by the estimate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub price: Option<Price>,
    /// Stage by stage.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stages: Vec<StageNeeds>,
}

/// What a run costs.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
pub struct Price {
    /// An hour, in whatever currency it was said.
    pub per_hour: f64,
    /// The run.
    pub run: f64,
}

impl Price {
    /// Of a run of so many seconds.
    pub fn of(per_hour: f64, seconds: f64) -> Self {
        Self { per_hour, run: per_hour * seconds / 3600.0 }
    }
}

/// What a stage will need: an estimate.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct StageNeeds {
    /// Memory on the device, when it has its own.
    pub device_bytes: Option<u64>,
    /// Main memory while it runs, what is there before included.
    pub host_bytes: u64,
    /// Disk space that it fills.
    pub disk_bytes: u64,
    /// Seconds.
    pub seconds: f64,
}

/// How an estimate is made.
#[derive(Clone, Copy, Debug)]
pub(super) struct Means<'a> {
    /// Whether one block is timed for it.
    pub probe: bool,
    /// What an hour costs.
    pub price_per_hour: Option<f64>,
    /// Ends the probe.
    pub stop: &'a StopFlag,
}

impl Needs {
    /// What the run needs, and what of main memory each stage does. Where stages keep their state, if the
    /// recipe leaves it open, is chosen on the way, and said in words where it is not the fastest.
    pub(super) fn estimate(
        plan: &mut Plan,
        model: &ModelState,
        data: &Data,
        device: &NamedDevice,
        means: Means<'_>,
    ) -> (Self, Vec<Peak>, Vec<String>) {
        // Texts and headers are there already; what was there for a moment may be the most there ever is.
        let bytes = |gib: Option<f64>| gib.map(|gib| (gib * f64::from(1 << 30)) as u64);
        let base = bytes(memory::current_gib()).unwrap_or(BASE_BYTES) + GROWTH_BYTES;
        let before = bytes(memory::peak_gib()).unwrap_or(base);
        let mut scene = scene(plan, model, data, device, means);
        let room = limits::available().map(|room| room.saturating_sub(GROWTH_BYTES));
        let chosen = choose_memory(plan, &mut scene, room);
        let mut needs = Self { host_bytes: before, disk_bytes: 1 << 20, ..Self::default() };
        let (mut peaks, mut codes) = (Vec::new(), Codes::of(model));
        for (index, planned) in plan.stages.iter_mut().enumerate() {
            codes.enter(&mut scene, planned);
            let cost = planned.config.stage().cost(&scene);
            let host = base + scene.in_memory(&cost);
            needs.host_bytes = needs.host_bytes.max(host);
            needs.disk_bytes += cost.disk;
            needs.seconds += cost.seconds;
            let device_bytes = device.discrete.then_some(cost.device);
            needs.device_bytes = needs.device_bytes.max(device_bytes);
            needs.stages.push(StageNeeds {
                device_bytes,
                host_bytes: host,
                disk_bytes: cost.disk,
                seconds: cost.seconds,
            });
            peaks.push(Peak::of(index, planned, &scene, base, &cost));
        }
        needs.probed = means.probe;
        needs.price = means.price_per_hour.map(|per_hour| Price::of(per_hour, needs.seconds));
        (needs, peaks, chosen)
    }

    /// The event that shows it.
    pub fn event(&self, device: &NamedDevice) -> Event {
        Event::Needs {
            device: device.name.clone(),
            device_bytes: self.device_bytes,
            host_bytes: self.host_bytes,
            disk_bytes: self.disk_bytes,
            seconds: self.seconds,
        }
    }

    /// Refuses a disk or a memory that is too small for the run; says when only what is free now is.
    ///
    /// # Errors
    /// Exit 3, with both sizes and the setting that would fit.
    pub(super) fn check(&self, peaks: &[Peak], output: &Path) -> Result<Option<String>> {
        let setting = |limit: u64| fitting(peaks, self.host_bytes.saturating_sub(limit));
        if let Some(total) = limits::total().filter(|total| total.bytes < self.host_bytes) {
            let fix = setting(total.bytes).map_or_else(
                || "smaller ones, or a larger machine".to_owned(),
                |setting| format!("{setting}, or a larger machine"),
            );
            return Err(Error::preflight(format!(
                "the run needs about {} of memory, and {} {}",
                size(self.host_bytes),
                total.of,
                size(total.bytes)
            ))
            .at("batch, length and samples of the recipe")
            .fix(fix));
        }
        let free = limits::available().filter(|free| *free < self.host_bytes);
        let scarce = free.map(|free| {
            let fits = setting(free).map_or_else(String::new, |s| format!("; {s} would fit"));
            let (needed, free) = (size(self.host_bytes), size(free));
            format!("the run needs about {needed} of memory, and {free} are free now{fits}")
        });
        self.check_disk(output)?;
        Ok(scarce)
    }

    /// What a run that goes on has written already takes no more room.
    fn check_disk(&self, output: &Path) -> Result<()> {
        let there = bytes_below(output);
        let needed = self.disk_bytes.saturating_sub(there);
        let Some(free) = free_bytes(output).filter(|free| *free < needed) else { return Ok(()) };
        let more = if there > 0 { "more of disk" } else { "of disk" };
        Err(Error::preflight(format!(
            "the run needs about {} {more}, and {} are free",
            size(needed),
            size(free)
        ))
        .at(output.display())
        .fix("free some space, or --output on another disk"))
    }
}

/// What costs of a plan's stages depend on, before the first of them.
fn scene<'a>(
    plan: &Plan,
    model: &'a ModelState,
    data: &'a Data,
    device: &'a NamedDevice,
    means: Means<'a>,
) -> Scene<'a> {
    let config = &model.config;
    let size = |shape: [usize; 2]| shape.iter().product::<usize>() as u64;
    let of_block =
        |index: usize| config.specs(index).iter().map(|spec| size(spec.shape)).sum::<u64>();
    let head = size(config.head_shape());
    let values: usize =
        config.tensors().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
    let stored = model.checkpoint.total_bytes().div_ceil(values.max(1) as u64);
    let QuantSection { bits, group_size, symmetric: symmetry, .. } = plan.recipe.quant;
    Scene {
        model,
        data,
        linears: config.linears().map(|(_, spec)| size(spec.shape)).sum(),
        block: (0..config.n_blocks).map(of_block).max().unwrap_or(0),
        rest: if config.tied { head } else { 2 * head },
        speed: Speed::measure(&device.device),
        discrete: device.discrete,
        widest: config.linears().map(|(_, spec)| size(spec.shape)).max().unwrap_or(0),
        stored: stored.clamp(1, 4),
        codes: 0,
        spec: QuantSpec { bits, group_size, symmetry },
        observer: plan.recipe.quant.observer.clone(),
        probe: means.probe.then(|| Probe::new(model, &device.device, means.stop)),
    }
}

/// Bytes of the codes in main memory, by linear, on the way through a plan.
pub(super) struct Codes<'a> {
    model: &'a ModelState,
    bytes: BTreeMap<String, u64>,
}

impl<'a> Codes<'a> {
    /// Those of the model that a run starts from.
    pub(super) fn of(model: &'a ModelState) -> Self {
        let mut codes = Self { model, bytes: BTreeMap::new() };
        let packed = model.packed.iter().flat_map(OpenModel::linears);
        for (name, record) in packed {
            let len = record.shape.iter().product::<usize>() as u64;
            let groups = len / record.group_len.max(1) as u64;
            let bytes = len * u64::from(record.bits.get()) / 8 + 8 * groups;
            codes.bytes.insert(name.clone(), bytes);
        }
        codes
    }

    /// Goes into a stage: the scene knows what is there behind it, and how it quantizes.
    pub(super) fn enter(&mut self, scene: &mut Scene<'_>, stage: &PlannedStage) {
        let shapes = self.model.config.linear_shapes();
        for (name, [out, inputs]) in shapes {
            let Some(spec) = stage.specs.get(&name) else { continue };
            self.bytes.insert(name, bytes_of(spec, [out, inputs]));
        }
        scene.codes = self.bytes.values().sum();
        (scene.spec, scene.observer) = (stage.default_spec, stage.observer.clone());
    }
}

/// Codes, and a scale and a zero point for each group.
fn bytes_of(spec: &QuantSpec, shape: [usize; 2]) -> u64 {
    let len = shape.iter().product::<usize>() as u64;
    let groups = spec.layout(shape).map_or(0, |layout| layout.groups as u64);
    len * u64::from(spec.bits.get()) / 8 + 8 * groups
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_run_has_written_takes_no_more_room() {
        const GB: u64 = 1_000_000_000;
        let dir = tempfile::tempdir().unwrap();
        let Some(free) = free_bytes(dir.path()) else { return };
        let of = |disk_bytes| {
            let needs = Needs { disk_bytes, ..Needs::default() };
            needs.check_disk(dir.path())
        };
        // Half a gigabyte either way: others write to this disk as well.
        let needed = free + GB / 2;
        assert!(of(needed).unwrap_err().to_string().contains("of disk, and "));
        std::fs::create_dir(dir.path().join("checkpoints")).unwrap();
        let written = std::fs::File::create(dir.path().join("checkpoints/0")).unwrap();
        written.set_len(GB).unwrap(); // takes no room
        of(needed).unwrap();
        assert!(of(needed + GB).unwrap_err().to_string().contains("more of disk, and "));
    }
}
