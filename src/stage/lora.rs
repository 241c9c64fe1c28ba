//! Low-rank adapters for `finetune`: burn's LoRA and QLoRA, which linears get one, and the folder in
//! which Hugging Face's peft reads what they learned.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

use burn::module::{
    Lora, LoraAdapter, Module, ModuleMapper, Param, QLora, Quantizer, Reparameterizer,
};
use burn::tensor::quantization::{Calibration, QuantValue, ScaleDtype};
use burn::tensor::{Device, Tensor, TensorData};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng as _, SeedableRng as _};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::value::{SeqAccessDeserializer, StrDeserializer};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use serde_json::json;

use super::state::ModelState;
use crate::error::{Error, Result};
use crate::model::{ModelConfig, Role};
use crate::store::HostTensor;
use crate::store::folder::write_atomic;
use crate::store::safetensors::write_file;

/// Linears of the decoder blocks by what they compute, named as Llama's; one that computes several of
/// these at once is each of them.
#[derive(
    Clone, Copy, Debug, Deserialize, Eq, JsonSchema, Ord, PartialEq, PartialOrd, Serialize,
)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// Queries.
    QProj,
    /// Keys.
    KProj,
    /// Values.
    VProj,
    /// Output of attention.
    OProj,
    /// Gate of the MLP.
    GateProj,
    /// Up.
    UpProj,
    /// Down.
    DownProj,
}

impl Target {
    const ALL: [Self; 7] = [
        Self::QProj,
        Self::KProj,
        Self::VProj,
        Self::OProj,
        Self::GateProj,
        Self::UpProj,
        Self::DownProj,
    ];

    /// What they compute.
    fn roles(self) -> &'static [Role] {
        const FUSED: [Role; 2] = [Role::QueryKeyValue, Role::QueryKeyValueByHead];
        match self {
            Self::QProj => &[Role::Query, FUSED[0], FUSED[1]],
            Self::KProj => &[Role::Key, FUSED[0], FUSED[1]],
            Self::VProj => &[Role::Value, FUSED[0], FUSED[1]],
            Self::OProj => &[Role::Output],
            Self::GateProj => &[Role::Gate, Role::GateUp],
            Self::UpProj => &[Role::Up, Role::GateUp],
            Self::DownProj => &[Role::Down],
        }
    }
}

/// The linears that get an adapter: `"all"`, or a list of [`Target`]s.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Targets(BTreeSet<Target>);

impl Targets {
    /// Every linear of the blocks.
    pub fn all() -> Self {
        Self(Target::ALL.into())
    }

    /// Queries and values, as in the LoRA paper.
    pub fn queries_and_values() -> Self {
        Self([Target::QProj, Target::VProj].into())
    }

    /// Whether linears of this role are among them.
    pub fn contains(&self, role: Role) -> bool {
        self.0.iter().any(|target| target.roles().contains(&role))
    }

    /// Their names in a model, in the order of execution.
    fn names(&self, model: &ModelConfig) -> Vec<&'static str> {
        let chosen = model.linears().filter(|(_, spec)| self.contains(spec.role));
        let mut names = Vec::new();
        for (_, spec) in chosen {
            let name = spec.name.rsplit('.').next().unwrap_or(spec.name);
            if !names.contains(&name) {
                names.push(name);
            }
        }
        names
    }
}

impl Serialize for Targets {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if *self == Self::all() {
            return serializer.serialize_str("all");
        }
        self.0.serialize(serializer)
    }
}

impl JsonSchema for Targets {
    fn schema_name() -> Cow<'static, str> {
        "Targets".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let target = generator.subschema_for::<Target>();
        json_schema!({
            "description": "Every linear of the blocks, or a list of them.",
            "oneOf": [
                { "const": "all" },
                target,
                { "type": "array", "items": target, "minItems": 1 }
            ]
        })
    }
}

impl<'de> Deserialize<'de> for Targets {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = Targets;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("\"all\" or a list such as [\"q_proj\", \"v_proj\"]")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Targets, E> {
                match text {
                    "all" => Ok(Targets::all()),
                    one => Target::deserialize(StrDeserializer::new(one))
                        .map(|target| Targets([target].into())),
                }
            }

