//! What a linear starts a stage from.
//!
//! A stage that keeps bits, groups and the kind of grid goes on from exactly what the earlier one left:
//! its codes, its steps, and its latent weight. With a rate of zero it changes no bit. On another grid
//! it starts from the latent weight, which knows more than the codes that were made of it. A method that
//! learns grids alone has the codes themselves, packed; latents of evenly spaced levels wait behind it, and move
//! with the steps.

use burn::module::Param;
use burn::nn::Linear;
use burn::tensor::{DType, Tensor, TensorData};
use half::bf16;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::context::StageContext;
use super::state::LatentFile;
use crate::data;
use crate::error::{Error, Result};
use crate::export::fewbit::{latent_names, scales_name};
use crate::method::{self, FakeQuant, LeftGrid, Method, MethodConfig, Start};
use crate::model::{WeightSource, weight_name};
use crate::ops;
use crate::quant::{Bits, Grid, GroupAxis, GroupLayout, QuantizedWeight};
use crate::store::safetensors::Checkpoint;
use crate::store::{HostTensor, TensorSource};
use crate::train::LatentsIn;

/// What a stage on another grid than the one before starts from. On the same grid it goes on.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum StartFrom {
    /// The weights as the earlier stage learned them, before they were rounded; rounded ones where it
    /// learned none.
    #[default]
    Latents,
    /// The weights that the earlier stage's codes stand for.
    Rounded,
    /// The float model's weights.
    Float,
}

/// How weights begin a stage.
#[derive(Clone, Copy, Debug)]
pub(super) struct Beginning {
    /// On another grid than before: what they start from.
    pub(super) from: StartFrom,
    /// How far from a border between two levels latent weights are at least, in parts of the levels' distance.
    pub(super) margin: f32,
}

impl Beginning {
    /// Latents that go on stay where they are.
    pub(super) fn at(from: StartFrom) -> Self {
        Self { from, margin: 0.0 }
    }
}

/// What is there of a linear, on the host, row by row.
struct Found {
    weight: Option<Vec<f32>>,
    step: Option<Vec<f32>>,
}

