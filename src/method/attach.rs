//! The bridge to burn: attach a method to a parameter, find it again, fold it.
//!
//! The one place where burn's `[in, out]` weights meet our `[out, in]`.

use burn::module::{Module, Param, ParamId, Reparameterization};
use burn::nn::Linear;
use burn::tensor::{DType, Tensor};

use super::{CARRIED, Folded, Method, MethodConfig, Moment, Problem, ROLES, Start, Units};
use crate::error::Result;
use crate::ops;
use crate::quant::{
    Bits, CodedWeight, Grid, GroupLayout, ObserverConfig, Once, QuantSpec, QuantizedWeight,
    ScaleDigits,
};
use crate::train::{Measure, Role};

/// A method sitting on a linear's weight.
#[derive(Debug, Module)]
pub struct FakeQuant {
    method: Method,
    #[module(skip)]
    layout: GroupLayout,
    #[module(skip)]
    bits: Bits,
    #[module(skip)]
    compute: DType,
    #[module(skip)]
    digits: ScaleDigits,
}

impl FakeQuant {
    /// A method on a weight of `layout`; forwards see the result in `compute`.
    pub fn new(method: Method, layout: GroupLayout, bits: Bits, compute: DType) -> Self {
        Self { method, layout, bits, compute, digits: ScaleDigits::F32 }
    }

    /// The method.
    pub fn method(&self) -> &Method {
        &self.method
    }

    /// Codes and grid of this method on `weight` (`[in, out]`), brought to the host.
    fn fold(&self, weight: Tensor<2>) -> Result<QuantizedWeight> {
        let grouped = ops::reshape_grouped(weight.transpose(), self.layout.grouped());
        let host = |tensor: Tensor<2>| tensor.into_data().iter::<f32>().collect::<Vec<f32>>();
        let (codes, grid) = match self.method.quantizer(grouped).shortened(self.digits).fold() {
            Folded::Uniform { codes, scale, zero_point, zero_kind } => {
                let (scale, zero_point) = (host(scale), host(zero_point));
                (codes, Grid::Uniform { scale, zero_point, zero_kind })
            }
            Folded::BinaryCoding { codes, alpha, offset } => {
                (codes, Grid::BinaryCoding { alpha: host(alpha), offset: host(offset) })
            }
        };
        let codes: Vec<u8> = host(codes).into_iter().map(|code| code as u8).collect();
        QuantizedWeight::new(&codes, grid, self.bits, self.layout)
    }
}

impl Reparameterization for FakeQuant {
    const NAME: &'static str = "fake_quant";

    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        // A rank cast, not a reshape: a reshape would copy a transposed view.
        let weight = Tensor::<2>::from_dispatch(base.into_dispatch()).transpose();
        let [out, inputs] = weight.dims();
        let grouped = ops::reshape_grouped(weight, self.layout.grouped());
        let w_hat = self.method.quantizer(grouped).shortened(self.digits).values();
        let w_hat = ops::reshape_grouped(w_hat, [out, inputs]).transpose();
        let w_hat = if w_hat.dtype() == self.compute { w_hat } else { w_hat.cast(self.compute) };
        Tensor::from_dispatch(w_hat.into_dispatch())
    }
}

/// Codes and grid of a weight without learning.
///
/// # Shapes
/// - weight: `[out, in]`
///
/// # Errors
/// When the observer refuses the weight, the grid is damaged, or the method needs inputs.
pub fn quantize(
    config: &MethodConfig,
    spec: &QuantSpec,
    observer: &ObserverConfig,
    layout: GroupLayout,
    weight: &Tensor<2>,
) -> Result<QuantizedWeight> {
    config.solve(&Problem {
        spec,
        layout,
        observer,
        weight,
        feeds_scores: false,
        inputs: None,
        output_error: None,
    })
}

/// A weight method as it starts, folded.
pub(super) fn start_only(config: &MethodConfig, problem: &Problem<'_>) -> Result<QuantizedWeight> {
    let Problem { spec, layout, observer, weight, .. } = *problem;
    let grouped = ops::reshape_grouped(weight.clone(), layout.grouped());
    let start = Start { layout, ..Start::new(spec, observer, &grouped) };
    let method = config.init(&start)?;
    FakeQuant::new(method, layout, spec.bits, DType::F32).fold(weight.clone().transpose())
}

