//! AutoRound: GPTQ's tensors, less the group of each input, under a config of its own.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::coded::{Coded, Layer, Tensors, stated};
use super::embeddings::Embeddings;
use super::format::{Dense, PackedFormat, Packer};
use super::gptq::{self, GptqFormatConfig, GptqOptions, Version};
use super::plan::{Holds, Reason, beyond_f16};
use super::read::{Reader, section};
use crate::error::Result;

/// Keys of `format.autoround`: those of GPTQ.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
pub struct AutoroundConfig(GptqFormatConfig);

impl PackedFormat for AutoroundConfig {
    fn about(&self) -> &'static str {
        "AutoRound: GPTQ's tensors under its own config"
    }

    fn lossy(&self) -> bool {
        self.0.lossy
    }

    fn holds(&self) -> &'static Holds {
        &Holds { rank: 3, ..gptq::HOLDS }
    }

    fn wrong_values(&self, weight: &Coded<'_>) -> Option<Reason> {
        beyond_f16("autoround", weight)
    }

    fn embeddings(&self) -> Option<Embeddings> {
        self.0.embeddings
    }

    fn packer(&self, linears: &[Layer]) -> Result<Box<dyn Packer>> {
        Ok(Box::new(Autoround(GptqOptions::suited(self.0.version, false, linears)?)))
    }

    fn reader(&self) -> &'static Reader {
        &Reader {
            method: "auto-round",
            section: |config| section(config, "auto-round"),
            tensor: "qweight",
            weights: |section, name, source| Ok(gptq::read::decode(section, name, source)?.values()),
            codes: |section, name, source| gptq::read::decode(section, name, source)?.codes(),
        }
    }
}

struct Autoround(GptqOptions);

impl Packer for Autoround {
    fn pack(&self, name: &str, weight: &Coded<'_>) -> Result<Tensors> {
        gptq::encode(name, weight, self.0)
    }

    fn section(&self, linears: &[Layer], dense: &Dense) -> Result<Value> {
        Ok(config(linears, &dense.linears, self.0))
    }
}

/// The `quantization_config` of AutoRound over the same tensors. Linears that differ from the most
/// common width and group are listed under `extra_config`, as are those that stay `dense`.
pub(super) fn config(linears: &[Layer], dense: &[String], options: GptqOptions) -> Value {
    let (keys, common) = gptq::keys(linears, options);
    let mut extra = Map::new();
    for (layer, key) in linears.iter().zip(&keys) {
        // Its reader looks for linears outside blocks here only.
        if *key != common || !layer.name.contains(".layers.") {
            let own = json!({ "bits": key.0, "group_size": stated(key.1), "data_type": "int" });
            extra.insert(layer.name.clone(), own);
        }
    }
    for name in dense.iter().filter(|name| name.contains(".layers.")) {
        extra.insert(name.clone(), json!({ "bits": 16, "data_type": "fp" }));
    }
    let packing = match options.version {
        Version::V1 => "auto_round:auto_gptq",
        Version::V2 => "auto_round",
    };
    let mut config = json!({
        "quant_method": "auto-round",
        "packing_format": packing,
        "bits": common.0,
        "group_size": stated(common.1),
        "sym": linears.iter().all(|layer| layer.centred),
        "data_type": "int",
        "autoround_version": AUTOROUND_VERSION,
        "backend": "auto",
    });
    if !extra.is_empty() {
        config["extra_config"] = Value::Object(extra);
    }
    config
}

/// The release whose reader the layout was checked against.
const AUTOROUND_VERSION: &str = "0.16.1";
