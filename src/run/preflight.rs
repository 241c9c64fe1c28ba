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
use crate::export::{ActivationRecord, Format, GridRecord, Manifest, OpenModel};
use crate::model::{companions, open_folder};
use crate::quant::{GroupAxis, GroupSize, QuantSpec, Repr, Symmetry};
use crate::recipe::{self, Base, DataConfig, Paths, Plan, Recipe, to_toml};
use crate::report::{Event, memory, size};
use crate::stage::{Corpus, Data, ModelState, Scene, Speed, StageConfig};
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
    let plan = Plan::new(recipe, &model.config, &base_of(&model), &text, &options.set)?;
    stop.check()?;
    let data = load_data(&plan, &model)?;
    check_data(&plan, &model, &data)?;
    let fingerprint = fingerprint(&plan, &model, &data)?;
    let needs = Needs::estimate(&plan, &model, &data, &device);
    let prepared = Prepared { plan, device, model, data, fingerprint, needs };
    RunFolder::check(&prepared, options.fresh)?;
    prepared.needs.check(&prepared.plan.recipe.output)?;
    Ok(prepared)
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
    let (config, checkpoint) = open_folder(&dir).map_err(as_preflight)?;
    let teacher = recipe.model.teacher.as_ref().map(|path| {
        let at = |error: Error| error.at("model.teacher");
        let folder = locate::model(path).map_err(at)?;
        let (own, teacher) = open_folder(&folder).map_err(at)?;
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
        calibration: load(&section.calibration, "calibration")?,
        train: load(&section.train, "train")?,
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

fn fingerprint(plan: &Plan, model: &ModelState, data: &Data) -> Result<Fingerprint> {
    let mut recipe = plan.recipe.clone();
    recipe.output = PathBuf::new();
    recipe.device = String::new();
    recipe.stage = recipe.stage.into_iter().map(StageConfig::neutral).collect();
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
        recipe: to_toml(&recipe)?,
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
    fn estimate(plan: &Plan, model: &ModelState, data: &Data, device: &NamedDevice) -> Self {
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
        for stage in &plan.stages {
            let cost = stage.config.stage().cost(&scene);
            on_device = on_device.max(cost.device);
            on_host = on_host.max(linears + cost.host);
            disk += cost.disk;
            seconds += cost.seconds;
        }
        let host = BASE_BYTES + on_host + if device.discrete { 0 } else { on_device };
        Self {
            device_bytes: device.discrete.then_some(on_device),
            host_bytes: host,
            disk_bytes: disk + (1 << 20),
            seconds,
        }
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

    /// Refuses a disk or a memory that is too small for the run.
    ///
    /// # Errors
    /// Exit 3, with both sizes.
    fn check(&self, output: &Path) -> Result<()> {
        if let Some(total) = memory::total_bytes().filter(|total| *total < self.host_bytes) {
            return Err(Error::preflight(format!(
                "the run needs about {} of memory, and this machine has {}",
                size(self.host_bytes),
                size(total)
            ))
            .at("batch, length and samples of the recipe")
            .fix("smaller ones, or a larger machine"));
        }
        match free_bytes(output) {
            Some(free) if free < self.disk_bytes => Err(Error::preflight(format!(
                "the run needs about {} of disk, and {} are free",
                size(self.disk_bytes),
                size(free)
            ))
            .at(output.display())
            .fix("free some space, or --output on another disk")),
            _ => Ok(()),
        }
    }
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
