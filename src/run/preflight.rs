//! The preflight: everything that can be refused is refused before a weight is read, and what the
//! run will need is estimated.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Instant;

use burn::tensor::{Device, Distribution, Tensor};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{Fingerprint, Options, RunFolder};
use crate::data::{Marks, TokenStream, Tokenizer, sha256_of};
use crate::device::{self, NamedDevice};
use crate::error::{Error, Kind, Result};
use crate::export::{
    ActivationRecord, Format, FormatsConfig, GridRecord, Manifest, OpenModel, open_float,
};
use crate::model::{companions, open_folder};
use crate::quant::{GroupAxis, GroupSize, QuantSpec, Repr, ScaleDigits, Symmetry};
use crate::recipe::{self, Base, DataConfig, Paths, Plan, Recipe, to_toml};
use crate::report::{Event, memory, size};
use crate::stage::{Corpus, Data, Lever, ModelState, Scene, Speed, StandIns};
use crate::stop::StopFlag;
use crate::store::folder::{free_bytes, sha256_file};
use crate::store::{hex, locate};

/// Window length when neither the recipe nor the model says less.
const DEFAULT_LENGTH: usize = 2048;
/// Memory of the process itself: code, tokenizer, buffers.
const BASE_BYTES: u64 = 150 << 20;

/// A run that passed the preflight.
pub struct Prepared {
    /// The plan.
    pub plan: Plan,
    /// The device.
    pub device: NamedDevice,
    /// The model; no weight read yet.
    pub model: ModelState,
    /// The data, tokenized.
    pub data: Data,
    /// What checkpoints depend on.
    pub fingerprint: Fingerprint,
    /// What the run will need.
    pub needs: Needs,
    /// What its weights will take in the format that it is for.
    pub target: Option<Target>,
    /// What is scarce but may do, a sentence.
    pub scarce: Option<String>,
}

/// What the weights of a run will take in the format that it is for.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Target {
    /// The format.
    pub format: Format,
    /// The digits that its scales are trained to.
    pub scales: ScaleDigits,
    /// Bits of a quantized weight, scales included.
    pub bits_per_weight: f64,
}

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

/// Reads the recipe, opens device, model headers and data, and type-checks the plan.
///
/// # Errors
/// Exit 2 for the recipe, exit 3 for what does not fit.
pub fn prepare(options: &Options, stop: &StopFlag) -> Result<Prepared> {
    let (text, file) = recipe::find(&options.recipe)?;
    let (mut recipe, _): (Recipe, _) = recipe::parse(&text, &file, &options.set)?;
    if let Some(output) = &options.output {
        recipe.output.clone_from(output);
    }
    if let Some(device) = &options.device {
        recipe.device.clone_from(device);
    }
    let device = device::open(&recipe.device)?;
    let model = open_model(&recipe)?;
    let mut plan = Plan::new(recipe, &model.config, &base_of(&model), &text, &options.set)?;
    let target = settle_target(&mut plan, &model, &device)?;
    stop.check()?;
    let data = load_data(&plan, &model)?;
    check_data(&plan, &model, &data)?;
    check_exports(&plan, &model, &device)?;
    let fingerprint = fingerprint(&plan, &model, &data)?;
    let (needs, peaks) = Needs::estimate(&plan, &model, &data, &device);
    let scarce = None;
    let prepared = Prepared { plan, device, model, data, fingerprint, needs, target, scarce };
    RunFolder::check(&prepared, options.fresh)?;
    let scarce = prepared.needs.check(&peaks, &prepared.plan.recipe.output)?;
    Ok(Prepared { scarce, ..prepared })
}

fn open_model(recipe: &Recipe) -> Result<ModelState> {
    let dir = locate::model(&recipe.model.path).map_err(|e| e.at("model.path"))?;
    let manifest = Manifest::read(&dir)?.filter(|manifest| manifest.format == Format::Fewbit);
    let packed = manifest.is_some().then(|| crate::export::open_model(&dir)).transpose()?;
    let recorded = packed.as_ref().and_then(|packed| packed.manifest.as_ref());
    let recorded = recorded.and_then(|manifest| manifest.activations.clone());
    let name = recipe.model.path.trim_end_matches('/');
    let name = name.rsplit(['/', ':']).next().unwrap_or(name).to_owned();
    let as_preflight = |error: Error| match error.kind() {
        Kind::Failed => error.with_kind(Kind::Preflight),
        _ => error,
    };
    let (config, checkpoint, dir) = if packed.is_some() {
        let (config, checkpoint) = open_folder(&dir).map_err(as_preflight)?;
        (config, checkpoint, dir)
    } else {
        open_float(&dir).map_err(as_preflight)?
    };
    let teacher = recipe.model.teacher.as_ref().map(|path| {
        let at = |error: Error| error.at("model.teacher");
        let folder = locate::model(path).map_err(at)?;
        let (own, teacher, _) = open_float(&folder).map_err(at)?;
        match config.differs(&own) {
            None => Ok(teacher),
            Some(what) => Err(Error::preflight(format!(
                "the teacher is another model than the student: {what} differs"
            ))
            .at(format!("model.teacher, {}", folder.join("config.json").display()))
            .fix("the float model that model.path was made from")),
        }
    });
    let teacher = teacher.transpose()?;
    Ok(ModelState {
        config,
        checkpoint,
        quantized: BTreeMap::new(),
        latents: BTreeMap::new(),
        dense: BTreeMap::new(),
        tuned: BTreeMap::new(),
        activations: recorded
            .unwrap_or_else(|| ActivationRecord::new(recipe.quant.of_activations())),
        packed,
        teacher,
        dir,
        name,
    })
}

