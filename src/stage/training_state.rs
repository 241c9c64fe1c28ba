//! The state of an unfinished training: learned parameters, optimizer moments and the step, in one file
//! that is there whole or not at all. (The data order is a function of the step.)

use std::collections::BTreeMap;
use std::path::Path;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Device, Tensor, TensorData};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::method;
use crate::ops;
use crate::store::safetensors::{Checkpoint, write_streamed};
use crate::store::{DType, HostTensor, TensorSource, hex};
use crate::train::{Later, Optimizer, Values, later};

/// The learned parameters of what is trained.
pub(super) const PARAMETERS: &str = "param:";
const MOMENTS: &str = "optim:";
/// The last tensor: a hash over all else in the file.
const HASH: &str = "sha256";

/// A state as it is now, whatever becomes of the tensors: their buffers are shared, not copied, until
/// the training writes to them.
pub(super) struct Snapshot {
    moments: Vec<Later>,
    tensors: Vec<Later>,
    facts: BTreeMap<String, String>,
}

impl Snapshot {
    /// Of `module`'s learned parameters and `optimizer`'s state, beside `facts` by name.
    pub(super) fn of<M: Module>(
        module: &M,
        optimizer: &Optimizer,
        facts: impl IntoIterator<Item = (&'static str, String)>,
    ) -> Self {
        Self::of_optimizer(optimizer, facts).with(PARAMETERS, module)
    }

    /// Of an optimizer's state alone, beside `facts` by name.
    pub(super) fn of_optimizer(
        optimizer: &Optimizer,
        facts: impl IntoIterator<Item = (&'static str, String)>,
    ) -> Self {
        let (moments, steps, largest_norms) = optimizer.save();
        let facts = facts
            .into_iter()
            .chain([("optimizer_steps", steps.to_string()), ("largest_norm", largest_norms)]);
        let facts = facts.map(|(name, fact)| (name.to_owned(), fact)).collect();
        Self { moments: Vec::new(), tensors: Vec::new(), facts }.with_moments(moments)
    }

    /// With more of the optimizer's state.
    pub(super) fn with_moments(mut self, moments: impl IntoIterator<Item = Later>) -> Self {
        let named = |later: Later| Later { name: format!("{MOMENTS}{}", later.name), ..later };
        self.moments.extend(moments.into_iter().map(named));
        self
    }

    /// With the learned parameters of another module, whose names begin with `prefix`.
    pub(super) fn with<M: Module>(self, prefix: &'static str, module: &M) -> Self {
        self.with_part(prefix, &[], module)
    }

    /// As [`Snapshot::with`], of a module that stands at `path` in the model.
    pub(super) fn with_part<M: Module>(
        mut self,
        prefix: &'static str,
        path: &[&str],
        module: &M,
    ) -> Self {
        let tensors = std::mem::take(&mut self.tensors);
        let path = path.iter().map(|&name| name.to_owned()).collect();
        let mut learned = Learned { prefix, path, tensors };
        module.visit(&mut learned);
        Self { tensors: learned.tensors, ..self }
    }

    /// As [`Snapshot::with_part`], of a module whose values wait elsewhere, by their paths in it.
    pub(super) fn with_waiting<M: Module>(
        mut self,
        prefix: &'static str,
        path: &[&str],
        module: &M,
        values: impl Iterator<Item = Later>,
    ) -> Self {
        let mut named = Learned { prefix, path: Vec::new(), tensors: Vec::new() };
        module.visit(&mut named);
        let learned: Vec<String> = named.tensors.into_iter().map(|later| later.name).collect();
        let path = path.join(".");
        for later in values {
            if learned.contains(&format!("{prefix}{}", later.name)) {
                let name = format!("{prefix}{path}.{}", later.name);
                self.tensors.push(Later { name, ..later });
            }
        }
        self
    }

    /// With the parameters of which `is_bf16` says, by their paths, that bf16 holds them saved so.
    pub(super) fn shortened(mut self, is_bf16: impl Fn(&str) -> bool) -> Self {
        for later in &mut self.tensors {
            if later.name.strip_prefix(PARAMETERS).is_some_and(&is_bf16) {
                let values =
                    std::mem::replace(&mut later.values, Values::U8(Box::new(|| Ok(Vec::new()))));
                later.values = match values {
                    Values::F32(read) => Values::Bf16(read),
                    values => values,
                };
            }
        }
        self
    }

    /// Writes it, a tensor at a time.
    ///
    /// # Errors
    /// I/O errors; an earlier file stays then.
    pub(super) fn write(mut self, path: &Path) -> Result<()> {
        // The same order, wherever they come from; the shortest numbers last, for what they are followed by is
        // not aligned.
        self.moments.sort_by(|a, b| a.name.cmp(&b.name));
        self.moments.append(&mut self.tensors);
        self.moments.sort_by_key(|later| std::cmp::Reverse(dtype(&later.values).size()));
        let mut layout: Vec<(String, DType, Vec<usize>)> = (self.moments.iter())
            .map(|later| (later.name.clone(), dtype(&later.values), later.shape.clone()))
            .collect();
        layout.push((HASH.to_owned(), DType::U8, vec![HASH_LEN]));
        let mut tensors = self.moments.into_iter();
        let mut sum = Sum::of(&self.facts);
        write_streamed(path, &layout, &self.facts, |_| match tensors.next() {
            Some(Later { name, shape, values }) => {
                let tensor = match values {
                    Values::F32(read) => HostTensor::f32(shape, &read()?),
                    Values::Bf16(read) => HostTensor::bf16_from_f32(shape, &read()?),
                    Values::U8(read) => HostTensor::u8(shape, &read()?),
                };
                sum.add(&name, &tensor);
                Ok(tensor)
            }
            None => Ok(sum.tensor()),
        })
    }
}

/// What values are saved as.
fn dtype(values: &Values) -> DType {
    match values {
        Values::F32(_) => DType::F32,
        Values::Bf16(_) => DType::BF16,
        Values::U8(_) => DType::U8,
    }
}

/// A saved state whose hash is right.
#[derive(Clone)]
pub(super) struct State {
    file: Checkpoint,
}

impl State {
    /// Opens the state at `path`.
    ///
    /// # Errors
    /// When the file cannot be read or is damaged.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let damaged = |e: &str| {
            Error::failed(format!("the training state cannot be used: {e}"))
                .at(path.display())
                .fix("remove that file to repeat the stage, or --fresh to start over")
        };
        let file = Checkpoint::open_file(path).map_err(|e| damaged(e.what()))?;
        let mut sum = Sum::of(file.file_metadata());
        for name in file.names().into_iter().filter(|name| *name != HASH) {
            sum.add(name, &file.read(name).map_err(|e| damaged(e.what()))?);
        }
        match file.read(HASH) {
            Ok(hash) if hash == sum.tensor() => Ok(Self { file }),
            _ => Err(damaged("it does not match its hash")),
        }
    }

