//! AdaDim (Heo et al., ICLR 2024, arXiv 2309.15531): groups along the inputs or along the outputs,
//! whichever changes the output less.
//!
//! *What it learns:* nothing; it compares module outputs on calibration text. *Formula:*
//! round-to-nearest on groups of consecutive inputs of one output row, or of consecutive outputs of
//! one input column, where an outlying input channel stays by itself. *Start:*
//! the observer's grid. *Recipe keys:* none of its own; `inputs = "float"` in the stage is the
//! paper's stream. *Export:* uniform grid, integer zero; linears grouped along the outputs fit only
//! formats that say so.

use burn::tensor::{Tensor, TensorData};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{MethodConfig, Needs, Problem, RtnConfig, Solver, quantize};
use crate::error::{Error, Result};
use crate::quant::{GroupAxis, GroupLayout, QuantSpec, QuantizedWeight, Repr};

/// `method.adadim`: no keys.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
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

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::quant::{Bits, GroupSize, ObserverConfig, Symmetry};

    /// An outlying first column.
    const W: [[f32; 4]; 2] = [[10.0, 0.1, 0.2, -0.1], [-8.0, 0.3, -0.2, 0.1]];

    fn spec() -> QuantSpec {
        QuantSpec {
            bits: Bits::new(3).unwrap(),
            group_size: GroupSize::PerChannel,
            symmetry: Symmetry::Asymmetric,
        }
    }

    fn solved(error: &dyn Fn(&Tensor<2>) -> Result<f64>) -> QuantizedWeight {
        let (spec, observer) = (spec(), ObserverConfig::default());
        let weight = Tensor::<2>::from_data(W, &Device::flex());
        let problem = Problem {
            spec: &spec,
            layout: spec.layout([2, 4]).unwrap(),
            observer: &observer,
            weight: &weight,
            feeds_scores: false,
            inputs: None,
            output_error: Some(error),
        };
        AdaDim::solve(&AdaDimConfig {}, &problem).unwrap()
    }

    fn squared_error(weight: &Tensor<2>) -> f64 {
        let w = Tensor::<2>::from_data(W, &Device::flex());
        f64::from((weight.clone() - w).square().sum().into_scalar::<f32>())
    }

    #[test]
    fn an_outlying_input_gets_a_column_of_its_own() {
        let solved = solved(&|weight| Ok(squared_error(weight)));
        assert_eq!(solved.layout.axis, GroupAxis::Out);
        let expected = [10.286, 0.0857, 0.1714, -0.1143, -7.714, 0.3, -0.2286, 0.0857];
        for (found, expected) in solved.dequantize().iter().zip(expected) {
            assert!((found - expected).abs() < 6e-4, "{found}, {expected}");
        }
        let weight =
            Tensor::from_data(TensorData::new(solved.dequantize(), [2, 4]), &Device::flex());
        assert!((squared_error(&weight) - 0.1655).abs() < 1e-3);
    }

    #[test]
    fn a_tie_goes_to_the_inputs() {
        let solved = solved(&|_| Ok(1.0));
        assert_eq!(solved.layout.axis, GroupAxis::In);
        let found = solved.dequantize();
        assert!((found[0] - 10.1).abs() < 1e-2 && found[1] == 0.0, "{found:?}");
    }

    #[test]
    fn along_the_outputs_is_the_transpose_along_the_inputs() {
        let along_outputs = solved(&|weight| Ok(squared_error(weight)));
        let transposed = Tensor::<2>::from_data(W, &Device::flex()).transpose();
        let (spec, rtn) = (spec(), MethodConfig::Rtn(RtnConfig {}));
        let layout = spec.layout([4, 2]).unwrap();
        let observer = ObserverConfig::default();
        let along_inputs = quantize(&rtn, &spec, &observer, layout, &transposed).unwrap();
        let flipped = along_inputs.dequantize();
        let flipped: Vec<f32> = (0..8).map(|i| flipped[i % 4 * 2 + i / 4]).collect();
        assert_eq!(along_outputs.dequantize(), flipped);
        assert_eq!(along_outputs.codes, along_inputs.codes);
    }
}
