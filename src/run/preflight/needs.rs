//! What a run will need, and whether this machine has it.

use std::path::Path;
use std::time::Instant;

use burn::tensor::{Device, Distribution, Tensor};
use serde::{Deserialize, Serialize};

use super::limits;
use crate::device::NamedDevice;
use crate::error::{Error, Result};
use crate::recipe::Plan;
use crate::report::{Event, size};
use crate::stage::{Data, Lever, ModelState, Scene, Speed, Stage};
use crate::store::folder::{bytes_below, free_bytes};

/// Memory of the process itself: code, tokenizer, buffers.
const BASE_BYTES: u64 = 150 << 20;

/// What a run will need: an estimate.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Needs {
    /// Memory on the device, when it has its own.
    pub device_bytes: Option<u64>,
    /// Main memory.
    pub host_bytes: u64,
    /// Disk space in the output folder.
    pub disk_bytes: u64,
    /// Seconds.
    pub seconds: f64,
}

impl Needs {
    /// What the run needs, and what of main memory each stage does. Where trainings keep their state, if the
    /// recipe leaves it open, is chosen on the way, and said in words where it is not the fastest.
    pub(super) fn estimate(
        plan: &mut Plan,
        model: &ModelState,
        data: &Data,
        device: &NamedDevice,
    ) -> (Self, Vec<Peak>, Vec<String>) {
        let config = &model.config;
        let linears: u64 =
            config.linears().map(|(_, spec)| spec.shape.iter().product::<usize>() as u64).sum();
        let heads = if config.tied { 1 } else { 2 };
        let scene = Scene {
            model,
            data,
            linears,
            block: linears / config.n_blocks.max(1) as u64,
            rest: (heads * config.head_shape().iter().product::<usize>()) as u64,
            speed: measure(&device.device),
            discrete: device.discrete,
        };
        let chosen = choose_memory(plan, &scene, limits::available());
        let (mut on_device, mut on_host, mut disk, mut seconds) = (0, linears, 0, 0.0);
        let mut peaks = Vec::new();
        for (index, stage) in plan.stages.iter().enumerate() {
            let cost = stage.config.stage().cost(&scene);
            on_device = on_device.max(cost.device);
            on_host = on_host.max(linears + cost.host);
            disk += cost.disk;
            seconds += cost.seconds;
            // A key with dots stands where the recipe has it.
            let key = |lever: Lever| {
                let own = !lever.key.contains('.');
                let table = format!("stage.{index}.{}.", stage.config.name());
                (if own { table + lever.key } else { lever.key.to_owned() }, lever)
            };
            let on_device = if device.discrete { 0 } else { cost.device };
            let lever = cost.lever.filter(|lever| !device.discrete || lever.key.contains('.'));
            peaks.push(Peak { bytes: cost.host + on_device, lever: lever.map(key) });
        }
        let host = BASE_BYTES + on_host + if device.discrete { 0 } else { on_device };
        let needs = Self {
            device_bytes: device.discrete.then_some(on_device),
            host_bytes: host,
            disk_bytes: disk + (1 << 20),
            seconds,
        };
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

/// Chooses where each training keeps its state: the fastest place that `room` bytes of main memory allow. A
/// device's own memory is not known: there it is the recipe's to say.
fn choose_memory(plan: &mut Plan, scene: &Scene<'_>, room: Option<u64>) -> Vec<String> {
    let Some(room) = room.filter(|_| !scene.discrete) else { return Vec::new() };
    let mut chosen = Vec::new();
    for (index, planned) in plan.stages.iter_mut().enumerate() {
        let name = planned.config.name();
        let is_open = |stage: &mut dyn Stage| stage.memory().is_some_and(|asked| asked.is_none());
        if !is_open(planned.config.stage_mut()) {
            continue;
        }
        let places = planned.config.stage().places();
        let mut of = |memory| {
            if let Some(asked) = planned.config.stage_mut().memory() {
                *asked = Some(memory);
            }
            let cost = planned.config.stage().cost(scene);
            BASE_BYTES + scene.linears + cost.host + cost.device
        };
        let (Some(first), Some(last)) = (places.first(), places.last()) else { continue };
        let fits = places.iter().find(|memory| of(**memory) <= room);
        let memory = *fits.unwrap_or(last);
        let (fastest, needed) = (of(*first), of(memory));
        if memory != *first {
            chosen.push(format!(
                "stage.{index}.{name}.memory = \"{}\": {} of memory in place of {}, and the same numbers",
                memory.name(),
                size(needed),
                size(fastest)
            ));
        }
    }
    chosen
}

/// What of main memory one stage needs, and the setting it grows with, by its full key.
pub(super) struct Peak {
    bytes: u64,
    lever: Option<(String, Lever)>,
}

impl Peak {
    /// What makes the stage smaller, in words; empty where nothing does.
    pub(super) fn smaller(&self) -> String {
        let lever = self.lever.as_ref().filter(|(_, lever)| lever.value > 1);
        lever.map_or_else(String::new, |(key, lever)| {
            format!("a smaller {key} than {}", lever.value)
        })
    }
}

/// The setting that takes `over` bytes off the largest of the peaks, whichever it is then.
fn fitting(peaks: &[Peak], over: u64) -> Option<String> {
    let largest = peaks.iter().max_by_key(|peak| peak.bytes)?;
    let (key, lever) = largest.lever.as_ref()?;
    let value = lever.value.checked_sub(over.div_ceil(lever.bytes.max(1))).filter(|v| *v > 0)?;
    let limit = largest.bytes - over.min(largest.bytes);
    let with = |peak: &Peak| match &peak.lever {
        Some((other, lever)) if other == key => {
            peak.bytes.saturating_sub(lever.value.saturating_sub(value) * lever.bytes)
        }
        _ => peak.bytes,
    };
    peaks.iter().all(|peak| with(peak) <= limit).then(|| format!("{key} = {value}"))
}

/// What a device reaches in about a tenth of a second of work of the kind that training does.
fn measure(device: &Device) -> Speed {
    const SIDE: usize = 384;
    /// Too large for the caches, as activations are.
    const WIDE: usize = 1536;
    let random = |side| Tensor::<2>::random([side, side], Distribution::Default, device);
    let time = |work: &dyn Fn() -> Tensor<2>, times: u32| {
        let finish = |tensor: Tensor<2>| tensor.sum().into_scalar::<f32>();
        finish(work());
        let start = Instant::now();
        for _ in 1..times {
            drop(work());
        }
        finish(work());
        start.elapsed().as_secs_f64() / f64::from(times)
    };
    let (a, b) = (random(SIDE), random(SIDE));
    let product = time(&|| a.clone().matmul(b.clone()), 8);
    let (a, b) = (random(WIDE), random(WIDE));
    let sum = time(&|| a.clone() + b.clone(), 6);
    let tiny = random(8);
    let launch = time(&|| tiny.clone() + 1.0, 64);
    Speed {
        flops: 2.0 * (SIDE as f64).powi(3) / product,
        bytes: 12.0 * (WIDE as f64).powi(2) / sum,
        launch,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_setting_that_fits_is_that_of_the_largest_stage() {
        let peak = |bytes, key: &str, value, each| Peak {
            bytes,
            lever: Some((key.to_owned(), Lever { key: "", value, bytes: each })),
        };
        let samples = |bytes, each| peak(bytes, "data.calibration.samples", 128, each);
        let batch = peak(500, "stage.1.distill.batch", 8, 50);
        let peaks = [samples(1400, 10), batch];
        assert_eq!(fitting(&peaks, 405).as_deref(), Some("data.calibration.samples = 87"));
        // Then the other one would be too large, or this one cannot be small enough.
        assert_eq!(fitting(&peaks, 950), None);
        assert_eq!(fitting(&[samples(2000, 10)], 1280), None);
        // The same key makes both smaller.
        let peaks = [samples(1400, 10), samples(1200, 8)];
        assert_eq!(fitting(&peaks, 300).as_deref(), Some("data.calibration.samples = 98"));
        assert_eq!(fitting(&[Peak { bytes: 10, lever: None }], 5), None);
    }

    #[test]
    fn what_a_run_has_written_takes_no_more_room() {
        const GB: u64 = 1_000_000_000;
        let dir = tempfile::tempdir().unwrap();
        let Some(free) = free_bytes(dir.path()) else { return };
        let of = |disk_bytes| {
            let needs = Needs { device_bytes: None, host_bytes: 0, disk_bytes, seconds: 0.0 };
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
