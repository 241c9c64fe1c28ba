//! AdaDim (Heo et al., ICLR 2024, arXiv 2309.15531): groups along the inputs or along the outputs,
//! whichever changes the output less.
//!
//! *What it learns:* nothing; it compares module outputs on calibration text. *Formula:*
//! round-to-nearest on groups of consecutive inputs of one output row, or of consecutive outputs of
//! one input column, where an outlying input channel stays by itself (methods-peft-bcq 7). *Start:*
//! the observer's grid. *Recipe keys:* none of its own; `inputs = "float"` in the stage is the
//! paper's stream. *Export:* uniform grid, integer zero; linears grouped along the outputs fit only
//! formats that say so.

use burn::tensor::{Tensor, TensorData};
use serde::{Deserialize, Serialize};

use super::{MethodConfig, Needs, Problem, RtnConfig, Solver, quantize};
use crate::error::{Error, Result};
use crate::quant::{GroupAxis, GroupLayout, QuantSpec, QuantizedWeight, Repr};

/// `method.adadim`: no keys.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct AdaDimConfig {}

/// The solver.
#[derive(Clone, Copy, Debug)]
pub struct AdaDim;

impl Solver for AdaDim {
    type Config = AdaDimConfig;

    const LEAVES: Repr = Repr::Uniform;
    const NEEDS: Needs = Needs::Outputs;

    fn accepts(_: &AdaDimConfig, _: &QuantSpec) -> Result<()> {
        Ok(())
    }

    fn solve(_: &AdaDimConfig, problem: &Problem<'_>) -> Result<QuantizedWeight> {
        let error = problem
            .output_error
            .ok_or_else(|| Error::failed("method.adadim needs calibration data"))?;
        let [out, inputs] = problem.weight.dims();
        let along_inputs = rounded(problem, problem.layout)?;
        // A group size that does not divide the outputs leaves no choice.
        let layout = problem.spec.layout_along([out, inputs], GroupAxis::Out);
        let Ok(layout) = layout else { return Ok(along_inputs) };
        let along_outputs = rounded(problem, layout)?;
        let of = |weight: &QuantizedWeight| {
            let data = TensorData::new(weight.dequantize(), [out, inputs]);
            error(&Tensor::from_data(data, &problem.weight.device()))
        };
        // A tie goes to the inputs, which every runtime reads.
        Ok(if of(&along_outputs)? < of(&along_inputs)? { along_outputs } else { along_inputs })
    }
}

/// Round-to-nearest along `layout`'s dimension.
fn rounded(problem: &Problem<'_>, layout: GroupLayout) -> Result<QuantizedWeight> {
    let rtn = MethodConfig::Rtn(RtnConfig {});
    let Problem { spec, observer, weight, .. } = problem;
    match layout.axis {
        GroupAxis::In => quantize(&rtn, spec, observer, layout, weight),
        GroupAxis::Out => {
            // Groups of the transpose along its inputs are groups of the weight along its outputs.
            let [rows, columns] = layout.stored();
            let flipped = GroupLayout { out: rows, inputs: columns, axis: GroupAxis::In, ..layout };
            let stored = (*weight).clone().transpose();
            let rounded = quantize(&rtn, spec, observer, flipped, &stored)?;
            Ok(QuantizedWeight { layout, ..rounded })
        }
    }
}