    /// A fact by name.
    ///
    /// # Errors
    /// When the state has none, or it is none of that kind.
    pub(super) fn fact<T: std::str::FromStr>(&self, name: &str) -> Result<T> {
        let fact = self.file.file_metadata().get(name).and_then(|fact| fact.parse().ok());
        fact.ok_or_else(|| self.foreign(&format!("it has no {name}")))
    }

    /// Puts the parameters under `prefix` into `module`.
    ///
    /// # Errors
    /// When they are not those that the module learns.
    pub(super) fn parameters<M: Module>(&self, prefix: &str, module: M) -> Result<M> {
        self.part(prefix, &[], module).map(|(module, _)| module)
    }

    /// As [`State::parameters`], those of a module that stands at `path` in the model; also how many
    /// they are.
    ///
    /// # Errors
    /// As [`State::parameters`].
    pub(super) fn part<M: Module>(
        &self,
        prefix: &str,
        path: &[&str],
        module: M,
    ) -> Result<(M, usize)> {
        let start: String = path.iter().flat_map(|name| [name, "."]).collect();
        let left = self.tensors(prefix, &start)?;
        let found = left.len();
        let path = path.iter().map(|&name| name.to_owned()).collect();
        let mut restore = Restore { path, left: left.into_iter().collect() };
        let module = module.map(&mut restore);
        match restore.left.keys().next() {
            None => Ok((module, found)),
            Some(left) => Err(self.foreign(&format!("nothing learns its {left}"))),
        }
    }

    /// Puts the optimizer's state of parameters whose paths begin with `start` into `optimizer`.
    ///
    /// # Errors
    /// When it is incomplete.
    pub(super) fn optimizer(
        &self,
        optimizer: &mut Optimizer,
        start: &str,
        device: &Device,
    ) -> Result<()> {
        let moments = self.tensors(MOMENTS, start)?;
        let (steps, norms) = (self.fact("optimizer_steps")?, self.fact::<String>("largest_norm")?);
        optimizer.load(moments, steps, &norms, device)
    }

    /// How many parameters it has under `prefix`.
    pub(super) fn count(&self, prefix: &str) -> usize {
        self.file.names().iter().filter(|name| name.starts_with(prefix)).count()
    }

    /// Whether it has parameters under `prefix`.
    pub(super) fn has(&self, prefix: &str) -> bool {
        self.file.names().iter().any(|name| name.starts_with(prefix))
    }