            fn visit_seq<A: de::SeqAccess<'de>>(self, list: A) -> Result<Targets, A::Error> {
                let targets = BTreeSet::deserialize(SeqAccessDeserializer::new(list))?;
                if targets.is_empty() {
                    return Err(de::Error::custom("targets = [] adapts nothing"));
                }
                Ok(Targets(targets))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// What both kinds of adapter have: `W + alpha / rank * B A`, `B` starting at zero.
#[derive(Clone, Copy, Debug)]
pub(super) struct Adapters<'a> {
    pub(super) rank: usize,
    pub(super) alpha: f64,
    pub(super) targets: &'a Targets,
    /// Bits and block length of the base, where it is quantized.
    pub(super) base: Option<(u8, u8)>,
}

impl Adapters<'_> {
    /// Puts an adapter on a frozen weight, `[in, out]`, or freezes one that gets none.
    pub(super) fn attach(
        &self,
        role: Role,
        weight: Param<Tensor<2>>,
        seed: u64,
        device: &Device,
    ) -> Param<Tensor<2>> {
        let weight = weight.set_require_grad(false);
        let lora = Lora::new(self.rank, self.alpha);
        match (self.base, self.targets.contains(role)) {
            (None, false) => weight,
            (None, true) => weight.apply_reparameterization(Seeded { inner: lora, seed }),
            (Some(base), true) => weight.apply_reparameterization(Seeded {
                inner: QLora::new(lora, quantizer(base, device)),
                seed,
            }),
            // Without an adapter no operation of burn's keeps the blocks of a packed weight as they
            // are on the way into a product: its values are held instead.
            (Some(base), false) => {
                let (id, packed) = (weight.id, quantizer(base, device).map_float(weight).base());
                Param::initialized(id, packed.dequantize()).set_require_grad(false)
            }
        }
    }
}

/// Symmetric steps of largest magnitude over blocks along the inputs, as burn quantizes a weight.
fn quantizer((bits, block): (u8, u8), device: &Device) -> Quantizer {
    let value = if bits == 4 { QuantValue::Q4S } else { QuantValue::Q8S };
    let scheme = device.settings().quantization.scheme;
    let scheme = scheme.with_value(value).per_block([block, 1], ScaleDtype::F32);
    Quantizer::new(Calibration::MinMax, scheme)
}

/// burn's adapter with its random factor drawn from a seed, on the host: a run is a function of its
/// seed, and the same on every device.
struct Seeded<R> {
    inner: R,
    seed: u64,
}

impl<R: Reparameterizer<Reparam = LoraAdapter>> Reparameterizer for Seeded<R> {
    type Reparam = LoraAdapter;

    fn reparameterize<const D: usize>(
        &mut self,
        path: &str,
        param: Param<Tensor<D>>,
    ) -> (Param<Tensor<D>>, Option<LoraAdapter>) {
        let (base, adapter) = self.inner.reparameterize(path, param);
        let adapter = adapter.map(|adapter| {
            let (shape, device) = (adapter.a.dims(), adapter.a.device());
            // burn's own start.
            let deviation = 1.0 / shape[1] as f64;
            let values = normal(shape[0] * shape[1], deviation, self.seed);
            let a = Tensor::<2>::from_data(TensorData::new(values, shape), &device);
            LoraAdapter { a: Param::from_tensor(a), ..adapter }
        });
        (base, adapter)
    }
}

/// `n` normal draws of mean 0, by Box and Muller's transform.
fn normal(n: usize, deviation: f64, seed: u64) -> Vec<f32> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    // Within (0, 1]: its logarithm is finite.
    let mut unit = move || ((random.next_u64() >> 11) + 1) as f64 / (1u64 << 53) as f64;
    (0..n)
        .map(|_| {
            let (radius, angle) = ((-2.0 * unit().ln()).sqrt(), std::f64::consts::TAU * unit());
            (deviation * radius * angle.cos()) as f32
        })
        .collect()
}

/// The factors of a linear's adapter as peft names and lays them out: `lora_A`, `[rank, in]`, and
/// `lora_B`, `[out, rank]`.
pub(super) fn factors(name: &str, weight: &Param<Tensor<2>>) -> Vec<(String, HostTensor)> {
    let Some(adapter) = weight.adapter() else { return Vec::new() };
    [("lora_A", &adapter.a), ("lora_B", &adapter.b)]
        .map(|(part, factor)| (format!("base_model.model.{name}.{part}.weight"), factor.base()))
        .map(|(name, factor)| (name, host(factor.transpose())))
        .into()
}

/// A matrix brought to the host.
pub(super) fn host(tensor: Tensor<2>) -> HostTensor {
    let shape = tensor.dims();
    HostTensor::f32(shape, &tensor.into_data().iter::<f32>().collect::<Vec<f32>>())
}

