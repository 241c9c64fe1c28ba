//! The bridge to burn: attach a method to a parameter, find it again, fold it.
//!
//! The one place where burn's `[in, out]` weights meet our `[out, in]`.

use burn::module::{Module, Param, Reparameterization, Reparameterizer};
use burn::tensor::{DType, Tensor};

use super::{Folded, Method, MethodConfig, ROLES};
use crate::error::Result;
use crate::ops;
use crate::quant::{Bits, Grid, GroupLayout, ObserverConfig, QuantSpec, QuantizedWeight};
use crate::train::Role;

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
}

impl FakeQuant {
    /// A method on a weight of `layout`; forwards see the result in `compute`.
    pub fn new(method: Method, layout: GroupLayout, bits: Bits, compute: DType) -> Self {
        Self { method, layout, bits, compute }
    }

    /// The method.
    pub fn method(&self) -> &Method {
        &self.method
    }

    /// Codes and grid of this method on `weight` (`[in, out]`), brought to the host.
    fn fold(&self, weight: Tensor<2>) -> Result<QuantizedWeight> {
        let grouped = ops::reshape_grouped(weight.transpose(), self.layout.grouped());
        let Folded { codes, scale, zero_point, zero_kind } = self.method.fold(grouped);
        let host = |tensor: Tensor<2>| tensor.into_data().iter::<f32>().collect::<Vec<f32>>();
        QuantizedWeight {
            codes: host(codes).into_iter().map(|code| code as u8).collect(),
            grid: Grid::Uniform { scale: host(scale), zero_point: host(zero_point), zero_kind },
            bits: self.bits,
            layout: self.layout,
        }
        .checked()
    }
}

impl Reparameterization for FakeQuant {
    const NAME: &'static str = "fake_quant";

    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        // A rank cast, not a reshape: a reshape would copy a transposed view.
        let weight = Tensor::<2>::from_dispatch(base.into_dispatch()).transpose();
        let [out, inputs] = weight.dims();
        let w_hat = self.method.fake_quant(ops::reshape_grouped(weight, self.layout.grouped()));
        let w_hat = ops::reshape_grouped(w_hat, [out, inputs]).transpose();
        let w_hat = if w_hat.dtype() == self.compute { w_hat } else { w_hat.cast(self.compute) };
        Tensor::from_dispatch(w_hat.into_dispatch())
    }
}

/// Codes and grid of a weight under a method as it starts: all there is to a method that learns
/// nothing.
///
/// # Shapes
/// - weight: `[out, in]`
///
/// # Errors
/// When the observer refuses the weight, or the grid is damaged.
pub fn quantize(
    config: &MethodConfig,
    spec: &QuantSpec,
    observer: &ObserverConfig,
    layout: GroupLayout,
    weight: Tensor<2>,
) -> Result<QuantizedWeight> {
    let grouped = ops::reshape_grouped(weight.clone(), layout.grouped());
    let method = config.init(spec, observer, &grouped)?;
    FakeQuant::new(method, layout, spec.bits, DType::F32).fold(weight.transpose())
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
    bare.set_require_grad(trains_base).apply_reparameterization(OneShot(Some(fake_quant)))
}

/// The method on a linear's weight, if any.
pub fn attached(weight: &Param<Tensor<2>>) -> Option<&FakeQuant> {
    weight.reparameterization::<FakeQuant>()
}

/// Codes and grid of a weight that carries a method; `None` for a dense weight.
///
/// # Errors
/// When the learned grid is damaged (a step that is not a positive number, a code out of range).
pub fn fold(weight: &Param<Tensor<2>>) -> Option<Result<QuantizedWeight>> {
    attached(weight).map(|method| method.fold(weight.base()))
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

/// Puts one prepared reparameterization on the one parameter it is applied to.
struct OneShot(Option<FakeQuant>);

impl Reparameterizer for OneShot {
    type Reparam = FakeQuant;

    fn reparameterize<const D: usize>(
        &mut self,
        _path: &str,
        param: Param<Tensor<D>>,
    ) -> (Param<Tensor<D>>, Option<FakeQuant>) {
        (param, self.0.take())
    }
}