    /// Those under `prefix` whose paths begin with `start`.
    fn tensors(&self, prefix: &str, start: &str) -> Result<Vec<(String, TensorData)>> {
        let names = self.file.names();
        let of = names.into_iter().filter_map(|name| Some((name, name.strip_prefix(prefix)?)));
        let of = of.filter(|(_, path)| path.starts_with(start));
        of.map(|(name, path)| {
            let tensor = self.file.read(name)?;
            let data = match tensor.dtype {
                DType::U8 => TensorData::new(tensor.to_u8()?, tensor.shape),
                _ => TensorData::new(tensor.to_f32()?, tensor.shape),
            };
            Ok((path.to_owned(), data))
        })
        .collect()
    }

    /// That it is the state of something else.
    pub(super) fn foreign(&self, what: &str) -> Error {
        let file = self.file.files().first().map(|file| file.display().to_string());
        Error::failed(format!("the training state cannot be used: {what}"))
            .at(file.unwrap_or_default())
            .fix("remove that file to repeat the stage, or --fresh to start over")
    }
}

/// Bytes of a SHA-256 in hex.
const HASH_LEN: usize = 64;

/// The hash of a state, whatever the order of its tensors.
struct Sum(BTreeMap<String, String>);

impl Sum {
    fn of(facts: &BTreeMap<String, String>) -> Self {
        Self(facts.clone())
    }

    fn add(&mut self, name: &str, tensor: &HostTensor) {
        self.0.insert(
            name.to_owned(),
            format!("{} {:?} {}", tensor.dtype, tensor.shape, tensor.sha256()),
        );
    }

    fn tensor(&self) -> HostTensor {
        let list = self.0.iter().flat_map(|(name, hash)| [name.as_str(), hash]);
        let list = list.collect::<Vec<_>>().join("\n");
        HostTensor::u8([HASH_LEN], hex(&Sha256::digest(list)).as_bytes())
    }
}

/// Collects every learned parameter by path.
struct Learned {
    prefix: &'static str,
    path: Vec<String>,
    tensors: Vec<Later>,
}

impl ModuleVisitor for Learned {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let (value, path) = (param.base(), self.path.join("."));
        let values = if value.is_require_grad() {
            value.inner()
        } else if method::is_carried(&path) {
            value
        } else {
            return;
        };
        let (shape, values) = later(values);
        self.tensors.push(Later { name: format!("{}{path}", self.prefix), shape, values });
    }
}

/// Puts saved parameters back by path.
struct Restore {
    path: Vec<String>,
    left: BTreeMap<String, TensorData>,
}

impl ModuleMapper for Restore {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(data) = self.left.remove(&self.path.join(".")) else { return param };
        let learned = param.base().is_require_grad();
        param.map(|old| {
            let value = Tensor::<D>::from_data(data, &old.device().inner());
            let value = ops::laid_out_like(&old.inner(), value);
            let value = Tensor::from_inner(value);
            if learned { value.require_grad() } else { value }
        })
    }
}

#[cfg(test)]
mod tests {
    use burn::nn::LinearConfig;

    use super::*;
    use crate::train::OptimizerConfig;

    /// A saved linear of three inputs and two outputs.
    fn written(path: &Path) {
        let linear = LinearConfig::new(3, 2).init(&Device::flex().autodiff());
        let optimizer = Optimizer::new(&OptimizerConfig::default());
        let facts = [("step", "7".to_owned()), ("progress", "{}".to_owned())];
        Snapshot::of(&linear, &optimizer, facts).write(path).unwrap();
    }

    #[test]
    fn a_state_comes_back_and_any_bit_of_it_that_changed_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.safetensors");
        written(&path);
        let state = State::open(&path).unwrap();
        assert_eq!(state.fact::<u64>("step").unwrap(), 7);
        let other = LinearConfig::new(3, 2).init(&Device::flex().autodiff());
        let back = state.parameters(PARAMETERS, other).unwrap();
        let again = dir.path().join("again.safetensors");
        let facts = [("step", "7".to_owned()), ("progress", "{}".to_owned())];
        let optimizer = Optimizer::new(&OptimizerConfig::default());
        Snapshot::of(&back, &optimizer, facts).write(&again).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(std::fs::read(&again).unwrap(), bytes);

        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1 << (at % 8);
            std::fs::write(&path, &damaged).unwrap();
            assert!(State::open(&path).is_err(), "byte {at}");
            std::fs::write(&path, &bytes[..at]).unwrap();
            let error = State::open(&path).err().unwrap().to_string();
            assert_eq!(error.lines().count(), 3, "{error}");
        }
    }
}
