//! A timed probe of one block: what passes and steps take on this device with this model's shapes.
//!
//! Each thing is measured when a stage's estimate first asks for it, on block 0 with random hidden states.
//! What takes long is measured on few tokens and goes on along the line through two numbers of them.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::time::Instant;

use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::{DType, Device, Distribution, Tensor};

use super::state::ModelState;
use crate::error::{Error, Result};
use crate::method::{self, FakeQuant, MethodConfig, Needs, Problem, Start};
use crate::model::{Block, Loader, Positions, WeightSource, weight_name};
use crate::ops;
use crate::quant::{Hessian, ObserverConfig, QuantSpec};
use crate::stop::StopFlag;
use crate::train::{self, LearningRate, Optimizer, OptimizerConfig};

/// Tokens of the smaller and of the larger measurement.
const TOKENS: [usize; 2] = [64, 512];
/// Most inputs and outputs of a linear that is rounded or solved.
const MOST: usize = 2048;
/// Rates at which nothing goes wrong in a few steps.
const RATE: f64 = 1e-6;

/// Seconds that grow with the number of tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Line {
    /// Whatever the number of tokens.
    pub fixed: f64,
    /// For each token.
    pub token: f64,
}

impl Line {
    /// Through two measurements; never falling, never below 0.
    fn through([(few, short), (many, long)]: [(usize, f64); 2]) -> Self {
        let token = ((long - short) / (many - few).max(1) as f64).max(0.0);
        let fixed = (short - token * few as f64).max(0.0);
        Self { fixed, token }
    }

    /// Seconds for so many tokens at once.
    pub fn at(self, tokens: u64) -> f64 {
        self.fixed + self.token * tokens as f64
    }
}

/// Measures one block of a model, each thing once.
pub struct Probe<'a> {
    model: &'a ModelState,
    device: &'a Device,
    stop: &'a StopFlag,
    known: RefCell<BTreeMap<String, Option<Line>>>,
}

impl<'a> Probe<'a> {
    /// Nothing measured yet.
    pub fn new(model: &'a ModelState, device: &'a Device, stop: &'a StopFlag) -> Self {
        Self { model, device, stop, known: RefCell::default() }
    }

    /// What `work` measures, if it can be measured; what cannot is estimated without.
    fn once(
        &self,
        key: String,
        work: impl FnOnce(&dyn WeightSource) -> Result<Line>,
    ) -> Option<Line> {
        if let Some(known) = self.known.borrow().get(&key) {
            return *known;
        }
        let source = self.model.float().ok().filter(|_| self.stop.check().is_ok());
        let found = source.and_then(|source| work(source).ok());
        self.known.borrow_mut().insert(key, found);
        found
    }

    fn block(&self, source: &dyn WeightSource) -> Result<Block> {
        let (config, device) = (&self.model.config, self.device);
        Loader { config, source, device, dtype: DType::F32 }.block(0)
    }

    fn input(&self, tokens: usize, length: usize) -> Tensor<3> {
        let shape = [tokens.div_ceil(length), length.min(tokens), self.model.config.d_model];
        Tensor::random(shape, Distribution::Normal(0.0, 1.0), self.device)
    }

    fn positions(&self, length: usize) -> Positions {
        Positions::new(&self.model.config, 0, length, DType::F32, self.device)
    }

    /// Waits until the device has done what was asked for.
    fn wait(&self) -> Result<()> {
        self.stop.check()?;
        self.device.sync().map_err(|e| Error::failed(format!("the device failed: {e}")))
    }

    /// Reading a block's weights; `token` is seconds for each weight.
    pub fn load(&self) -> Option<Line> {
        self.once("load".to_owned(), |source| {
            let start = Instant::now();
            let block = self.block(source)?;
            self.wait()?;
            let weights: usize = block
                .linears()
                .map(|(_, linear)| linear.weight.dims().iter().product::<usize>())
                .sum();
            let token = start.elapsed().as_secs_f64() / weights.max(1) as f64;
            Ok(Line { fixed: 0.0, token })
        })
    }

