//! A model of random weights, to measure with: each tensor is made from its name when it is asked for,
//! so that of any size of model no more exists than what is in use.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use half::bf16;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::arch::{ModelConfig, NormKind, Role};
use super::load::{WeightSource, companions};
use crate::error::{Error, Result};
use crate::stop::StopFlag;
use crate::store::folder::{StagedFolder, free_bytes, write_atomic};
use crate::store::safetensors::{Checkpoint, Decode, ShardWriter};
use crate::store::{DType, HostTensor, locate};

/// Standard deviation of weights, as most models are started with.
const SPREAD: f32 = 0.02;
/// Values that one state of the generator gives, so that threads share the work and the values do not
/// depend on their number.
const CHUNK: usize = 1 << 14;
/// Bytes of values in a shard.
const SHARD_BYTES: u64 = 4 << 30;
/// In the place of weights: the seed that they are made from.
const SEED_FILE: &str = "random_weights.json";
/// Whose tokenizer is put beside a model of random weights.
const TOKENIZER: &str = "embedded:tinystories-656k";

/// Random weights of a model's shape: normal with deviation 0.02, those that write to the residual
/// stream divided by the root of their number (GPT-2's start); gains of norms are 1, biases 0. All
/// values are bf16 numbers, and a function of seed, name and place alone.
#[derive(Clone, Debug)]
pub struct RandomWeights {
    seed: u64,
    /// Every tensor with its shape as `[out, in]`, and what it holds.
    tensors: BTreeMap<String, (Vec<usize>, Values)>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Values {
    Constant(f32),
    Normal(f32),
}

impl RandomWeights {
    /// Weights for `config`'s model.
    pub fn new(config: &ModelConfig, seed: u64) -> Self {
        let gain = if config.arch.norm == NormKind::RmsPlusOne { 0.0 } else { 1.0 };
        let joined = (2.0 * config.n_blocks.max(1) as f32).sqrt();
        let values = |name: &str, shape: &[usize]| match shape {
            [_] if name.rsplit('.').next() == Some("bias") => Values::Constant(0.0),
            [_] => Values::Constant(gain),
            _ => {
                let inner = config.inner(name).and_then(|(_, name)| name.strip_suffix(".weight"));
                let spec = inner.and_then(|name| config.linear(name));
                let writes =
                    spec.is_some_and(|spec| matches!(spec.role, Role::Output | Role::Down));
                Values::Normal(if writes { SPREAD / joined } else { SPREAD })
            }
        };
        let tensors = config.tensors().into_iter().map(|(name, shape)| {
            let values = values(&name, &shape);
            (name, (shape, values))
        });
        Self { seed, tensors: tensors.collect() }
    }

    /// As the checkpoint of the folder that names their seed: each tensor is made when it is read.
    pub(super) fn into_checkpoint(self, dir: &Path) -> Checkpoint {
        let shapes: Vec<_> =
            self.tensors.iter().map(|(name, (shape, _))| (name.clone(), shape.clone())).collect();
        let file = dir.join(SEED_FILE);
        Checkpoint::empty().decoding(|_| false, shapes.into_iter(), &file, Arc::new(self))
    }

    /// Bytes of all tensors in bf16.
    pub fn bytes(&self) -> u64 {
        let sizes = self.tensors.values().map(|(shape, _)| shape.iter().product::<usize>() as u64);
        2 * sizes.sum::<u64>()
    }

    fn find(&self, name: &str) -> Result<&(Vec<usize>, Values)> {
        self.tensors.get(name).ok_or_else(|| {
            Error::preflight("the model has no such tensor")
                .at(name)
                .fix("a name of its config.json")
        })
    }

    /// The tensor `name` in bf16, as `[out, in]`.
    ///
    /// # Errors
    /// When the model has no such tensor.
    pub fn bf16(&self, name: &str) -> Result<HostTensor> {
        let (shape, values) = self.find(name)?;
        let mut bytes = vec![0; 2 * shape.iter().product::<usize>()];
        self.fill(name, *values, &mut bytes, |place: &mut [u8; 2], value| {
            *place = value.to_le_bytes();
        });
        Ok(HostTensor { dtype: DType::BF16, shape: shape.clone(), bytes })
    }

