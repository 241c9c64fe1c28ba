//! The preflight: everything that can be refused is refused before a weight is read, and what the
//! run will need is estimated.

mod fit;
mod identity;
mod limits;
mod needs;

pub use self::identity::model_sha256;
use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::PathBuf;

use serde::Serialize;

use self::needs::Means;
pub use self::needs::{Needs, Price, StageNeeds};
use super::record::{RECORD_FILE, RunRecord, Status};
use super::{Fingerprint, Options, Reused, RunFolder};
use crate::data::sha256_of;
use crate::data::{ChatTemplate, Marks, Reader, Reading, TemplateChoice, TokenStream, Tokenizer};
use crate::device::{self, NamedDevice};
use crate::error::{Error, Kind, Result};
use crate::export::{
    ActivationRecord, Format, FormatsConfig, GridRecord, Manifest, OpenModel, open_float,
};
use crate::model::{GenerationConfig, open_folder};
use crate::quant::{GroupAxis, GroupSize, QuantSpec, Repr, ScaleDigits, Symmetry};
use crate::recipe::{self, Base, DataConfig, DataSection, Paths, Plan, Recipe};
use crate::stage::{Corpus, Data, ModelState, StandIns};
use crate::stop::StopFlag;
use crate::store::locate;

/// Bytes of main memory that this process may have in all: the tightest of the machine, its control
/// group and its own limits; `None` where the system does not tell.
pub fn memory_total() -> Option<u64> {
    limits::total().map(|limit| limit.bytes)
}

/// What of it is free now.
pub fn memory_available() -> Option<u64> {
    limits::available()
}

/// Window length when neither the recipe nor the model says less.
const DEFAULT_LENGTH: usize = 2048;

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
    /// For each stage, what would need less memory, in words; empty where no setting does.
    pub smaller: Vec<String>,
    /// What its weights will take in the format that it is for.
    pub target: Option<Target>,
    /// What is scarce but may do, a sentence.
    pub scarce: Option<String>,
    /// Where trainings keep their state, where that is not the fastest place, sentences.
    pub chosen: Vec<String>,
    /// The first stages, where another run has them.
    pub reused: Option<Reused>,
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

/// Reads the recipe, opens device, model headers and data, and type-checks the plan.
///
/// # Errors
/// Exit 2 for the recipe, exit 3 for what does not fit.
pub fn prepare(options: &Options, stop: &StopFlag) -> Result<Prepared> {
    let mut prepared = fitted(options, stop)?;
    let has_run = prepared.has_run();
    if !has_run {
        // Nothing to compare with: what it refuses, it refuses before weights are hashed.
        RunFolder::check(&prepared, options.fresh)?;
    }
    prepared.fingerprint.model =
        identity::model_sha256(&prepared.model.dir, prepared.model.checkpoint.files(), stop)?;
    if has_run {
        RunFolder::check(&prepared, options.fresh)?;
    }
    prepared.find_reused(options)?;
    Ok(prepared)
}

/// Everything but the fingerprint of the model's files, which takes reading them.
fn fitted(options: &Options, stop: &StopFlag) -> Result<Prepared> {
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
    let rows = plan.stages.iter().any(|stage| stage.config.stage().needs_tokenizer());
    let data = load_data(&plan.recipe.data, &model, rows)?;
    check_data(&plan, &model, &data)?;
    check_exports(&plan, &model, &device)?;
    let (probe, price_per_hour) = (options.probe, options.price_per_hour);
    let means = Means { probe, price_per_hour, stop };
    let (needs, peaks, chosen) = Needs::estimate(&mut plan, &model, &data, &device, means);
    stop.check()?;
    let scarce = needs.check(&peaks, &plan.recipe.output)?;
    let smaller = peaks.iter().map(fit::Peak::smaller).collect();
    let fingerprint = identity::without_model(&plan, &data)?;
    let reused = None;
    Ok(Prepared {
        plan,
        device,
        model,
        data,
        fingerprint,
        needs,
        smaller,
        target,
        scarce,
        chosen,
        reused,
    })
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
        width: None,
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
            GridRecord::Codebook { .. } => Repr::Codebook,
        };
        (name.clone(), (spec, repr))
    });
    let nested = model.packed.iter().flat_map(OpenModel::widths).collect();
    Base { linears: linears.collect(), widths: nested }
}

/// The data sets of a recipe, and the folder of its model; nothing else of the run is looked at.
///
/// # Errors
/// As [`prepare`].
pub fn data_of(options: &Options) -> Result<(Data, PathBuf)> {
    let (text, file) = recipe::find(&options.recipe)?;
    let (recipe, _): (Recipe, _) = recipe::parse(&text, &file, &options.set)?;
    let model = open_model(&recipe)?;
    Ok((load_data(&recipe.data, &model, false)?, model.dir))
}