/// Writes a folder that peft loads on top of the base model; gives the weights' path.
///
/// # Errors
/// I/O errors.
pub(super) fn write_folder(
    dir: &Path,
    adapters: &Adapters<'_>,
    model: &ModelState,
    factors: &[(String, HostTensor)],
) -> Result<PathBuf> {
    std::fs::create_dir_all(dir).map_err(|e| Error::io("create", dir, &e))?;
    let config = json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.name,
        "r": adapters.rank,
        "lora_alpha": adapters.alpha,
        "target_modules": adapters.targets.names(&model.config),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": model.config.linears().any(|(_, spec)| spec.columns),
        "inference_mode": true,
    });
    write_atomic(&dir.join("adapter_config.json"), format!("{config:#}\n").as_bytes())?;
    let path = dir.join("adapter_model.safetensors");
    write_file(&path, factors, &BTreeMap::from([("format".to_owned(), "pt".to_owned())]))?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::LinearSpec;

    fn model(model_type: &str) -> ModelConfig {
        let text = json!({
            "model_type": model_type, "hidden_size": 8, "intermediate_size": 16, "vocab_size": 10,
            "num_hidden_layers": 1, "num_attention_heads": 2, "n_positions": 16,
        });
        ModelConfig::parse(&text.to_string()).unwrap()
    }

    #[test]
    fn targets_are_what_linears_compute() {
        let llama = model("llama");
        let last = |spec: &LinearSpec| spec.name.rsplit('.').next().unwrap();
        assert_eq!(
            Targets::all().names(&llama),
            llama.arch.linears.iter().map(last).collect::<Vec<_>>()
        );
        for (target, name) in Target::ALL.into_iter().zip(Targets::all().names(&llama)) {
            assert_eq!(serde_json::to_value(target).unwrap(), name);
        }
        let fused = Targets::queries_and_values().names(&model("gpt2"));
        assert_eq!(fused, ["c_attn"]);
    }

    #[test]
    fn targets_are_all_one_or_a_list() {
        let read = |text: &str| serde_json::from_str::<Targets>(text);
        assert_eq!(read("\"all\"").unwrap(), Targets::all());
        assert_eq!(read("[\"v_proj\", \"q_proj\"]").unwrap(), Targets::queries_and_values());
        assert_eq!(read("\"o_proj\"").unwrap().names(&model("llama")), ["o_proj"]);
        for wrong in ["[]", "[\"q\"]", "\"every\"", "3"] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
        for targets in [Targets::all(), Targets::queries_and_values()] {
            assert_eq!(read(&serde_json::to_string(&targets).unwrap()).unwrap(), targets);
        }
    }

    #[test]
    fn normal_draws_have_their_moments_and_depend_on_the_seed_alone() {
        let draws = normal(20_000, 0.25, 7);
        assert_eq!(draws, normal(20_000, 0.25, 7));
        assert_ne!(draws[..8], normal(8, 0.25, 8)[..]);
        let mean = draws.iter().map(|x| f64::from(*x)).sum::<f64>() / 20_000.0;
        let square = draws.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / 20_000.0;
        assert!(mean.abs() < 0.01 && (square.sqrt() - 0.25).abs() < 0.005, "{mean} {square}");
    }

    /// What a packed base holds is the grid: within half a step of the weight, on both widths.
    #[test]
    fn a_packed_base_is_the_weight_on_its_grid() {
        let device = Device::flex();
        let values = normal(64 * 6, 1.0, 3);
        for (bits, levels) in [(4u8, 7.0f32), (8, 127.0)] {
            let weight = Tensor::<2>::from_data(TensorData::new(values.clone(), [6, 64]), &device);
            let weight = Param::initialized(burn::module::ParamId::new(), weight.transpose());
            let targets = Targets::queries_and_values();
            let adapters =
                Adapters { rank: 2, alpha: 4.0, targets: &targets, base: Some((bits, 32)) };
            let held = [Role::Query, Role::Output].map(|role| {
                let weight = adapters.attach(role, weight.clone(), 0, &device);
                host(weight.val().transpose()).to_f32().unwrap()
            });
            assert_eq!(held[0], held[1]);
            for (before, after) in values.chunks(32).zip(held[0].chunks(32)) {
                let peak = before.iter().fold(0.0f32, |peak, x| peak.max(x.abs()));
                let near = |(a, b): (&f32, &f32)| (a - b).abs() <= 0.5001 * peak / levels;
                assert!(before.iter().zip(after).all(near), "{before:?} {after:?}");
            }
        }
    }
}