    /// Puts the values of a tensor into `places`, of which each takes `N` elements.
    fn fill<T: Send, const N: usize>(
        &self,
        name: &str,
        values: Values,
        places: &mut [T],
        put: impl Fn(&mut [T; N], bf16) + Sync,
    ) {
        let start = self.seed ^ name_hash(name);
        places.par_chunks_mut(N * CHUNK).enumerate().for_each(|(chunk, places)| {
            let places = places.as_chunks_mut::<N>().0;
            match values {
                Values::Constant(value) => {
                    for place in places {
                        put(place, bf16::from_f32(value));
                    }
                }
                Values::Normal(spread) => {
                    let mut state = mixed(start.wrapping_add(mixed(chunk as u64)));
                    for places in places.chunks_mut(4) {
                        state = state.wrapping_add(STEP);
                        let bits = mixed(state);
                        for (place, shift) in places.iter_mut().zip([0, 16, 32, 48]) {
                            let quantile = quantiles()[usize::from((bits >> shift) as u16)];
                            put(place, bf16::from_f32(spread * quantile));
                        }
                    }
                }
            }
        });
    }
}

impl WeightSource for RandomWeights {
    fn weight(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let (known, values) = self.find(name)?;
        if known != shape {
            return Err(Error::preflight(format!("the tensor is {known:?}, and not {shape:?}"))
                .at(name)
                .fix("the config.json that the weights were made for"));
        }
        let mut places = vec![0.0; shape.iter().product()];
        self.fill(name, *values, &mut places, |place: &mut [f32; 1], value| {
            *place = [value.to_f32()];
        });
        Ok(places)
    }

    fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }
}

impl Decode for RandomWeights {
    fn decode(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        self.weight(name, shape)
    }

    fn dtype(&self) -> DType {
        DType::BF16
    }

    fn tensor(&self, name: &str, _shape: &[usize]) -> Result<HostTensor> {
        self.bf16(name)
    }
}

/// What [`SEED_FILE`] says.
#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Seed {
    seed: u64,
}

/// The seed that a folder names in the place of weights; `None` for a folder that does not.
///
/// # Errors
/// When its file is damaged.
pub(super) fn seed_in(dir: &Path) -> Result<Option<u64>> {
    let path = dir.join(SEED_FILE);
    if !path.is_file() {
        return Ok(None);
    }
    let text = std::fs::read(&path).map_err(|e| Error::io("read", &path, &e))?;
    let Seed { seed } = serde_json::from_slice(&text).map_err(|e| {
        let what = format!("the seed of random weights is not valid: {e}");
        Error::damaged(what, "{ \"seed\": 0 } in it").at(path.display())
    })?;
    Ok(Some(seed))
}

/// As [`write_random`], with the seed in the place of the weights: a few kilobytes, and each tensor is made
/// when it is read.
///
/// # Errors
/// As [`write_random`].
pub fn write_random_seed(config: &Map<String, Value>, seed: u64, dir: &Path) -> Result<()> {
    let shape = ModelConfig::parse(&Value::Object(config.clone()).to_string())?;
    check_place(dir, 0)?;
    let folder = StagedFolder::create(dir)?;
    add_config(&shape, config, folder.path())?;
    let text = serde_json::to_string(&Seed { seed })
        .map_err(|e| Error::failed(format!("a seed cannot be written: {e}")))?;
    write_atomic(&folder.path().join(SEED_FILE), text.as_bytes())?;
    folder.commit()
}