impl StageContext<'_> {
    /// Puts `method` on `linear`'s weight as `name` starts this stage, or the codes that it leaves as they
    /// are in the weight's place; forwards see the result in `compute`. Latent weights are f32 whatever the
    /// model's type, and hold what `latents` can.
    pub(super) fn attach(
        &self,
        name: &str,
        linear: &mut Linear,
        method: &MethodConfig,
        Beginning { from, margin }: Beginning,
        (compute, latents): (DType, LatentsIn),
    ) -> Result<()> {
        let spec = &self.specs[name];
        let [inputs, out] = linear.weight.dims();
        let layout = spec.layout([out, inputs]).map_err(|e| e.at(name))?;
        let left = self.model.quantized.get(name);
        if let Some(learned) = method.tunes() {
            if let Some((codes, _)) = left {
                same_codes(codes, (spec.bits, layout)).map_err(|e| e.at(name))?;
            }
            linear.weight = self.coded(name, learned, compute)?.into_parameter(linear.weight.id);
            return Ok(());
        }
        let same = left.filter(|(left, _)| (left.bits, left.layout) == (spec.bits, layout));
        let mut found = self.latent(name)?;
        if let Some(((codes, _), weight)) = same.zip(found.weight.as_mut())
            && margin > 0.0
        {
            clear_borders(weight, codes, margin);
        }
        if let Some((codes, made_by)) = same
            && self.go_on(name, linear, method, &found, (codes, made_by), (compute, latents))?
        {
            return Ok(());
        }
        let values = match from {
            StartFrom::Latents => found.weight,
            StartFrom::Rounded => None,
            StartFrom::Float if left.is_none() => None,
            StartFrom::Float => {
                let float = self.model.tuned_on(self.model.float()?);
                Some(float.weight(&weight_name(name), &[out, inputs])?)
            }
        };
        match values {
            Some(values) => self.set_weight(linear, held(values, latents)),
            None if linear.weight.val().dtype() != DType::F32 || latents != LatentsIn::F32 => {
                let values = self.model.weight(&weight_name(name), &[out, inputs])?;
                self.set_weight(linear, held(values, latents));
            }
            None => {}
        }
        let grouped = grouped(linear, layout);
        let start = self.start(name, layout, &grouped);
        let attached = method.init(&start).map_err(|e| e.at(name))?;
        put(linear, method, attached, layout, spec.bits, compute);
        if margin > 0.0 {
            self.clear(name, linear, method, margin, (compute, latents))?;
        }
        Ok(())
    }

    /// Draws the latents of a grid that begins with this stage away from the borders of its levels: they go on from
    /// its codes as they would from an earlier stage's.
    fn clear(
        &self,
        name: &str,
        linear: &mut Linear,
        method: &MethodConfig,
        margin: f32,
        (compute, latents): (DType, LatentsIn),
    ) -> Result<()> {
        let host = |tensor: Tensor<2>| tensor.into_data().iter::<f32>().collect::<Vec<_>>();
        let codes = method::fold(&linear.weight).transpose().map_err(|e| e.at(name))?;
        let Some((codes, latent)) = codes.zip(method::latent(&linear.weight)) else {
            return Err(Error::failed("nothing to fold").at(name));
        };
        let mut weight = host(latent.weight);
        clear_borders(&mut weight, &codes, margin);
        let found = Found { weight: Some(weight), step: latent.step.map(host) };
        if self.go_on(name, linear, method, &found, (&codes, method.name()), (compute, latents))? {
            return Ok(());
        }
        let what = format!("method.{} cannot go on from its own codes", method.name());
        Err(Error::failed(what).at(name).fix("no start_margin"))
    }

    /// Goes on from codes on the method's own grid; `false` where it has another.
    fn go_on(
        &self,
        name: &str,
        linear: &mut Linear,
        method: &MethodConfig,
        found: &Found,
        (codes, made_by): (&QuantizedWeight, &str),
        (compute, latents): (DType, LatentsIn),
    ) -> Result<bool> {
        let layout = codes.layout;
        let Grid::Uniform { scale, zero_point, zero_kind } = &codes.grid else { return Ok(false) };
        let column = |values: &[f32]| {
            let data = TensorData::new(values.to_vec(), [layout.groups, 1]);
            Tensor::<2>::from_data(data, &self.device.device)
        };
        let grid = LeftGrid {
            scale: column(scale),
            zero_point: column(zero_point),
            zero_kind: *zero_kind,
            step: found.step.as_deref().map(column),
            method: made_by.to_owned(),
        };
        let rounded = codes.dequantize();
        let mut latent = found.weight.clone().unwrap_or_else(|| rounded.clone());
        // Scales of few digits, and rounding errors, may have moved a weight over an edge: such a
        // weight starts in the middle of its level.
        for _ in 0..2 {
            self.set_weight(linear, held(latent.clone(), latents));
            let weight = grouped(linear, layout);
            let start = self.start(name, layout, &weight);
            let resumed = method.resume(&start, &grid).map_err(|e| e.at(name))?;
            let Some(resumed) = resumed else { return Ok(false) };
            put(linear, method, resumed, layout, codes.bits, compute);
            let now = method::fold(&linear.weight)
                .ok_or_else(|| Error::failed("nothing to fold").at(name))?
                .map_err(|e| e.at(name))?;
            if now == *codes {
                return Ok(true);
            }
            let pairs = latent.iter_mut().zip(now.dequantize()).zip(&rounded);
            for ((latent, now), rounded) in pairs {
                if now.to_bits() != rounded.to_bits() {
                    *latent = *rounded;
                }
            }
        }
        Err(Error::gate(format!(
            "method.{} does not meet the grid that {made_by} left",
            method.name()
        ))
        .at(name)
        .fix("other bits or groups in this stage, or the same method"))
    }

    /// What an earlier stage saved of a linear's latent. Where one in between moved the steps of its codes, it has
    /// moved with them: each weight keeps its place between two levels.
    fn latent(&self, name: &str) -> Result<Found> {
        let Some(LatentFile(path)) = self.model.latents.get(name) else {
            return Ok(Found { weight: None, step: None });
        };
        let file = Checkpoint::open_file(path)?;
        let [latent, step] = latent_names(name);
        let read = |name: &str| file.read(name)?.to_f32().map_err(|e| e.at(name));
        let mut weight = read(&latent)?;
        let mut step = file.contains(&step).then(|| read(&step)).transpose()?;
        let left = self.model.quantized.get(name).map(|(left, _)| left);
        if let Some(QuantizedWeight { grid: Grid::Uniform { scale, .. }, layout, .. }) = left
            && layout.axis == GroupAxis::In
        {
            let before = read(&scales_name(name))?;
            for (group, (now, before)) in scale.iter().zip(&before).enumerate() {
                // Where nothing moved it is 1, and changes no bit.
                let factor = now / before;
                for weight in &mut weight[group * layout.group_len..][..layout.group_len] {
                    *weight *= factor;
                }
                if let Some(step) = step.as_mut().and_then(|steps| steps.get_mut(group)) {
                    *step *= factor;
                }
            }
        }
        Ok(Found { weight: Some(weight), step })
    }

    fn start<'a>(&'a self, name: &str, layout: GroupLayout, weight: &'a Tensor<2>) -> Start<'a> {
        Start {
            spec: &self.specs[name],
            layout,
            observer: self.observer,
            weight,
            seed: data::seed_of(self.seed, &format!("stage {} {name}", self.stage)),
        }
    }

    /// Gives `linear` a weight, `[out, in]` in row order; a method on it is gone.
    pub(super) fn set_weight(&self, linear: &mut Linear, values: Vec<f32>) {
        let [inputs, out] = linear.weight.dims();
        let weight = TensorData::new(values, [out, inputs]);
        let weight = Tensor::<2>::from_data(weight, &self.device.device).transpose();
        linear.weight = Param::initialized(linear.weight.id, weight);
    }

    /// What later stages go on from, for what this one saves; nothing where no later stage does.
    /// What bf16 holds is saved so.
    pub(super) fn latents_of(
        &self,
        name: &str,
        linear: &Linear,
        latents: LatentsIn,
    ) -> Vec<(String, HostTensor)> {
        let Some(latent) = self.keeps_latents.then(|| method::latent(&linear.weight)).flatten()
        else {
            return Vec::new();
        };
        let host = |tensor: Tensor<2>, kept: LatentsIn| {
            let shape = tensor.dims();
            let values: Vec<f32> = tensor.into_data().iter::<f32>().collect();
            match kept {
                LatentsIn::F32 => HostTensor::f32(shape, &values),
                LatentsIn::Bf16 => HostTensor::bf16_from_f32(shape, &values),
            }
        };
        let keys = latent_names(name).into_iter();
        let tensors = [Some((latent.weight, latents)), latent.step.map(|s| (s, LatentsIn::F32))];
        let named = keys.zip(tensors);
        named.filter_map(|(name, of)| of.map(|(tensor, kept)| (name, host(tensor, kept)))).collect()
    }
}