/// What the linears of a packed model are.
fn base_of(model: &ModelState) -> Base {
    let linears = model.packed.iter().flat_map(OpenModel::linears);
    let linears = linears.map(|(name, record)| {
        let group_size = match (record.group_len, record.shape) {
            (len, [out, inputs]) if len == out * inputs && out > 1 => GroupSize::PerTensor,
            (len, [out, inputs])
                if len == [inputs, out][usize::from(record.axis == GroupAxis::Out)] =>
            {
                GroupSize::PerChannel
            }
            (len, _) => NonZeroUsize::new(len).map_or(GroupSize::PerChannel, GroupSize::Of),
        };
        let spec = QuantSpec { bits: record.bits, group_size, symmetry: Symmetry::Asymmetric };
        let repr = match record.grid {
            GridRecord::Uniform { .. } => Repr::Uniform,
            GridRecord::BinaryCoding {} => Repr::BinaryCoding,
        };
        (name.clone(), (spec, repr))
    });
    Base { linears: linears.collect() }
}

fn load_data(plan: &Plan, model: &ModelState) -> Result<Data> {
    let section = &plan.recipe.data;
    let any = [&section.calibration, &section.train, &section.validation];
    if any.iter().all(|config| config.is_none()) {
        return Ok(Data::default());
    }
    let tokenizer = Tokenizer::load(&model.dir)?
        .fitting(model.config.vocab)
        .map_err(|e| e.at(model.dir.display()))?;
    let bos = match model.config.bos {
        _ if !section.bos => None,
        Some(bos) => Some(bos),
        None => tokenizer.bos_id()?,
    };
    let marks = Marks { bos, eos: model.config.eos.first().copied() };
    let load = |config: &Option<DataConfig>, role: &str| -> Result<Option<Corpus>> {
        let Some(config) = config else { return Ok(None) };
        let config = match (&config.path, &section.train) {
            (None, Some(train)) if role == "calibration" => {
                DataConfig { path: train.path.clone(), format: train.format, ..config.clone() }
            }
            _ => config.clone(),
        };
        let corpus = load_corpus(&config, model, &tokenizer, marks);
        corpus.map(Some).map_err(|e| e.at(format!("data.{role}")))
    };
    Ok(Data {
        // First: calibration may read the same text, and a fault is this table's then.
        train: load(&section.train, "train")?,
        calibration: load(&section.calibration, "calibration")?,
        validation: load(&section.validation, "validation")?,
        bos,
    })
}

fn load_corpus(
    config: &DataConfig,
    model: &ModelState,
    tokenizer: &Tokenizer,
    marks: Marks,
) -> Result<Corpus> {
    let length = config.length.unwrap_or(model.config.max_positions.min(DEFAULT_LENGTH));
    if length < 2 || length > model.config.max_positions {
        return Err(Error::preflight(format!(
            "length {length} is not between 2 and the model's context {}",
            model.config.max_positions
        ))
        .fix(format!("length = {}", model.config.max_positions.min(DEFAULT_LENGTH))));
    }
    let Some(Paths(paths)) = &config.path else {
        return Err(Error::usage("no text is named").fix("path = a file or a list of files"));
    };
    let names = paths.iter().map(|path| path.rsplit('/').next().unwrap_or(path));
    let names = names.collect::<Vec<_>>().join("+");
    let paths: Vec<PathBuf> = paths.iter().map(|path| locate::data(path)).collect::<Result<_>>()?;
    Ok(Corpus {
        stream: TokenStream::load(&paths, config.format, tokenizer, marks, length)?,
        format: config.format,
        sha256: sha256_of(&paths)?,
        name: names,
        samples: config.samples,
        length,
    })
}

/// Every stage finds the data it needs, and enough of it.
fn check_data(plan: &Plan, model: &ModelState, data: &Data) -> Result<()> {
    plan.stages.iter().try_for_each(|stage| stage.config.stage().check_data(model, data))
}