/// Writes a folder with random weights in bf16, see [`RandomWeights`]: `config.json`, shards, and the
/// built-in tokenizer where its vocabulary fits, whose first and last token the config then names. The
/// memory is that of the largest tensor. Gives the bytes of the weights.
///
/// # Errors
/// When the config is none, the folder holds something already or cannot be written, the disk is too
/// small; and when a signal stops it, which leaves nothing behind.
pub fn write_random(
    config: &Map<String, Value>,
    seed: u64,
    dir: &Path,
    stop: &StopFlag,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<u64> {
    let shape = ModelConfig::parse(&Value::Object(config.clone()).to_string())?;
    let weights = RandomWeights::new(&shape, seed);
    let bytes = weights.bytes();
    check_place(dir, bytes)?;
    let folder = StagedFolder::create(dir)?;
    add_config(&shape, config, folder.path())?;
    let columns: Vec<String> = shape.stored_by_columns().collect();
    let mut writer = ShardWriter::create(folder.path(), SHARD_BYTES)?;
    let mut written = 0;
    for (name, _) in shape.tensors() {
        stop.check().map_err(|error| error.fix("the same command again: nothing was kept"))?;
        let tensor = weights.bf16(&name)?;
        let tensor = if columns.contains(&name) { tensor.transposed()? } else { tensor };
        writer.add(&name, &tensor)?;
        written += tensor.bytes.len() as u64;
        progress(written, bytes);
    }
    let facts = [("format", "pt".to_owned()), ("random_weights", format!("seed {seed}"))];
    writer.finish(&facts.map(|(key, value)| (key.to_owned(), value)).into())?;
    folder.commit()?;
    Ok(bytes)
}

/// Everything of a folder but its weights.
fn add_config(shape: &ModelConfig, config: &Map<String, Value>, dir: &Path) -> Result<()> {
    let mut config = config.clone();
    add_tokenizer(shape, &mut config, dir)?;
    let text = format!("{:#}\n", Value::Object(config));
    write_atomic(&dir.join("config.json"), text.as_bytes())?;
    let note =
        "Random weights of this shape, made to measure speed and memory with. They know nothing.\n";
    write_atomic(&dir.join("README.md"), note.as_bytes())
}

/// Refuses a folder with something in it, and a disk that is too small.
fn check_place(dir: &Path, bytes: u64) -> Result<()> {
    if dir.read_dir().is_ok_and(|mut entries| entries.next().is_some()) {
        return Err(Error::usage("the folder is not empty")
            .at(dir.display())
            .fix("a folder that does not exist yet"));
    }
    // A shard's values are there twice while it is put together.
    let needed = bytes + SHARD_BYTES.min(bytes);
    let place = dir.ancestors().find(|place| place.exists()).unwrap_or(Path::new("."));
    let Some(free) = free_bytes(place).filter(|free| *free < needed) else { return Ok(()) };
    let gb = |bytes: u64| bytes as f64 / 1e9;
    let what =
        format!("writing it takes {:.1} GB of disk, and {:.1} GB are free", gb(needed), gb(free));
    Err(Error::preflight(what)
        .at(dir.display())
        .fix("free some space, or a folder on another disk"))
}

/// The built-in tokenizer's files; the config then names its tokens.
fn add_tokenizer(shape: &ModelConfig, config: &mut Map<String, Value>, dir: &Path) -> Result<()> {
    let source = locate::model(TOKENIZER)?;
    let own = ModelConfig::read(&source)?;
    if shape.vocab < own.vocab {
        return Ok(());
    }
    for path in companions(&source) {
        let bytes = std::fs::read(&path).map_err(|e| Error::io("read", &path, &e))?;
        write_atomic(&dir.join(path.file_name().unwrap_or_default()), &bytes)?;
    }
    let tokens = [("bos_token_id", own.bos), ("eos_token_id", own.eos.first().copied())];
    for (key, token) in tokens {
        config.insert(key.to_owned(), token.into());
    }
    // A padding token of the tokenizer that is not there.
    config.remove("pad_token_id");
    Ok(())
}

/// FNV-1a.
fn name_hash(name: &str) -> u64 {
    let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    name.bytes().fold(0xcbf2_9ce4_8422_2325, step)
}

/// SplitMix64's step: the golden ratio.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// SplitMix64's output function (Steele, Lea, Flood 2014).
fn mixed(state: u64) -> u64 {
    let state = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let state = (state ^ (state >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    state ^ (state >> 31)
}

/// Quantiles of the standard normal distribution at `(i + 1/2) / 2^16`: sixteen random bits are one
/// value. Found by integrating the density from the middle outwards.
fn quantiles() -> &'static [f32] {
    static QUANTILES: OnceLock<Vec<f32>> = OnceLock::new();
    QUANTILES.get_or_init(|| {
        const HALF: usize = 1 << 15;
        const WIDTH: f64 = 1e-4;
        let density = |x: f64| (-0.5 * x * x).exp() / std::f64::consts::TAU.sqrt();
        let mut all = vec![0.0; 2 * HALF];
        let (mut x, mut below) = (0.0, 0.0);
        for i in 0..HALF {
            let target = (i as f64 + 0.5) / (2 * HALF) as f64;
            let mut next = density(x + WIDTH / 2.0) * WIDTH;
            while below + next < target {
                (x, below) = (x + WIDTH, below + next);
                next = density(x + WIDTH / 2.0) * WIDTH;
            }
            let value = (x + WIDTH * (target - below) / next) as f32;
            (all[HALF + i], all[HALF - 1 - i]) = (value, -value);
        }
        all
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::open_folder;
    use crate::model::shapes::known_config;
    use crate::store::TensorSource;

    fn tiny() -> Map<String, Value> {
        let mut config = known_config("smollm2-135m").unwrap();
        for (key, value) in [("num_hidden_layers", 2), ("vocab_size", 3000)] {
            config.insert(key.to_owned(), value.into());
        }
        config
    }

    fn shape(config: &Map<String, Value>) -> ModelConfig {
        ModelConfig::parse(&Value::Object(config.clone()).to_string()).unwrap()
    }

    #[test]
    fn values_are_normal_and_a_function_of_the_name() {
        let config = shape(&tiny());
        let weights = RandomWeights::new(&config, 0);
        let embedding = config.embedding();
        let values = weights.weight(&embedding, &[3000, 576]).unwrap();
        let count = values.len() as f64;
        let moment =
            |power| values.iter().map(|v| f64::from(*v / SPREAD).powi(power)).sum::<f64>() / count;
        // Four deviations of the estimates.
        let near = |found: f64, wanted: f64, variance: f64| {
            let far = 4.0 * (variance / count).sqrt();
            assert!((found - wanted).abs() < far, "{found} for {wanted}, {far}");
        };
        near(moment(1), 0.0, 1.0);
        near(moment(2), 1.0, 2.0);
        near(moment(4), 3.0, 96.0);
        // Neighbours know nothing of each other, nor do the same places of two tensors.
        let pairs = |a: &[f32], b: &[f32]| {
            let products = a.iter().zip(b).map(|(a, b)| f64::from(a / SPREAD * (b / SPREAD)));
            products.sum::<f64>() / a.len().min(b.len()) as f64
        };
        near(pairs(&values, &values[1..]), 0.0, 1.0);
        near(pairs(&values, &values[CHUNK..]), 0.0, 1.0);
        let other = RandomWeights::new(&config, 1).weight(&embedding, &[3000, 576]).unwrap();
        near(pairs(&values, &other), 0.0, 1.0);
        let again = RandomWeights::new(&config, 0).weight(&embedding, &[3000, 576]).unwrap();
        assert_eq!(values, again);
        let gain = weights.weight("model.norm.weight", &[576]).unwrap();
        assert_eq!(gain, [1.0; 576]);
    }

    #[test]
    fn shapes_and_names_are_checked() {
        let weights = RandomWeights::new(&shape(&tiny()), 0);
        weights.weight("model.norm.weight", &[577]).unwrap_err();
        weights.weight("model.norm.bias", &[576]).unwrap_err();
    }

    #[test]
    fn a_written_folder_holds_the_same_model() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("model");
        let config = tiny();
        let stop = StopFlag::default();
        let mut seen = Vec::new();
        let bytes =
            write_random(&config, 5, &dir, &stop, &mut |done, of| seen.push((done, of))).unwrap();
        assert_eq!(bytes, 2 * shape(&config).parameters());
        assert_eq!(seen.last(), Some(&(bytes, bytes)));
        let (read, checkpoint) = open_folder(&dir).unwrap();
        assert_eq!(checkpoint.total_bytes(), bytes);
        let weights = RandomWeights::new(&shape(&config), 5);
        for (name, shape) in read.tensors() {
            assert_eq!(checkpoint.info(&name).unwrap().dtype, DType::BF16);
            let (found, wanted) = (checkpoint.weight(&name, &shape), weights.weight(&name, &shape));
            assert!(found.unwrap() == wanted.unwrap(), "{name}");
        }
        assert_eq!((read.bos, &read.eos[..]), (Some(1), &[2][..]));
        assert!(dir.join("tokenizer.json").is_file());
        let error = write_random(&config, 5, &dir, &stop, &mut |_, _| ()).unwrap_err();
        assert_eq!(error.what(), "the folder is not empty");
    }

    #[test]
    fn a_seed_in_the_place_of_weights_is_the_same_model() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("model");
        let config = tiny();
        write_random_seed(&config, 5, &dir).unwrap();
        let (read, checkpoint) = open_folder(&dir).unwrap();
        let weights = RandomWeights::new(&shape(&config), 5);
        assert_eq!(checkpoint.total_bytes(), weights.bytes());
        for (name, shape) in read.tensors() {
            let (found, wanted) = (checkpoint.weight(&name, &shape), weights.weight(&name, &shape));
            assert!(found.unwrap() == wanted.unwrap(), "{name}");
        }
        std::fs::write(dir.join(SEED_FILE), "{ \"seed\": -1 }").unwrap();
        let error = open_folder(&dir).unwrap_err().to_string();
        assert!(error.lines().count() == 3 && error.contains(SEED_FILE), "{error}");
    }

    #[test]
    fn what_is_stopped_leaves_nothing_and_columns_are_stored_as_such() {
        let root = tempfile::tempdir().unwrap();
        let config = json_of(
            r#"{"model_type":"gpt2","n_embd":32,"n_layer":1,"n_head":2,"vocab_size":50,"n_positions":16}"#,
        );
        let stop = StopFlag::default();
        let dir = root.path().join("gpt2");
        write_random(&config, 0, &dir, &stop, &mut |_, _| ()).unwrap();
        let (read, checkpoint) = open_folder(&dir).unwrap();
        let weights = RandomWeights::new(&shape(&config), 0);
        for (name, shape) in read.linear_shapes() {
            let name = format!("{name}.weight");
            assert_eq!(
                checkpoint.weight(&name, &shape).unwrap(),
                weights.weight(&name, &shape).unwrap()
            );
        }
        // 50 rows are too few for the tokenizer.
        assert!(!dir.join("tokenizer.json").exists());
        stop.set(2);
        let dir = root.path().join("stopped");
        let error = write_random(&config, 0, &dir, &stop, &mut |_, _| ()).unwrap_err();
        assert_eq!(error.kind().exit_code(), 130);
        assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 1);
    }

    fn json_of(text: &str) -> Map<String, Value> {
        serde_json::from_str(text).unwrap()
    }
}
