//! The model that is measured: one that is there, or random weights of a shape.

use std::path::{Path, PathBuf};

use burn::tensor::{DType, Device};
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::export::{OpenModel, open_model};
use crate::model::{Loader, ModelConfig, RandomWeights, WeightSource};
use crate::quant::CodedWeight;

/// The model that is measured.
pub struct Subject {
    /// What it was asked for as.
    pub name: String,
    /// Its shape.
    pub config: ModelConfig,
    weights: Weights,
}

enum Weights {
    Random(RandomWeights),
    Folder(PathBuf, Box<OpenModel>),
}

impl Subject {
    /// Random weights of the shape that a `config.json` says.
    ///
    /// # Errors
    /// When the config is none of a model that is supported.
    pub fn random(name: &str, config: &Map<String, Value>, seed: u64) -> Result<Self> {
        let config = ModelConfig::parse(&Value::Object(config.clone()).to_string())?;
        let weights = Weights::Random(RandomWeights::new(&config, seed));
        Ok(Self { name: name.to_owned(), config, weights })
    }

    /// A model that is there.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn open(name: &str, path: PathBuf) -> Result<Self> {
        let opened = open_model(&path)?;
        let config = opened.config.clone();
        let weights = Weights::Folder(path, Box::new(opened));
        Ok(Self { name: name.to_owned(), config, weights })
    }

    /// Whether its weights are random.
    pub fn is_random(&self) -> bool {
        matches!(self.weights, Weights::Random(_))
    }

    /// Where its weights come from.
    pub(super) fn source(&self) -> &dyn WeightSource {
        match &self.weights {
            Weights::Random(weights) => weights,
            Weights::Folder(_, opened) => &**opened,
        }
    }

    /// Whether its linears have integer products on a device.
    ///
    /// # Errors
    /// When the first block cannot be read.
    pub fn has_integer_products(&self, device: &Device) -> Result<bool> {
        let (config, source) = (&self.config, self.source());
        let block = Loader { config, source, device, dtype: DType::F32 }.block(0)?;
        let mut coded = block
            .linears()
            .filter_map(|(_, linear)| linear.weight.reparameterization::<CodedWeight>());
        Ok(coded.any(|coded| coded.in_integers().is_some()))
    }

    /// The files it is read from.
    ///
    /// # Errors
    /// A usage error for random weights, which are in none.
    pub fn path(&self) -> Result<&Path> {
        match &self.weights {
            Weights::Folder(path, _) => Ok(path),
            Weights::Random(_) => {
                Err(Error::usage("random weights are in no file that could be read")
                    .at("--part load")
                    .fix("--write DIR first, then --model DIR --part load"))
            }
        }
    }

    /// Weights of one block's linears, those of the first block.
    pub(super) fn block_weights(&self) -> u64 {
        self.config.specs(0).iter().map(|spec| spec.shape.iter().product::<usize>() as u64).sum()
    }

    /// Weights of all linears of all blocks.
    pub(super) fn linear_weights(&self) -> u64 {
        self.config.linears().map(|(_, spec)| spec.shape.iter().product::<usize>() as u64).sum()
    }

    /// Weights that the head multiplies with.
    pub(super) fn head_weights(&self) -> u64 {
        self.config.head_shape().iter().product::<usize>() as u64
    }

    /// Weights that a token meets in the blocks: of experts only those that it goes to.
    pub(super) fn active_weights(&self) -> u64 {
        let all = self.linear_weights();
        let Some(experts) = &self.config.arch.experts else { return all };
        let idle = (experts.count - experts.active) as f64 / experts.count as f64;
        let of_experts = self.config.linears().filter(|(_, spec)| spec.expert.is_some());
        let of_experts: usize =
            of_experts.map(|(_, spec)| spec.shape.iter().product::<usize>()).sum();
        all - (of_experts as f64 * idle) as u64
    }

    /// Multiplications of attention's two products over all blocks, of `tokens` in texts of `length`, of
    /// which a token sees half.
    pub(super) fn attention_products(&self, tokens: u64, length: u64) -> f64 {
        let width = (self.config.n_heads * self.config.head_dim * self.config.n_blocks) as f64;
        tokens as f64 * length as f64 * width
    }
}