/// A linear's weight with `fake_quant` attached; an earlier one is replaced. The parameter keeps its
/// id. `trains_base` decides whether the stored weight learns.
pub fn attach(
    weight: &Param<Tensor<2>>,
    fake_quant: FakeQuant,
    trains_base: bool,
) -> Param<Tensor<2>> {
    // Re-applying over an existing reparameterization keeps the old one: strip it first.
    let bare = Param::initialized(weight.id, weight.base());
    bare.set_require_grad(trains_base).apply_reparameterization(Once(Some(fake_quant)))
}

/// The method on a linear's weight, if any.
pub fn attached(weight: &Param<Tensor<2>>) -> Option<&FakeQuant> {
    weight.reparameterization::<FakeQuant>()
}

/// Codes and grid of a weight that carries a method, or is coded; `None` for a dense weight.
///
/// # Errors
/// When the learned grid is damaged (a step that is not a positive number, a code out of range).
pub fn fold(weight: &Param<Tensor<2>>) -> Option<Result<QuantizedWeight>> {
    match weight.reparameterization::<CodedWeight>() {
        Some(coded) => Some(coded.fold()),
        None => attached(weight).map(|method| method.fold(weight.base())),
    }
}

/// One positive number per group that says how coarse its levels are, as [`Grid::coarseness`] of what
/// [`fold`] gives, without the codes; `None` for a dense weight.
///
/// # Errors
/// As [`fold`], of a coded weight.
pub fn coarseness(weight: &Param<Tensor<2>>) -> Option<Result<Vec<f32>>> {
    if let Some(coded) = weight.reparameterization::<CodedWeight>() {
        return Some(coded.fold().map(|weight| weight.grid.coarseness()));
    }
    let FakeQuant { method, layout, digits, .. } = attached(weight)?;
    let grouped = ops::reshape_grouped(weight.base().transpose(), layout.grouped());
    let scales = method.quantizer(grouped).shortened(*digits).scales();
    let [_, planes] = scales.dims();
    let scales: Vec<f32> = scales.into_data().iter::<f32>().collect();
    Some(Ok(scales.chunks(planes).map(|scales| scales.iter().map(|s| s.abs()).sum()).collect()))
}

/// What there is to see of a weight's codes and scales between steps, off the tape and on its device.
pub struct Glimpse {
    /// Codes as floats, of some of the groups, evenly spread, `[some, group_len]`; none where codes stay.
    pub codes: Option<Tensor<2>>,
    /// Scales, of the same groups or of all, `[some, planes]`.
    pub scales: Tensor<2>,
}

/// Codes of at most about `most` weights, and scales; `None` for a dense weight.
pub fn glimpse(weight: &Param<Tensor<2>>, most: usize) -> Option<Glimpse> {
    if let Some(coded) = weight.reparameterization::<CodedWeight>() {
        return Some(Glimpse { codes: None, scales: ops::off_tape(coded.scales()) });
    }
    let FakeQuant { method, layout, digits, .. } = attached(weight)?;
    let grouped = layout.grouped();
    let base = ops::reshape_grouped(weight.base().transpose(), grouped);
    let every = (grouped[0] * grouped[1]).div_ceil(most.max(1));
    let (quantizer, every) = method.quantizer(base).some_groups(every.min(grouped[0]));
    let quantizer = quantizer.shortened(*digits);
    let (codes, scales) = match quantizer.fold() {
        Folded::Uniform { codes, scale, .. } => (codes, scale),
        Folded::BinaryCoding { codes, alpha, .. } => (codes, alpha),
    };
    let codes = ops::every_row(ops::off_tape(codes), every);
    Some(Glimpse { codes: Some(codes), scales: ops::off_tape(scales) })
}