    /// A forward pass through a block, of tokens in windows of `length`.
    pub fn forward(&self, length: usize) -> Option<Line> {
        self.once(format!("forward {length}"), |source| {
            let block = self.block(source)?;
            let mut taken = [(0, 0.0); 2];
            for (tokens, taken) in TOKENS.into_iter().zip(&mut taken) {
                let tokens = tokens.max(length.min(TOKENS[0]));
                let length = length.min(tokens);
                let (x, positions) = (self.input(tokens, length), self.positions(length));
                let pass = || {
                    drop(block.forward(x.clone(), &positions));
                    self.wait()
                };
                *taken = (tokens, mean_of(3, pass)?);
            }
            Ok(Line::through(taken))
        })
    }

    /// A step that fits a block: forward, backward, optimizer; of tokens in windows of `length`, of which
    /// there are `most` at the most.
    pub fn step(
        &self,
        method: &MethodConfig,
        (spec, observer): (&QuantSpec, &ObserverConfig),
        optimizer: &OptimizerConfig,
        [length, most]: [usize; 2],
    ) -> Option<Line> {
        let key = format!("step {length} {most} {} {spec:?} {optimizer:?}", method.name());
        self.once(key, |source| {
            let mut block = self.block(source)?;
            attach(&mut block, method, spec, observer, DType::F32)?;
            let mut optimizer = Optimizer::new(optimizer);
            let rates = LearningRate::uniform(RATE);
            let rate_of = |path: &str| method::role_of(path).map_or(0.0, |role| rates.of(role));
            let mut student = Some(block.train());
            let mut taken = [(0, 0.0); 2];
            for (tokens, taken) in TOKENS.into_iter().zip(&mut taken) {
                let tokens = tokens.min(most).max(1);
                let length = length.min(tokens);
                let (x, positions) = (self.input(tokens, length), self.positions(length));
                let tokens = x.dims()[0] * length;
                let step = || {
                    let Some(module) = student.take() else { return self.wait() };
                    let loss = |module: &Block, _: usize| {
                        let output = module.forward(x.clone(), &positions);
                        Ok(ops::block_mse(output, x.clone(), false))
                    };
                    let (module, _) =
                        train::checked_step(module, &mut optimizer, 1, &rate_of, loss)?;
                    student = Some(module);
                    self.wait()
                };
                *taken = (tokens, mean_of(2, step)?);
            }
            Ok(Line::through(taken))
        })
    }

    /// Putting a method on a block's linears, or rounding them by it; `token` is seconds for each weight.
    pub fn round(
        &self,
        method: &MethodConfig,
        spec: &QuantSpec,
        observer: &ObserverConfig,
    ) -> Option<Line> {
        self.once(format!("round {} {spec:?}", method.name()), |source| {
            let config = &self.model.config;
            // The largest: on a small one a call costs more than its work.
            let size = |shape: [usize; 2]| shape.iter().product::<usize>();
            let Some(linear) = config.specs(0).iter().max_by_key(|spec| size(spec.shape)) else {
                return Err(Error::failed("a block without linears"));
            };
            let (inputs, out) = (linear.shape[1].min(MOST), linear.shape[0].min(MOST));
            let name = weight_name(&format!("{}.{}", config.block_prefix(0), linear.name));
            let values = source.weight(&name, &linear.shape)?;
            let all = Tensor::<1>::from_data(values.as_slice(), self.device).reshape(linear.shape);
            let weight = all.slice([0..out, 0..inputs]);
            let spec = QuantSpec { ..*spec };
            let layout = spec.layout([out, inputs])?;
            let mut hessian = Hessian::new(inputs);
            if method.needs() != Needs::Weight {
                let rows =
                    Tensor::<2>::random([inputs, inputs], Distribution::Default, self.device);
                hessian.add(&rows.into_data().iter::<f32>().collect::<Vec<f32>>());
            }
            let seconds = mean_of(1, || {
                if method.learns() {
                    let grouped = ops::reshape_grouped(weight.clone(), layout.grouped());
                    let start = Start { spec: &spec, layout, observer, weight: &grouped, seed: 0 };
                    method.init(&start)?;
                    return self.wait();
                }
                let problem = Problem {
                    spec: &spec,
                    layout,
                    observer,
                    weight: &weight,
                    feeds_scores: false,
                    inputs: (method.needs() != Needs::Weight).then_some(&hessian),
                    output_error: None,
                };
                method.solve(&problem)?;
                self.wait()
            })?;
            // A solver with second moments takes longer for more inputs: `Scene::rounding` goes on from these.
            Ok(Line { fixed: inputs as f64, token: seconds / (inputs * out) as f64 })
        })
    }

