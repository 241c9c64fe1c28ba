//! Settings that make a run fit: where stages keep what they work on, and what their memory grows with.

use super::needs::Codes;
use crate::recipe::{Plan, PlannedStage};
use crate::report::size;
use crate::stage::{Cost, Lever, Memory, Scene, Stage};

/// Chooses where each stage keeps what it works on: the fastest place that `room` bytes of main memory allow. A
/// device's own memory is not known: what is kept there is the recipe's to say.
pub(super) fn choose_memory(
    plan: &mut Plan,
    scene: &mut Scene<'_>,
    room: Option<u64>,
) -> Vec<String> {
    let Some(room) = room else { return Vec::new() };
    let (mut chosen, mut codes) = (Vec::new(), Codes::of(scene.model));
    for (index, planned) in plan.stages.iter_mut().enumerate() {
        codes.enter(scene, planned);
        let name = planned.config.name();
        let places = planned.config.stage().places();
        let (Some(first), Some(last)) = (places.first(), places.last()) else { continue };
        let is_open = |stage: &mut dyn Stage| stage.memory().is_some_and(|asked| asked.is_none());
        // What a training keeps would be on the device, of which nobody knows how much it holds.
        let unknown = scene.discrete && places.contains(&Memory::Device);
        if unknown || !is_open(planned.config.stage_mut()) {
            continue;
        }
        let mut of = |memory| scene.in_memory(&cost_with(planned, scene, Some(memory)));
        let fits = places.iter().find(|memory| of(**memory) <= room);
        let memory = *fits.unwrap_or(last);
        let (fastest, needed) = (of(*first), of(memory));
        // Where it makes no difference, the fastest.
        let memory = if needed < fastest { memory } else { *first };
        cost_with(planned, scene, Some(memory));
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

/// What a stage costs with another place for what it keeps, which it has from then on.
fn cost_with(planned: &mut PlannedStage, scene: &Scene<'_>, memory: Option<Memory>) -> Cost {
    if let Some(asked) = planned.config.stage_mut().memory() {
        *asked = memory;
    }
    planned.config.stage().cost(scene)
}

/// What of main memory one stage needs, and the settings it changes with, by their full keys.
pub(crate) struct Peak {
    bytes: u64,
    lever: Option<(String, Lever)>,
    /// Smaller places for what it keeps, as a setting, with what it needs then.
    places: Vec<(String, u64)>,
}

impl Peak {
    /// That of stage `index`, which costs so much, in a process that has `base` bytes without it.
    pub(super) fn of(
        index: usize,
        planned: &mut PlannedStage,
        scene: &Scene<'_>,
        base: u64,
        cost: &Cost,
    ) -> Self {
        let table = format!("stage.{index}.{}", planned.config.name());
        let bytes = base + scene.in_memory(cost);
        // A key with dots stands where the recipe has it.
        let key = |lever: Lever| {
            let own = !lever.key.contains('.');
            (if own { format!("{table}.{}", lever.key) } else { lever.key.to_owned() }, lever)
        };
        let lever = cost.lever.filter(|lever| lever.bytes > 0);
        let lever = lever.filter(|lever| !scene.discrete || lever.key.contains('.')).map(key);
        let mut places = Vec::new();
        let now = planned.config.stage_mut().memory().copied();
        if let Some(now) = now {
            for memory in planned.config.stage().places() {
                let needed = base + scene.in_memory(&cost_with(planned, scene, Some(*memory)));
                if needed < bytes {
                    places.push((format!("{table}.memory = \"{}\"", memory.name()), needed));
                }
            }
            cost_with(planned, scene, now);
        }
        Self { bytes, lever, places }
    }

    /// What makes the stage smaller, in words; empty where nothing does.
    pub(super) fn smaller(&self) -> String {
        let lever = self.lever.as_ref().filter(|(_, lever)| lever.value > 1);
        let lever = lever.map(|(key, lever)| format!("a smaller {key} than {}", lever.value));
        let place = self.places.first().map(|(setting, _)| setting.clone());
        place.into_iter().chain(lever).collect::<Vec<_>>().join(", or ")
    }
}

/// The settings that take `over` bytes off the largest of the peaks, whichever it is then: another place for each
/// stage that is too large, else less of what the largest grows with.
pub(super) fn fitting(peaks: &[Peak], over: u64) -> Option<String> {
    let largest = peaks.iter().max_by_key(|peak| peak.bytes)?;
    let limit = largest.bytes - over.min(largest.bytes);
    let large = peaks.iter().filter(|peak| peak.bytes > limit);
    let place = |peak: &Peak| {
        let fits = peak.places.iter().find(|(_, bytes)| *bytes <= limit);
        fits.map(|(setting, _)| setting.clone())
    };
    if let Some(settings) = large.map(place).collect::<Option<Vec<_>>>() {
        return Some(settings.join(", "));
    }
    let (key, lever) = largest.lever.as_ref()?;
    let value = lever.value.checked_sub(over.div_ceil(lever.bytes.max(1))).filter(|v| *v > 0)?;
    let with = |peak: &Peak| match &peak.lever {
        Some((other, lever)) if other == key => {
            peak.bytes.saturating_sub(lever.value.saturating_sub(value) * lever.bytes)
        }
        _ => peak.bytes,
    };
    peaks.iter().all(|peak| with(peak) <= limit).then(|| format!("{key} = {value}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_setting_that_fits_is_that_of_the_largest_stage() {
        let peak = |bytes, key: &str, value, each| Peak {
            bytes,
            lever: Some((key.to_owned(), Lever { key: "", value, bytes: each })),
            places: Vec::new(),
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
        assert_eq!(fitting(&[Peak { bytes: 10, lever: None, places: Vec::new() }], 5), None);
    }

    #[test]
    fn another_place_comes_before_a_smaller_setting() {
        let peak = |bytes, key: &str, places: &[(&str, u64)]| Peak {
            bytes,
            lever: Some((key.to_owned(), Lever { key: "", value: 8, bytes: 10 })),
            places: places.iter().map(|(setting, bytes)| ((*setting).to_owned(), *bytes)).collect(),
        };
        let peaks = [
            peak(100, "a.batch", &[("a.memory = \"host\"", 80), ("a.memory = \"disk\"", 30)]),
            peak(60, "b.batch", &[("b.memory = \"disk\"", 40)]),
        ];
        assert_eq!(fitting(&peaks, 15).as_deref(), Some("a.memory = \"host\""));
        assert_eq!(fitting(&peaks, 35).as_deref(), Some("a.memory = \"disk\""));
        assert_eq!(
            fitting(&peaks, 50).as_deref(),
            Some("a.memory = \"disk\", b.memory = \"disk\"")
        );
        // No place is small enough, nor is a smaller batch.
        assert_eq!(fitting(&peaks, 75), None);
    }
}