/// Draws latent weights to the middle of their levels, by so much that none is nearer than `margin` to the border
/// of its level, in parts of the levels' distance. What lies beyond the outermost level stays.
fn clear_borders(latent: &mut [f32], codes: &QuantizedWeight, margin: f32) {
    let (Grid::Uniform { scale, .. }, GroupAxis::In) = (&codes.grid, codes.layout.axis) else {
        return;
    };
    let (middles, len) = (codes.dequantize(), codes.layout.group_len);
    for ((latents, middles), scale) in latent.chunks_mut(len).zip(middles.chunks(len)).zip(scale) {
        for (latent, middle) in latents.iter_mut().zip(middles) {
            let off = *latent - middle;
            if off.abs() <= 0.5 * scale {
                *latent = middle + (1.0 - 2.0 * margin) * off;
            }
        }
    }
}

/// Values as `latents` holds them, the nearest.
fn held(mut values: Vec<f32>, latents: LatentsIn) -> Vec<f32> {
    if latents == LatentsIn::Bf16 {
        for value in &mut values {
            *value = bf16::from_f32(*value).to_f32();
        }
    }
    values
}

/// Refuses codes that a stage's bits and groups would make others of.
fn same_codes(codes: &QuantizedWeight, (bits, layout): (Bits, GroupLayout)) -> Result<()> {
    if (codes.bits, codes.layout) == (bits, layout) {
        return Ok(());
    }
    let describe = |bits: Bits, layout: GroupLayout| {
        let along = match layout.axis {
            GroupAxis::In => "inputs",
            GroupAxis::Out => "outputs",
        };
        format!("{bits} bits in {} groups of {} {along}", layout.groups, layout.group_len)
    };
    let (found, wanted) = (describe(codes.bits, codes.layout), describe(bits, layout));
    Err(Error::preflight(format!("the codes have {found}, but this stage asks for {wanted}"))
        .fix("in this stage the bits and group_size of the stage that made the codes"))
}

/// The weight of a linear that carries no method, `[groups, group_len]`, off the tape.
fn grouped(linear: &Linear, layout: GroupLayout) -> Tensor<2> {
    let weight = ops::off_tape(linear.weight.base());
    ops::reshape_grouped(weight.transpose(), layout.grouped())
}

fn put(
    linear: &mut Linear,
    config: &MethodConfig,
    method: Method,
    layout: GroupLayout,
    bits: Bits,
    compute: DType,
) {
    let fake_quant = FakeQuant::new(method, layout, bits, compute);
    linear.weight = method::attach(&linear.weight, fake_quant, config.trains_base());
}
