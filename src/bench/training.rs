//! Steps of training, and what follows them: folding, packing and writing.

use std::collections::BTreeMap;

use burn::module::Module;
use burn::tensor::{DType, Distribution, Tensor};

use super::attach::{attach, spec};
use super::parts::{Bench, Part, Work};
use super::timing::{Spread, timed};
use crate::data::TokenStream;
use crate::error::{Error, Result};
use crate::exhausted;
use crate::export::fewbit;
use crate::method::{self, MethodConfig, Moment};
use crate::model::{Block, CausalLm, Loader, Positions};
use crate::objective::{JsdObjective, ObjectiveConfig};
use crate::ops;
use crate::stage::Feed;
use crate::store::safetensors::ShardWriter;
use crate::train::{self, LearningRate, Optimizer, OptimizerConfig};

/// A rate at which nothing goes wrong in any number of steps.
const RATE: f64 = 1e-5;

/// A step that fits one block to its float output: forward, backward, optimizer.
pub(super) fn block(bench: &Bench<'_>) -> Result<(Work, Spread)> {
    let (settings, subject) = (bench.settings, bench.subject);
    let (batch, length) = (settings.batch, settings.length);
    let (device, config) = (&bench.device.device, &subject.config);
    note(bench, Part::Block);
    let (method, bits) = settings.method_of(Part::Block)?;
    // A stage fits blocks in f32 whatever the model's type.
    let dtype = DType::F32;
    let mut block = Loader { config, source: subject.source(), device, dtype }.block(0)?;
    let positions = Positions::new(config, 0, length, dtype, device);
    let input = Tensor::<3>::random([batch, length, config.d_model], Distribution::Default, device);
    let goal = block.forward(input.clone(), &positions);
    attach(&mut block, &method, &spec(bits)?, dtype)?;
    let mut student = Some(block.train());
    let mut optimizer = Optimizer::new(&OptimizerConfig::default());
    let rates = LearningRate::uniform(RATE);
    let rate_of = |path: &str| method::role_of(path).map_or(0.0, |role| rates.of(role));
    let mut step = 0;
    let seconds = settings.effort.measure(bench.stop, || {
        timed(|| {
            let loss = |student: &Block, _: usize| {
                let output = student.forward(input.clone(), &positions);
                Ok(ops::block_mse(output, goal.clone(), true))
            };
            let taken = student.take().ok_or_else(gone)?;
            let (mut trained, _) = train::step(taken, &mut optimizer, 1, &rate_of, loss)?;
            step += 1;
            between_steps(&mut trained, &method, step);
            student = Some(trained);
            wait(bench)
        })
    })?;
    let tokens = (batch * length) as f64;
    // Forward, and the gradients of input and weight.
    let weights = 6.0 * subject.active_weights() as f64 / config.n_blocks.max(1) as f64;
    let attention = subject.attention_products(batch as u64 * length as u64, length as u64);
    let operations = weights * tokens + 6.0 * attention / config.n_blocks.max(1) as f64;
    let what = format!("{} {bits} bits {batch}x{length}", method.name());
    Ok((Work { what, unit: "tokens", amount: tokens, operations: Some(operations) }, seconds))
}

fn between_steps(block: &mut Block, method: &MethodConfig, step: u64) {
    if !method.has_hook() {
        return;
    }
    for (_, linear) in block.linears_mut() {
        if let Some(weight) = method::between_steps(&linear.weight, Moment::Step(step)) {
            linear.weight = weight;
        }
    }
}

