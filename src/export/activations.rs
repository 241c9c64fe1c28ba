//! What a model does to its activations: the settings, every fixed grid, and the tap that applies
//! them. The same value sits in a model under training, in a manifest, and in a re-opened folder.

use std::collections::BTreeMap;

use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::model::{ModelConfig, ModelTap, Site};
use crate::quant::{ActivationQuant, ActivationScheme, InputGrid, activation};
use crate::store::HostTensor;

/// Fixed grids of one block, by the site whose activations lie on them.
pub type InputGrids = BTreeMap<Site, InputGrid>;

/// Settings and fixed grids of a whole model.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct ActivationRecord {
    /// The settings.
    #[serde(flatten)]
    pub quant: ActivationQuant,
    /// Fixed grids, block by block; empty unless the scheme is `"tensor"`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub grids: Vec<InputGrids>,
}

impl ActivationRecord {
    /// Nothing calibrated yet.
    pub fn new(quant: ActivationQuant) -> Self {
        Self { quant, grids: Vec::new() }
    }

    /// This record, where it says anything.
    pub fn if_on(&self) -> Option<Self> {
        self.quant.is_on().then(|| self.clone())
    }

    /// The tap that does all of it.
    pub fn tap(&self) -> ModelTap {
        if !self.quant.is_on() {
            return ModelTap::default();
        }
        let Self { quant, grids } = self.clone();
        let none = InputGrids::new();
        ModelTap::new(move |block, site, x| {
            quantize(&quant, grids.get(block).unwrap_or(&none), site, x)
        })
    }

    /// The fixed grids of block `index` become `grids`.
    pub fn set(&mut self, index: usize, grids: InputGrids) {
        if self.grids.len() <= index {
            self.grids.resize(index + 1, InputGrids::new());
        }
        self.grids[index] = grids;
    }

    /// Refuses a record whose grids are not those of a model of this description.
    ///
    /// # Errors
    /// Names the block and site that lack a grid, or have one that cannot be.
    pub fn check(&self, config: &ModelConfig) -> Result<()> {
        if self.quant.fixed().is_none() {
            return Ok(());
        }
        let none = InputGrids::new();
        for index in 0..config.n_blocks {
            let grids = self.grids.get(index).unwrap_or(&none);
            for site in Site::INPUTS {
                let sound = grids.get(&site).is_some_and(InputGrid::is_sound);
                if !sound {
                    return Err(Error::preflight("the activations have no usable grid here")
                        .at(format!("{}, {}", config.block_prefix(index), site.name())));
                }
            }
        }
        Ok(())
    }

    /// Takes the grids that [`store`] put among `dense` tensors out of them, for any block.
    ///
    /// # Errors
    /// When one is not a number, or its other half is missing.
    pub fn take(
        &mut self,
        config: &ModelConfig,
        dense: &mut BTreeMap<String, HostTensor>,
    ) -> Result<()> {
        for index in 0..config.n_blocks {
            let mut grids = InputGrids::new();
            for site in Site::INPUTS {
                let [scale, zero] =
                    tensor_names(config, index, site).map(|name| dense.remove(&name));
                let (scale, zero) = match (scale, zero) {
                    (None, None) => continue,
                    (scale, zero) => (number(scale.as_ref()), number(zero.as_ref())),
                };
                let grid = scale.zip(zero).map(|(scale, zero)| InputGrid { scale, zero });
                let grid = grid.filter(InputGrid::is_sound).ok_or_else(|| {
                    Error::failed("the saved grid of the activations is damaged")
                        .at(format!("{}, {}", config.block_prefix(index), site.name()))
                        .fix("--fresh to start over")
                })?;
                grids.insert(site, grid);
            }
            if !grids.is_empty() {
                self.set(index, grids);
            }
        }
        Ok(())
    }
}

/// Puts the grids of block `index` among its other tensors, under names no weight has.
pub fn store(
    config: &ModelConfig,
    index: usize,
    grids: &InputGrids,
    dense: &mut BTreeMap<String, HostTensor>,
) {
    for (site, grid) in grids {
        let values = [grid.scale, grid.zero];
        for (name, value) in tensor_names(config, index, *site).into_iter().zip(values) {
            dense.insert(name, HostTensor::f32([1], &[value]));
        }
    }
}

/// What happens to activations `x` at `site` of a block with these fixed grids. A site that should
/// have one and has not stays as it is.
pub fn quantize(
    quant: &ActivationQuant,
    grids: &InputGrids,
    site: Site,
    x: Tensor<3>,
) -> Tensor<3> {
    if matches!(site, Site::Keys | Site::Values) {
        return match quant.kv_cache {
            Some(config) => activation::per_token(x, config.bits),
            None => x,
        };
    }
    let Some(config) = quant.activations else { return x };
    match (config.scheme, grids.get(&site)) {
        (ActivationScheme::Token, _) => activation::per_token(x, config.bits),
        (ActivationScheme::Tensor, Some(grid)) => grid.apply(x, config.bits),
        (ActivationScheme::Tensor, None) => x,
    }
}

fn tensor_names(config: &ModelConfig, index: usize, site: Site) -> [String; 2] {
    let site = format!("{}.{}", config.block_prefix(index), site.name());
    [format!("{site}.input_scale"), format!("{site}.input_zero")]
}

fn number(tensor: Option<&HostTensor>) -> Option<f32> {
    let values = tensor?.to_f32().ok()?;
    if let [value] = values[..] { Some(value) } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grids_survive_a_checkpoint_and_a_manifest() {
        let grid = InputGrid { scale: 0.1 + f32::EPSILON, zero: 127.3 };
        let grids: InputGrids = Site::INPUTS.map(|site| (site, grid)).into();
        let quant = toml::from_str("activations.scheme = \"tensor\"\nkv_cache = {}").unwrap();
        let mut record = ActivationRecord::new(quant);
        let config = ModelConfig::parse(
            r#"{"model_type": "llama", "hidden_size": 8, "intermediate_size": 16,
            "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 10}"#,
        )
        .unwrap();
        assert!(record.check(&config).is_err());
        let norm = HostTensor::f32([1], &[2.0]);
        let mut dense = BTreeMap::from([("norm".to_owned(), norm.clone())]);
        store(&config, 1, &grids, &mut dense);
        store(&config, 0, &grids, &mut dense);
        assert_eq!(dense.len(), 17);
        record.take(&config, &mut dense).unwrap();
        assert_eq!(dense, BTreeMap::from([("norm".to_owned(), norm)]));
        assert_eq!(record.grids, [grids.clone(), grids]);
        record.check(&config).unwrap();

        let text = serde_json::to_string(&record).unwrap();
        assert!(text.contains("\"attention_output\""), "{text}");
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(serde_json::from_value::<ActivationRecord>(value).unwrap(), record);

        let mut half = BTreeMap::new();
        store(&config, 0, &record.grids[0], &mut half);
        half.remove("model.layers.0.mlp.input_zero").unwrap();
        assert!(record.take(&config, &mut half).is_err());
    }
}
