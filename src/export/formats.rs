//! Every format: `formats!` is the list, the one place besides a format's own file that names it.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::format::{FileFormat, Kind, Named};
use super::read::{Packed, named_method};
use crate::error::{Error, Result};

/// A line is a format's key in recipes and another word for it, its name here, and its keys.
macro_rules! formats {
    ($($(#[$doc:meta])* $key:ident $(or $alias:literal)?: $name:ident($keys:ty),)*) => {
        /// `[stage.export]`'s `format` table: every format named in it is written.
        #[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
        #[serde(deny_unknown_fields, default)]
        pub struct FormatsConfig {
            $(
                $(#[$doc])*
                #[serde(skip_serializing_if = "Option::is_none" $(, alias = $alias)?)]
                pub $key: Option<$keys>,
            )*
        }

        /// A format that can be written.
        #[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
        #[serde(rename_all = "snake_case")]
        pub enum Format {
            $($(#[$doc])* $name,)*
        }

        impl Format {
            /// Every format.
            pub const ALL: [Self; [$(stringify!($key)),*].len()] = [$(Self::$name),*];

            /// Its name: the folder under `export/`.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$name => stringify!($key),)*
                }
            }

            /// The format with the keys it has when none are set.
            pub(super) fn plain(self) -> Box<dyn FileFormat> {
                match self {
                    $(Self::$name => Box::new(<$keys>::default()),)*
                }
            }
        }

        impl FormatsConfig {
            /// The keys of a format that is asked for.
            pub fn keys(&self, format: Format) -> Option<&dyn FileFormat> {
                match format {
                    $(Format::$name => self.$key.as_ref().map(|keys| keys as &dyn FileFormat),)*
                }
            }
        }

        $(impl Named for $keys {
            fn name(&self) -> &'static str {
                stringify!($key)
            }
        })*
    };
}

formats! {
    /// fewbit's own packed folder: the neutral source of truth.
    fewbit: Fewbit(super::fewbit::FewbitConfig),
    /// A dense Hugging Face folder of the quantized weights, which any runtime loads.
    dequantized or "dense": Dequantized(super::dequantized::DequantizedConfig),
    /// MLX's affine layout, as mlx-lm reads it.
    mlx: Mlx(super::mlx::MlxConfig),
    /// GPTQ.
    gptq: Gptq(super::gptq::GptqFormatConfig),
    /// AutoRound: GPTQ's tensors under another config.
    autoround: Autoround(super::autoround::AutoroundConfig),
    /// AWQ, 4 bits.
    awq: Awq(super::awq::AwqConfig),
    /// compressed-tensors, packed.
    compressed_tensors: CompressedTensors(super::compressed_tensors::CompressedTensorsConfig),
    /// Bit planes in LUT-GEMM's word order.
    bcq: Bcq(super::bcq::BcqFormatConfig),
    /// One GGUF file, as llama.cpp reads it.
    gguf: Gguf(super::gguf::model::GgufConfig),
}

impl Format {
    /// What it is, in a few words.
    pub fn about(self) -> &'static str {
        self.plain().about()
    }
}

impl FormatsConfig {
    /// One format with the keys of `settings`, each `KEY=VALUE` as in a recipe.
    ///
    /// # Errors
    /// A usage error that names a key or value which the format does not have.
    pub fn of(format: Format, settings: &[String]) -> Result<Self> {
        let mut lines = BTreeMap::new();
        for setting in settings {
            let Some((key, value)) = setting.split_once('=') else {
                return Err(Error::usage(format!("`{setting}` is not KEY=VALUE")).at("--set"));
            };
            let (key, value) = (key.trim(), value.trim());
            // A bare word is a text.
            let line = format!("{key} = {value}\n");
            let plain = toml::from_str::<toml::Table>(&line).is_ok();
            let quoted = format!("{key} = {value:?}\n");
            // The last one of a key wins.
            lines.insert(key, if plain { line } else { quoted });
        }
        let lines: String = lines.into_values().collect();
        let text = format!("[{}]\n{lines}", format.name());
        toml::from_str(&text).map_err(|error| {
            Error::usage(format!("the settings of {}: {}", format.name(), error.message()))
                .at("--set")
                .fix("fewbit export --help lists what each format takes")
        })
    }

    /// The formats asked for.
    pub fn formats(&self) -> Vec<Format> {
        Format::ALL.into_iter().filter(|format| self.keys(*format).is_some()).collect()
    }
}

/// How a folder with this `config.json` is packed; `None` for a dense folder, or one of fewbit's own.
///
/// # Errors
/// For a quantization that is not read.
pub(super) fn packed_as(config: &Value) -> Result<Option<Packed>> {
    let plain = Format::ALL.map(Format::plain);
    let readers = plain.iter().filter_map(|format| match format.kind() {
        Kind::Packed(format) => Some(format.reader()),
        _ => None,
    });
    let mut methods = Vec::new();
    for reader in readers {
        if let Some(section) = (reader.section)(config) {
            return Ok(Some(Packed { reader, section: section.clone() }));
        }
        methods.push(reader.method);
    }
    let is_object = |key| config.get(key).is_some_and(Value::is_object);
    match named_method(config) {
        Some("fewbit") => Ok(None),
        None if !is_object("quantization") && !is_object("quantization_config") => Ok(None),
        method => {
            let method = method.unwrap_or("without a name");
            Err(Error::preflight(format!("quantization `{method}` is not read"))
                .at("config.json")
                .fix(format!("{} or fewbit", methods.join(", "))))
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::read::memory::Memory;
    use super::*;

    /// Readers of `config.json` sections and tensors that cannot be.
    #[test]
    fn damage_is_refused_without_a_panic() {
        let empty = Memory::new(Vec::new());
        for format in Format::ALL {
            let plain = format.plain();
            let Kind::Packed(packed) = plain.kind() else { continue };
            for section in [json!(null), json!({}), json!({"bits": 4, "group_size": 32})] {
                assert!((packed.reader().weights)(&section, "x", &empty).is_err(), "{format:?}");
            }
        }
    }

    #[test]
    fn a_format_has_one_name() {
        for format in Format::ALL {
            assert_eq!(json!(format), format.name());
            assert_eq!(format.plain().name(), format.name());
        }
    }

    #[test]
    fn folders_are_known_by_their_config() {
        let method = |config: Value| packed_as(&config).unwrap().map(|found| found.reader.method);
        let named = |name: &str| json!({"quantization_config": {"quant_method": name}});
        for name in ["gptq", "awq", "auto-round", "compressed-tensors", "bcq"] {
            assert_eq!(method(named(name)), Some(name));
        }
        let mlx = json!({"bits": 4, "group_size": 64});
        assert_eq!(method(json!({"quantization": mlx, "quantization_config": mlx})), Some("mlx"));
        assert_eq!(method(json!({"quantization_config": mlx})), Some("mlx"));
        assert_eq!(method(named("fewbit")), None);
        assert_eq!(method(json!({})), None);
        let error = packed_as(&named("odd")).unwrap_err().to_string();
        assert!(error.contains("`odd` is not read"), "{error}");
        assert!(packed_as(&json!({"quantization": {}})).is_err());
    }
}