/// A step of distillation: the float teacher forward, the quantized student forward and backward, optimizer.
pub(super) fn distill(bench: &Bench<'_>) -> Result<(Work, Spread)> {
    let (settings, subject) = (bench.settings, bench.subject);
    let (batch, length, dtype) = (settings.batch, settings.length, settings.dtype);
    let (device, config) = (&bench.device.device, &subject.config);
    note(bench, Part::Distill);
    let (method, bits) = settings.method_of(Part::Distill)?;
    if method.has_hook() {
        return Err(Error::usage(format!("method {} learns block by block", method.name()))
            .at("--part distill")
            .fix("--part block, or --method seq"));
    }
    let teacher = Loader { config, source: subject.source(), device, dtype }.model()?;
    let mut student = teacher.clone();
    for block in &mut student.blocks {
        attach(block, &method, &spec(bits)?, dtype)?;
    }
    let mut student: Option<CausalLm> = Some(student.train());
    let tokens = bench.tokens(batch * length);
    let stream = &TokenStream { tokens, documents: 1, ..TokenStream::default() };
    let positions = &Positions::new(config, 0, length, dtype, device);
    let feed = Feed { stream, length, positions, config, dtype, device };
    let windows: Vec<u32> = (0..batch as u32).collect();
    let objective = ObjectiveConfig::Jsd(JsdObjective::default());
    let mut optimizer = Optimizer::new(&OptimizerConfig::default());
    let rates = LearningRate::uniform(RATE);
    let rate_of = |path: &str| method::role_of(path).map_or(0.0, |role| rates.of(role));
    let seconds = settings.effort.measure(bench.stop, || {
        timed(|| {
            let loss = |student: &CausalLm, _: usize| {
                let batch = feed.windows(&windows);
                Ok(batch.loss(student, Some(&teacher), &objective, false)?.0)
            };
            let taken = student.take().ok_or_else(gone)?;
            let (trained, _) = train::step(taken, &mut optimizer, 1, &rate_of, loss)?;
            student = Some(trained);
            wait(bench)
        })
    })?;
    let count = (batch * length) as f64;
    // The student forward and both its gradients, the teacher forward; the head three times.
    let weights = 8.0 * subject.active_weights() as f64 + 6.0 * subject.head_weights() as f64;
    let attention = subject.attention_products(batch as u64 * length as u64, length as u64);
    let operations = weights * count + 8.0 * attention;
    let what = format!("{} {bits} bits jsd {batch}x{length}", method.name());
    Ok((Work { what, unit: "tokens", amount: count, operations: Some(operations) }, seconds))
}

/// One block's linears from the end of their training to packed codes in a file.
pub(super) fn export(bench: &Bench<'_>) -> Result<(Work, Spread)> {
    let (settings, subject) = (bench.settings, bench.subject);
    let (device, config) = (&bench.device.device, &subject.config);
    note(bench, Part::Export);
    let (method, bits) = settings.method_of(Part::Export)?;
    let loader = Loader { config, source: subject.source(), device, dtype: DType::F32 };
    let mut block = loader.block(0)?;
    attach(&mut block, &method, &spec(bits)?, DType::F32)?;
    let dir = tempfile::tempdir();
    let dir = dir.map_err(|e| Error::io("make a folder in", &std::env::temp_dir(), &e))?;
    let mut count = 0;
    let seconds = settings.effort.measure(bench.stop, || {
        count += 1;
        let target = dir.path().join(count.to_string());
        std::fs::create_dir(&target).map_err(|e| Error::io("create", &target, &e))?;
        let seconds = timed(|| {
            let mut writer = ShardWriter::create(&target, u64::MAX)?;
            for (name, linear) in block.linears() {
                let folded = method::fold(&linear.weight);
                let folded = folded.ok_or_else(|| Error::failed("nothing to fold").at(name))??;
                for (name, tensor) in fewbit::encode(name, &folded) {
                    writer.add(&name, &tensor)?;
                }
            }
            writer.finish(&BTreeMap::new()).map(drop)
        });
        std::fs::remove_dir_all(&target).map_err(|e| Error::io("remove", &target, &e))?;
        seconds
    })?;
    let what = format!("{} {bits} bits", method.name());
    let amount = subject.block_weights() as f64;
    Ok((Work { what, unit: "weights", amount, operations: None }, seconds))
}

/// Notes what is done, for when memory ends.
pub(super) fn note(bench: &Bench<'_>, part: Part) {
    exhausted::working_on(format!("bench {}, {}", part.name(), bench.subject.name), "--batch 1");
}

/// Until the device has done what was asked for.
pub(super) fn wait(bench: &Bench<'_>) -> Result<()> {
    let done = bench.device.device.sync();
    done.map_err(|e| Error::failed(format!("the device failed: {e}")).at(&bench.device.name))
}

fn gone() -> Error {
    Error::failed("the student is gone")
}
