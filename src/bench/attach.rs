//! A method on the linears of a block, as a stage puts it there on weights that no stage has touched.

use burn::tensor::DType;

use crate::error::Result;
use crate::method::MethodConfig;
use crate::model::Block;
use crate::quant::{Bits, GroupSize, ObserverConfig, QuantSpec, Symmetry};
use crate::stage;

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
    stage::attach(block, config, spec, &ObserverConfig::default(), compute)
}