/// Decides the digits of scales for the format that the recipe is for.
fn settle_target(
    plan: &mut Plan,
    model: &ModelState,
    device: &NamedDevice,
) -> Result<Option<Target>> {
    let Some(format) = plan.recipe.quant.target else { return Ok(None) };
    let mut linears = StandIns::new(plan.start != Repr::Dense, model.config.head());
    let mut options = FormatsConfig::of(format, &[])?;
    for planned in &plan.stages {
        let stage = planned.config.stage();
        if let Some(asked) = stage.exports().filter(|asked| asked.keys(format).is_some()) {
            options = asked.clone();
        }
        linears.pass(stage.effect(), &planned.specs, planned.head, &planned.observer);
    }
    let all = [ScaleDigits::F32, ScaleDigits::F16, ScaleDigits::Bits7];
    let asked = [plan.recipe.quant.scales];
    let digits = if asked == [ScaleDigits::F32] { &all[..] } else { &asked[..] };
    let found = linears.smallest(format, &options, digits, model, &device.device);
    let at = format!("quant.target = \"{}\"", format.name());
    let Some((scales, bits_per_weight)) = found.map_err(|e| e.at(&at))? else {
        let what = "a target is chosen for before weights are coded, and model.path is packed";
        return Err(Error::usage(what)
            .at(at)
            .fix("quant.scales = \"f16\" or \"bits7\" in its place"));
    };
    plan.recipe.quant.scales = scales;
    Ok(Some(Target { format, scales, bits_per_weight }))
}

/// Every format will hold what the stages before it leave.
fn check_exports(plan: &Plan, model: &ModelState, device: &NamedDevice) -> Result<()> {
    let mut linears = StandIns::new(plan.start != Repr::Dense, model.config.head());
    for (index, planned) in plan.stages.iter().enumerate() {
        let stage = planned.config.stage();
        if let Some(formats) = stage.exports() {
            let digits = plan.recipe.quant.scales;
            let held = linears.check(formats, digits, model, &device.device);
            held.map_err(|e| e.at(format!("stage.{index}.{}", planned.config.name())))?;
        }
        linears.pass(stage.effect(), &planned.specs, planned.head, &planned.observer);
    }
    Ok(())
}

fn fingerprint(plan: &Plan, model: &ModelState, data: &Data) -> Result<Fingerprint> {
    let mut hash = Sha256::new();
    let mut files = vec![model.dir.join("config.json")];
    files.extend(model.checkpoint.files().iter().cloned());
    files.extend(companions(&model.dir)); // another tokenizer makes other tokens
    for file in files {
        hash.update(sha256_file(&file)?);
    }
    let corpora = [
        ("calibration", &data.calibration),
        ("train", &data.train),
        ("validation", &data.validation),
    ];
    Ok(Fingerprint {
        recipe: to_toml(&plan.recipe.clone().neutral())?,
        model: hex(&hash.finalize()),
        data: corpora
            .into_iter()
            .filter_map(|(role, corpus)| {
                corpus.as_ref().map(|corpus| (role.to_owned(), corpus.sha256.clone()))
            })
            .collect(),
    })
}

impl Prepared {
    /// What stays float: embedding, head, and linears that no stage quantizes.
    pub fn kept(&self) -> Vec<String> {
        let quantized = self.plan.quantized();
        let mut kept = vec!["embed".to_owned()];
        kept.extend((!quantized.contains(self.model.config.head())).then(|| "head".to_owned()));
        let linears = self.model.config.linears().map(|(name, _)| name);
        kept.extend(linears.filter(|name| !quantized.contains(name.as_str())));
        kept
    }
}

impl Needs {
    /// What the run needs, and what of main memory each stage does.
    fn estimate(
        plan: &Plan,
        model: &ModelState,
        data: &Data,
        device: &NamedDevice,
    ) -> (Self, Vec<Peak>) {
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
        };
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
        (needs, peaks)
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
    fn check(&self, peaks: &[Peak], output: &Path) -> Result<Option<String>> {
        let setting = |limit: u64| fitting(peaks, self.host_bytes.saturating_sub(limit));
        if let Some(total) = memory::total_bytes().filter(|total| *total < self.host_bytes) {
            let fix = setting(total).map_or_else(
                || "smaller ones, or a larger machine".to_owned(),
                |setting| format!("{setting}, or a larger machine"),
            );
            return Err(Error::preflight(format!(
                "the run needs about {} of memory, and this machine has {}",
                size(self.host_bytes),
                size(total)
            ))
            .at("batch, length and samples of the recipe")
            .fix(fix));
        }
        let free = memory::available_bytes().filter(|free| *free < self.host_bytes);
        let scarce = free.map(|free| {
            let fits = setting(free).map_or_else(String::new, |s| format!("; {s} would fit"));
            let (needed, free) = (size(self.host_bytes), size(free));
            format!("the run needs about {needed} of memory, and {free} are free now{fits}")
        });
        match free_bytes(output) {
            Some(free) if free < self.disk_bytes => Err(Error::preflight(format!(
                "the run needs about {} of disk, and {} are free",
                size(self.disk_bytes),
                size(free)
            ))
            .at(output.display())
            .fix("free some space, or --output on another disk")),
            _ => Ok(scarce),
        }
    }
}

/// What of main memory one stage needs, and the setting it grows with, by its full key.
struct Peak {
    bytes: u64,
    lever: Option<(String, Lever)>,
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
}
