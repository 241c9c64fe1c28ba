//! Whether a device computes what it should: a tiny random decoder, quantized, forward and backward.

use std::panic::{AssertUnwindSafe, catch_unwind};

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::{DType, Device, Tensor};
use serde::Serialize;
use serde_json::json;

use super::attach::{attach, spec};
use crate::data::TokenStream;
use crate::device::{self, NamedDevice};
use crate::error::{Error, Result};
use crate::method::{MethodConfig, SeqConfig};
use crate::model::{CausalLm, Loader, ModelConfig, Positions, RandomWeights, WeightSource};
use crate::objective::{JsdObjective, ObjectiveConfig};
use crate::ops;
use crate::stage::Feed;

const LENGTH: usize = 32;
const ROWS: u32 = 3;

/// What the decoder gives on some device.
#[derive(Clone, Debug)]
pub struct Numbers {
    loss: f64,
    logits: Vec<f32>,
    /// The gradient of each learned parameter, by its path.
    gradients: Vec<(String, Vec<f32>)>,
}

/// How far a device is from the reference.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Check {
    /// Of the logits: the distance, as a part of their size.
    pub logits: f64,
    /// Of the gradient that is farthest off.
    pub gradient: f64,
    /// Whose gradient that is.
    pub farthest: String,
    /// Of the loss.
    pub loss: f64,
    /// The largest distance of logits and of gradients that passes.
    pub allowed: [f64; 2],
    /// Whether all are close enough.
    pub passed: bool,
}

/// What the CPU gives in f32, composed from the backend's own operations: none of fewbit's kernels runs.
///
/// # Errors
/// When this binary has no CPU backend.
pub fn reference() -> Result<Numbers> {
    let cpu = device::open("cpu")?;
    ops::composed(|| Numbers::on(&cpu, DType::F32))
}

impl Numbers {
    /// What a device gives. What its backend panics with is an error.
    ///
    /// # Errors
    /// What keeps the device from computing.
    pub fn on(device: &NamedDevice, dtype: DType) -> Result<Self> {
        let outcome = catch_unwind(AssertUnwindSafe(|| compute(&device.device, dtype)));
        outcome.unwrap_or_else(|panic| Err(of_panic(&*panic))).map_err(|e| e.at(&device.name))
    }

    /// How far these are from others, and whether that is what `dtype` may differ by.
    pub fn against(&self, reference: &Self, dtype: DType) -> Check {
        // Sums in another order move f32 by a few parts in a million; bf16 has eight bits.
        let allowed = if dtype == DType::F32 { [1e-5, 1e-4] } else { [4e-2, 1e-1] };
        let logits = distance(&self.logits, &reference.logits);
        let mut farthest = (0.0, String::new());
        for (path, wanted) in &reference.gradients {
            let found = self.gradients.iter().find(|(found, _)| found == path);
            let off = found.map_or(f64::INFINITY, |(_, found)| distance(found, wanted));
            // A distance that is no number is farther than any.
            if farthest.1.is_empty() || off > farthest.0 || off.is_nan() {
                farthest = (off, path.clone());
            }
        }
        let (gradient, farthest) = farthest;
        let loss = (self.loss - reference.loss).abs() / reference.loss.abs();
        let passed = logits <= allowed[0] && gradient <= allowed[1] && loss <= allowed[1];
        Check { logits, gradient, farthest, loss, allowed, passed }
    }
}

/// What a backend said before it gave up.
fn of_panic(panic: &(dyn std::any::Any + Send)) -> Error {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no reason given");
    let line = text.lines().next().unwrap_or_default();
    Error::failed(format!("the backend gave up: {line}"))
        .fix("the driver that the backend needs, or --device cpu")
}

/// The distance of two vectors, as a part of the second one's size.
fn distance(found: &[f32], wanted: &[f32]) -> f64 {
    if found.len() != wanted.len() {
        return f64::INFINITY;
    }
    let pairs = found.iter().zip(wanted).map(|(a, b)| (f64::from(*a), f64::from(*b)));
    let (off, size) =
        pairs.fold((0.0, 0.0), |(off, size), (a, b)| (off + (a - b).powi(2), size + b * b));
    if off == 0.0 { 0.0 } else { (off / size).sqrt() }
}

/// Norms on queries and keys, grouped heads, rotations, a gated MLP: a block has every operation of ours.
fn shape() -> Result<ModelConfig> {
    ModelConfig::parse(
        &json!({
            "model_type": "qwen3", "hidden_size": 64, "intermediate_size": 160,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 16, "vocab_size": 320, "max_position_embeddings": LENGTH,
            "tie_word_embeddings": true,
        })
        .to_string(),
    )
}