/// The weight after its method's work between steps; `None` for a dense weight.
pub fn between_steps(weight: &Param<Tensor<2>>, moment: Moment) -> Option<Param<Tensor<2>>> {
    let attached = attached(weight)?.clone();
    let base = weight.base();
    let trains_base = base.is_require_grad();
    let grouped = ops::reshape_grouped(base.inner().transpose(), attached.layout.grouped());
    let method = attached.method.between_steps(grouped, moment);
    Some(attach(weight, FakeQuant { method, ..attached }, trains_base))
}

/// The weight with scales of few digits from now on; `None` for a dense weight.
fn shorten(weight: &Param<Tensor<2>>, digits: ScaleDigits) -> Option<Param<Tensor<2>>> {
    if let Some(coded) = weight.reparameterization::<CodedWeight>() {
        return Some(coded.clone().shortened(digits).into_parameter(weight.id));
    }
    let fake_quant = FakeQuant { digits, ..attached(weight)?.clone() };
    Some(attach(weight, fake_quant, weight.base().is_require_grad()))
}

/// Every linear that is not dense goes on with scales of few digits; see [`CodedWeight::shortened`].
pub fn shorten_all<'a>(linears: impl IntoIterator<Item = &'a mut Linear>, digits: ScaleDigits) {
    for linear in linears {
        if let Some(weight) = shorten(&linear.weight, digits) {
            linear.weight = weight;
        }
    }
}

/// What a method makes of its weight now: a leaf to compute with in its place, and the value on the
/// tape; `None` for a dense weight.
pub fn materialize(weight: &Param<Tensor<2>>) -> Option<(Param<Tensor<2>>, Tensor<2>)> {
    attached(weight)?;
    let value = weight.val();
    let leaf = Tensor::from_inner(value.clone().inner()).require_grad();
    Some((Param::initialized(ParamId::new(), leaf), value))
}

/// What a later stage goes on from.
pub struct Latent {
    /// The weight before it is rounded, `[out, in]`.
    pub weight: Tensor<2>,
    /// The learned step, `[groups, 1]`, where there is one and it is not the scale.
    pub step: Option<Tensor<2>>,
}

/// The latent of a weight that carries a method; `None` for others.
pub fn latent(weight: &Param<Tensor<2>>) -> Option<Latent> {
    let attached = attached(weight)?;
    let base = weight.base();
    let learned = base.is_require_grad();
    let base = ops::off_tape(base).transpose();
    let shape = base.dims();
    let step = attached.method.units().map(|units| ops::off_tape(units.step.val()));
    let weight = if learned || step.is_some() {
        base
    } else {
        let grouped = ops::reshape_grouped(base, attached.layout.grouped());
        ops::reshape_grouped(attached.method.quantizer(grouped).latent(), shape)
    };
    Some(Latent { weight, step })
}

/// What the learning rates of a linear's latent, step and shift, or of the scales of its codes, are
/// measured in, by parameter.
pub fn measures(weight: &Param<Tensor<2>>) -> Vec<(ParamId, Measure)> {
    if let Some(coded) = weight.reparameterization::<CodedWeight>() {
        return coded.absolute_scales().map(|id| (id, Measure::Itself)).into_iter().collect();
    }
    let Some(units) = attached(weight).and_then(|attached| attached.method.units()) else {
        return Vec::new();
    };
    let Units { step, shift, spacing } = units;
    // A shift has one entry a group, as the spacing has.
    let shift = shift.map(|shift| (shift.id, Measure::Units(spacing.clone())));
    let weight = (weight.id, Measure::Units(spacing));
    [Some(weight), Some((step.id, Measure::Itself)), shift].into_iter().flatten().collect()
}

/// The role of a parameter, by its path in the module; `None` for one that no method learns.
/// A path that ends in `weight` is a latent.
pub fn role_of(path: &str) -> Option<Role> {
    let name = path.rsplit('.').next().unwrap_or(path);
    if name == "weight" {
        return Some(Role::Weight);
    }
    ROLES.iter().flat_map(|roles| roles.iter()).find(|(known, _)| *known == name).map(|(_, r)| *r)
}

/// Whether a parameter does not learn but is part of a training's state, by its path in the module.
pub fn is_carried(path: &str) -> bool {
    let name = path.rsplit('.').next().unwrap_or(path);
    CARRIED.iter().any(|names| names.contains(&name))
}