    /// Logits of hidden states and a loss of them; `token` is seconds for each token.
    pub fn head(&self) -> Option<Line> {
        self.once("head".to_owned(), |_| {
            let [vocab, width] = self.model.config.head_shape();
            let tokens = ((1 << 22) / vocab.max(1)).clamp(8, TOKENS[1]);
            let random =
                |shape: [usize; 2]| Tensor::<2>::random(shape, Distribution::Default, self.device);
            // A part of the rows: the whole would take as long to make.
            let rows = vocab.min(1 << 14);
            let (hidden, head) = (random([tokens, width]), random([rows, width]));
            let seconds = mean_of(3, || {
                drop(ops::linear(hidden.clone(), head.clone().transpose()).exp());
                self.wait()
            })?;
            Ok(Line { fixed: 0.0, token: seconds / tokens as f64 * vocab as f64 / rows as f64 })
        })
    }
}

/// Mean seconds of `times` calls, after one that does not count.
fn mean_of(times: u32, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    work()?;
    let start = Instant::now();
    for _ in 0..times {
        work()?;
    }
    Ok(start.elapsed().as_secs_f64() / f64::from(times))
}

/// Puts a method on every linear of a block that no stage has touched; forwards see the result in `compute`.
///
/// # Errors
/// When the method refuses a weight.
pub fn attach(
    block: &mut Block,
    config: &MethodConfig,
    spec: &QuantSpec,
    observer: &ObserverConfig,
    compute: DType,
) -> Result<()> {
    let prefix = block.config.block_prefix(block.index);
    for (name, linear) in block.linears_mut() {
        let attached = attach_one(linear, config, spec, observer, compute);
        attached.map_err(|e| e.at(format!("{prefix}.{name}")))?;
    }
    Ok(())
}

fn attach_one(
    linear: &mut Linear,
    config: &MethodConfig,
    spec: &QuantSpec,
    observer: &ObserverConfig,
    compute: DType,
) -> Result<()> {
    // Latent weights are f32 whatever the model's type.
    let weight = ops::off_tape(linear.weight.base()).cast(DType::F32);
    let [inputs, out] = weight.dims();
    let layout = spec.layout([out, inputs])?;
    linear.weight = Param::initialized(linear.weight.id, weight.clone());
    let weight = ops::reshape_grouped(weight.transpose(), layout.grouped());
    let start = Start { spec, layout, observer, weight: &weight, seed: 0 };
    let fake_quant = FakeQuant::new(config.init(&start)?, layout, spec.bits, compute);
    linear.weight = method::attach(&linear.weight, fake_quant, config.trains_base());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_through_noise_never_falls() {
        let line = Line::through([(64, 1.0), (512, 5.48)]);
        assert!((line.fixed - 0.36).abs() < 1e-9 && (line.at(4096) - 41.32).abs() < 1e-9);
        assert_eq!(Line::through([(64, 1.0), (512, 0.5)]), Line { fixed: 1.0, token: 0.0 });
        assert_eq!(Line::through([(64, 0.1), (512, 9.0)]).fixed.to_bits(), 0);
    }
}