/// Weights so large that attention and MLP matter beside the embedding.
struct Loud(RandomWeights);

impl WeightSource for Loud {
    fn weight(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let factor = if shape.len() == 2 { 8.0 } else { 1.0 };
        Ok(self.0.weight(name, shape)?.into_iter().map(|value| value * factor).collect())
    }

    fn contains(&self, name: &str) -> bool {
        self.0.contains(name)
    }
}

/// A distillation of the decoder into 2 bits, as far as the gradients.
fn compute(device: &Device, dtype: DType) -> Result<Numbers> {
    let config = &shape()?;
    let source = &Loud(RandomWeights::new(config, 0));
    let teacher = Loader { config, source, device, dtype }.model()?;
    let mut student = teacher.clone();
    for block in &mut student.blocks {
        attach(block, &MethodConfig::Seq(SeqConfig::default()), &spec(2)?, dtype)?;
    }
    let student: CausalLm = student.train();
    let count = LENGTH as u32 * ROWS;
    // Steps through the vocabulary, each token once.
    let tokens = (0..count).map(|i| i * 37 % config.vocab as u32).collect();
    let stream = &TokenStream { tokens, documents: 1, ..TokenStream::default() };
    let positions = &Positions::new(config, 0, LENGTH, dtype, device);
    let feed = Feed { stream, length: LENGTH, positions, config, dtype, device };
    let windows: Vec<u32> = (0..ROWS).collect();
    let objective = ObjectiveConfig::Jsd(JsdObjective::default());
    let (loss, _) = feed.windows(&windows).loss(&student, Some(&teacher), &objective, false)?;
    let value = f64::from(loss.clone().into_scalar::<f32>());
    let gradients = GradientsParams::from_grads(loss.backward(), &student);
    let mut collect = Collect { gradients: &gradients, path: Vec::new(), found: Vec::new() };
    student.visit(&mut collect);
    let rows: Vec<&[u32]> = (0..ROWS as usize).map(|row| stream.window(row, LENGTH)).collect();
    let hidden = student.valid().hidden(CausalLm::tokens(&rows, device), positions);
    let [batch, seq, width] = hidden.dims();
    let logits = teacher.logits(hidden.reshape([batch * seq, width]));
    Ok(Numbers {
        loss: value,
        logits: logits.into_data().iter::<f32>().collect(),
        gradients: collect.found,
    })
}

/// Brings gradients to the host.
struct Collect<'a> {
    gradients: &'a GradientsParams,
    path: Vec<String>,
    found: Vec<(String, Vec<f32>)>,
}

impl ModuleVisitor for Collect<'_> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(gradient) = self.gradients.get::<D>(param.id) {
            let values = gradient.cast(DType::F32).into_data().iter::<f32>().collect();
            self.found.push((self.path.join("."), values));
        }
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_computes_what_its_backend_does() {
        let (cpu, reference) = (device::open("cpu").unwrap(), reference().unwrap());
        // Two blocks of seven linears, a latent weight and a step each.
        assert_eq!(reference.gradients.len(), 28);
        assert!(reference.gradients.iter().all(|(_, g)| g.iter().any(|value| *value != 0.0)));
        for dtype in [DType::F32, DType::BF16] {
            let check = Numbers::on(&cpu, dtype).unwrap().against(&reference, dtype);
            assert!(check.passed, "{check:?}");
        }
    }

    #[test]
    fn wrong_numbers_do_not_pass() {
        let reference = reference().unwrap();
        let check = |numbers: &Numbers| numbers.against(&reference, DType::BF16);
        assert!(check(&reference).passed);
        // One gradient of the wrong sign, one that is missing, one that is no number; logits of another token.
        let mut numbers = reference.clone();
        numbers.gradients[5].1.iter_mut().for_each(|value| *value = -*value);
        assert_eq!(
            (check(&numbers).passed, check(&numbers).farthest),
            (false, numbers.gradients[5].0.clone())
        );
        numbers.gradients.remove(5);
        assert!(!check(&numbers).passed);
        let mut numbers = reference.clone();
        numbers.gradients[3].1[0] = f32::NAN;
        assert!(!check(&numbers).passed);
        let mut numbers = reference.clone();
        numbers.logits.rotate_left(320);
        assert!(!check(&numbers).passed);
    }

    #[test]
    fn a_panic_of_a_backend_is_an_error() {
        let panic: Box<dyn std::any::Any + Send> = Box::new("no adapter\nat x".to_owned());
        assert_eq!(of_panic(&*panic).what(), "the backend gave up: no adapter");
    }
}