/// The texts; also a tokenizer for stages that read `rows` of their own.
fn load_data(section: &DataSection, model: &ModelState, rows: bool) -> Result<Data> {
    let any = [&section.calibration, &section.train, &section.validation];
    if any.iter().all(|config| config.is_none()) && !rows {
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
            (None, Some(train)) if role == "calibration" && config.mix.is_empty() => {
                config.reading_as(train)
            }
            _ => config.clone(),
        };
        if role == "validation" && !config.mix.is_empty() {
            return Err(Error::usage("a validation text is measured whole, and has no weights")
                .at("data.validation.mix")
                .fix("path = a list of files"));
        }
        let corpus = load_corpus(&config, model, &tokenizer, marks);
        corpus.map(Some).map_err(|e| e.at(format!("data.{role}")))
    };
    Ok(Data {
        // First: calibration may read the same text, and a fault is this table's then.
        train: load(&section.train, "train")?,
        calibration: load(&section.calibration, "calibration")?,
        validation: load(&section.validation, "validation")?,
        bos,
        template: if rows { ChatTemplate::of_folder(&model.dir)? } else { None },
        ends: GenerationConfig::of_folder(&model.dir, model.config.eos.iter().copied())?.ends,
        tokenizer: rows.then_some(tokenizer),
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
    let template = &|| ChatTemplate::of_folder(&model.dir);
    let vocab = model.config.vocab;
    let reader = Reader { tokenizer, template, marks, length, vocab };
    let samples = config.samples;
    if config.mix.is_empty() {
        let Some(paths) = &config.path else {
            return Err(Error::usage("no text is named").fix("path = a file or a list of files"));
        };
        let (name, paths) = located(paths)?;
        let reading = config.reading().resolved(&paths)?;
        let stream = reader.read(&paths, &reading)?;
        let (sha256, template) = (sha256_of(&paths)?, template_of(config)?);
        return Ok(Corpus { stream, reading, sha256, template, name, samples, length });
    }
    if config.path.is_some() {
        return Err(Error::usage("path and mix both say what is read").fix("one of them"));
    }
    let (mut sources, mut all, mut names) = (Vec::new(), Vec::new(), Vec::new());
    let mut first = None;
    for (index, source) in config.mix.iter().enumerate() {
        let at = |error: Error| error.at(format!("mix.{index}"));
        let (name, paths) = located(&source.path).map_err(at)?;
        let format = source.format.unwrap_or(config.format);
        let mut reading = Reading { format, ..config.reading() };
        if !reading.resolved(&paths).is_ok_and(|own| own.is_chat()) && source.format.is_some() {
            // What is said of the others' conversations says nothing of this one.
            reading = Reading::from(format);
        }
        let reading = reading.resolved(&paths).map_err(at)?;
        let stream = reader.read(&paths, &reading).map_err(at)?;
        first.get_or_insert(reading);
        sources.push((name.clone(), source.weight, stream));
        names.push(name);
        all.extend(paths);
    }
    Ok(Corpus {
        stream: TokenStream::mix(sources, length).map_err(|error| error.at("mix"))?,
        reading: first.unwrap_or_default(),
        sha256: sha256_of(&all)?,
        template: template_of(config)?,
        name: names.join("+"),
        samples,
        length,
    })
}

/// What files go by in reports, and where they are.
fn located(Paths(names): &Paths) -> Result<(String, Vec<PathBuf>)> {
    let short = names.iter().map(|path| path.rsplit('/').next().unwrap_or(path));
    let short = short.collect::<Vec<_>>().join("+");
    let mut paths = Vec::new();
    for name in names {
        paths.extend(locate::data_files(name)?);
    }
    Ok((short, paths))
}

/// The hash of the chat template that a data set names by its file.
fn template_of(config: &DataConfig) -> Result<Option<String>> {
    match &config.chat_template {
        Some(TemplateChoice::File(path)) => sha256_of(&[path]).map(Some),
        _ => Ok(None),
    }
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

impl Prepared {
    /// As [`prepare`], for who only asks whether it would work: weights are read, for their hash, only when
    /// there is a run to compare with.
    ///
    /// # Errors
    /// Those of [`prepare`].
    pub fn to_look_at(options: &Options, stop: &StopFlag) -> Result<Self> {
        let mut prepared = fitted(options, stop)?;
        let compared = prepared.has_run() && !options.fresh;
        if compared || options.reuse.is_some() {
            prepared.fingerprint.model = identity::model_sha256(
                &prepared.model.dir,
                prepared.model.checkpoint.files(),
                stop,
            )?;
        }
        RunFolder::check(&prepared, options.fresh)?;
        prepared.find_reused(options)?;
        Ok(prepared)
    }

    /// Looks for the stages that need not be done again, unless the run has begun: then it has them.
    fn find_reused(&mut self, options: &Options) -> Result<()> {
        let Some(from) = &options.reuse else { return Ok(()) };
        let begun = RunRecord::read(&self.plan.recipe.output)?;
        if options.fresh || begun.is_none_or(|record| record.status == Status::Pending) {
            self.reused = Some(Reused::find(from, self, &base_of(&self.model))?);
        }
        Ok(())
    }

    /// Whether the output folder holds a run, of this recipe or another.
    fn has_run(&self) -> bool {
        self.plan.recipe.output.join(RECORD_FILE).exists()
    }

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
