//! A method on the linears of a block, as a stage puts it there on weights that no stage has touched.

use burn::module::Param;
use burn::nn::Linear;
use burn::tensor::DType;

use crate::error::Result;
use crate::method::{self, FakeQuant, MethodConfig, Start};
use crate::model::Block;
use crate::ops;
use crate::quant::{Bits, GroupSize, ObserverConfig, QuantSpec, Symmetry};

/// What a method makes of linears: one group per output row.
pub(super) fn spec(bits: u8) -> Result<QuantSpec> {
    let (group_size, symmetry) = (GroupSize::PerChannel, Symmetry::Asymmetric);
    Ok(QuantSpec { bits: Bits::new(bits)?, group_size, symmetry })
}

/// Puts a method on every linear of a block; forwards see the result in `compute`.
///
/// # Errors
/// When the method refuses a weight.
pub(super) fn attach(
    block: &mut Block,
    config: &MethodConfig,
    spec: &QuantSpec,
    compute: DType,
) -> Result<()> {
    let prefix = block.config.block_prefix(block.index);
    for (name, linear) in block.linears_mut() {
        attach_one(linear, config, spec, compute).map_err(|e| e.at(format!("{prefix}.{name}")))?;
    }
    Ok(())
}

fn attach_one(
    linear: &mut Linear,
    config: &MethodConfig,
    spec: &QuantSpec,
    compute: DType,
) -> Result<()> {
    // Latent weights are f32 whatever the model's type.
    let weight = ops::off_tape(linear.weight.base()).cast(DType::F32);
    let [inputs, out] = weight.dims();
    let layout = spec.layout([out, inputs])?;
    linear.weight = Param::initialized(linear.weight.id, weight.clone());
    let weight = ops::reshape_grouped(weight.transpose(), layout.grouped());
    let observer = &ObserverConfig::default();
    let start = Start { spec, layout, observer, weight: &weight, seed: 0 };
    let fake_quant = FakeQuant::new(config.init(&start)?, layout, spec.bits, compute);
    linear.weight = method::attach(&linear.weight, fake_quant, config.trains_base());
    Ok(())
}
