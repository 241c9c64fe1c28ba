//! `calibrate`: observers only, one linear at a time; the round-to-nearest baseline.

use burn::tensor::{Tensor, TensorData};
use serde::{Deserialize, Serialize};

use super::StageContext;
use crate::error::{Error, Result};
use crate::method::{self, MethodConfig};
use crate::model::{WeightSource, linear_shapes, weight_name};
use crate::quant::{Bits, GroupSize, ObserverConfig, QuantizedWeight, Symmetry};
use crate::report::{Event, Reporter};

/// Keys of `[stage.calibrate]`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct CalibrateConfig {
    /// A method that learns nothing.
    pub method: MethodConfig,
    /// Instead of `quant.bits`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bits: Option<Bits>,
    /// Instead of `quant.group_size`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group_size: Option<GroupSize>,
    /// Instead of `quant.symmetric`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub symmetric: Option<Symmetry>,
    /// Instead of `quant.observer`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observer: Option<ObserverConfig>,
}

impl CalibrateConfig {
    pub(super) fn check(&self) -> Result<()> {
        if self.method.learns() {
            return Err(Error::usage(format!(
                "calibrate learns nothing, and method.{} learns",
                self.method.name()
            ))
            .fix("method.rtn = {} here, or [stage.reconstruct]"));
        }
        Ok(())
    }
}

pub(super) fn run(config: &CalibrateConfig, ctx: &mut StageContext<'_>) -> Result<()> {
    let shapes = linear_shapes(&ctx.model.config);
    let total = shapes.len() as u64;
    let mut quantized: Vec<(String, QuantizedWeight, String)> = Vec::new();
    for (done, (name, shape)) in shapes.into_iter().enumerate() {
        ctx.stop.check()?;
        ctx.report.emit(&Event::Progress {
            verb: "calibrate".to_owned(),
            done: done as u64,
            of: total,
            detail: name.clone(),
        });
        if let Some(spec) = ctx.specs.get(&name) {
            let values = ctx.model.weight(&weight_name(&name), &shape)?;
            let weight = Tensor::from_data(TensorData::new(values, shape), &ctx.device.device);
            let folded = spec
                .layout(shape)
                .and_then(|layout| {
                    method::quantize(&config.method, spec, ctx.observer, layout, weight)
                })
                .map_err(|e| e.at(&name))?;
            quantized.push((name, folded, config.method.name().to_owned()));
        }
    }
    ctx.save_linears(quantized)?;
    ctx.report_codes();
    Ok(())
}
