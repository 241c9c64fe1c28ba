//! The parts of what users wait for, one after the other.

use burn::tensor::DType;
use serde::{Serialize, Serializer};

use super::ceiling::Ceiling;
use super::serving::Serving;
use super::subject::Subject;
use super::timing::{Effort, Spread};
use super::training;
use crate::device::{self, NamedDevice};
use crate::error::{Error, Result};
use crate::method::{FlexRoundConfig, MethodConfig, NAMES, SeqConfig};
use crate::report::memory;
use crate::stop::StopFlag;

/// Something that users wait for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Part {
    /// A step of block reconstruction.
    Block,
    /// A step of distillation.
    Distill,
    /// Reading a model.
    Load,
    /// Processing prompts.
    Prompt,
    /// Generating tokens.
    Generate,
    /// Folding, packing and writing codes.
    Export,
}

impl Part {
    /// All, in the order in which they are measured.
    pub const ALL: [Self; 6] =
        [Self::Block, Self::Distill, Self::Load, Self::Prompt, Self::Generate, Self::Export];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Block => "block",
            Self::Distill => "distill",
            Self::Load => "load",
            Self::Prompt => "prompt",
            Self::Generate => "generate",
            Self::Export => "export",
        }
    }
}

impl Serialize for Part {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// How parts are measured.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Texts at once.
    pub batch: usize,
    /// Tokens of a text.
    pub length: usize,
    /// Whether `batch` was asked for: generation then has that one alone, and otherwise 1 and 8.
    pub batch_given: bool,
    /// What learns in training, instead of FlexRound for a block and SEQ for a distillation.
    pub method: Option<MethodConfig>,
    /// The type of activations.
    pub dtype: DType,
    /// Whether prompts and texts are computed with integer products
    /// ([`CausalLm::multiply_in_integers`](crate::model::CausalLm::multiply_in_integers)).
    pub integers: bool,
    /// How long each is measured.
    pub effort: Effort,
}

impl Settings {
    /// The method of a recipe's name, with its defaults.
    ///
    /// # Errors
    /// A usage error for a name that is none, or a method that does not learn on float weights.
    pub fn method(name: &str) -> Result<MethodConfig> {
        let place = || format!("--method {name}");
        if !NAMES.contains(&name) {
            let known: Vec<&str> = learning().map(|(name, _)| name).collect();
            let what = format!("there is no method `{name}`");
            return Err(Error::usage(what)
                .at(place())
                .fix(format!("one of: {}", known.join(", "))));
        }
        learning().find(|(known, _)| *known == name).map(|(_, config)| config).ok_or_else(|| {
            let known: Vec<&str> = learning().map(|(name, _)| name).collect();
            Error::usage(format!("method {name} does not learn on float weights"))
                .at(place())
                .fix(format!("one of: {}", known.join(", ")))
        })
    }

    /// The method of a part, with the bits that it is measured at.
    pub(super) fn method_of(&self, part: Part) -> Result<(MethodConfig, u8)> {
        let default = match part {
            Part::Distill => MethodConfig::Seq(SeqConfig::default()),
            _ => MethodConfig::FlexRound(FlexRoundConfig {}),
        };
        let method = self.method.clone().unwrap_or(default);
        // The widest of those that methods are used at; some have only one.
        for bits in [4, 2, 1] {
            if method.accepts(&super::attach::spec(bits)?).is_ok() {
                return Ok((method, bits));
            }
        }
        Err(Error::usage(format!("method {} takes neither 4, 2 nor 1 bits", method.name())))
    }
}

/// Methods whose defaults learn on float weights.
fn learning() -> impl Iterator<Item = (&'static str, MethodConfig)> {
    let default = |name: &str| serde_json::from_value(serde_json::json!({ name: {} })).ok();
    let all = NAMES.iter().filter_map(move |name| Some((*name, default(name)?)));
    all.filter(|(_, method): &(_, MethodConfig)| method.learns() && method.tunes().is_none())
}

/// What was measured of one part.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Measured {
    /// The part.
    pub part: Part,
    /// What of it, in a few words.
    pub what: String,
    /// Of one step, one batch, one reading.
    pub seconds: Spread,
    /// What is counted: tokens, weights or bytes.
    pub unit: &'static str,
    /// How many of those in `seconds`.
    pub amount: f64,
    /// `amount` over the median.
    pub per_second: f64,
    /// Operations per second of its matrix products, where it has some.
    pub flops: Option<f64>,
    /// `flops` as a part of the device's ceiling.
    pub of_ceiling: Option<f64>,
    /// Peak of main memory while it ran; since the start of the process where `peak_is_own` is false.
    pub peak_bytes: Option<u64>,
    /// Whether the system counted the peak anew for this part.
    pub peak_is_own: bool,
    /// Bytes that the device's allocator had taken from it by then, where the backend tells: a peak.
    pub device_bytes: Option<u64>,
}

/// What a part counts: what it was, one repetition's amount of something, and its matrix products' operations.
pub(super) struct Work {
    pub what: String,
    pub unit: &'static str,
    pub amount: f64,
    pub operations: Option<f64>,
}

/// Measures the parts of one model on one device.
pub struct Bench<'a> {
    /// The model.
    pub subject: &'a Subject,
    /// Where it runs.
    pub device: &'a NamedDevice,
    /// How it is measured.
    pub settings: &'a Settings,
    /// What the device reaches at most.
    pub ceiling: &'a Ceiling,
    /// Set by signals.
    pub stop: &'a StopFlag,
}

impl Bench<'_> {
    /// Measures one part after the other, and says what it found of each, generation once for each batch.
    ///
    /// # Errors
    /// What goes wrong in a part; a signal.
    pub fn run(&self, parts: &[Part], say: &mut dyn FnMut(Measured) -> Result<()>) -> Result<()> {
        let mut serving = Serving::new(self);
        for part in parts {
            let peak_is_own = memory::reset_peak();
            let mut tell = |(work, seconds): (Work, Spread)| {
                let Work { what, unit, amount, operations } = work;
                let per_second = amount / seconds.median;
                let flops = operations.map(|operations| operations / seconds.median);
                let of_ceiling = flops.map(|flops| flops / self.ceiling.flops);
                let peak_bytes = memory::peak_gib().map(|gib| (gib * f64::from(1 << 30)) as u64);
                say(Measured {
                    part: *part,
                    what,
                    seconds,
                    unit,
                    amount,
                    per_second,
                    flops,
                    of_ceiling,
                    peak_bytes,
                    peak_is_own,
                    device_bytes: device::held(&self.device.device).map(|[_, reserved]| reserved),
                })
            };
            match part {
                Part::Block => tell(training::block(self)?)?,
                Part::Distill => tell(training::distill(self)?)?,
                Part::Load => tell(serving.load()?)?,
                Part::Prompt => tell(serving.prompt()?)?,
                Part::Generate => {
                    let batches = if self.settings.batch_given {
                        vec![self.settings.batch]
                    } else {
                        vec![1, 8]
                    };
                    for batch in batches {
                        tell(serving.generate(batch)?)?;
                    }
                }
                Part::Export => {
                    serving.drop_model();
                    tell(training::export(self)?)?;
                }
            }
        }
        Ok(())
    }

    /// Tokens of the vocabulary, one after the other with a step that visits all.
    pub(super) fn tokens(&self, count: usize) -> Vec<u32> {
        let vocab = self.subject.config.vocab as u64;
        (0..count as u64).map(|i| (i * 7919 % vocab) as u32).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_that_learn_are_known_with_their_bits() {
        let names: Vec<&str> = learning().map(|(name, _)| name).collect();
        assert!(names.contains(&"flexround") && names.contains(&"seq"), "{names:?}");
        assert!(!names.contains(&"gptq") && !names.contains(&"rtn") && !names.contains(&"peqa"));
        for (wrong, says) in [("flexrund", "there is no"), ("gptq", "does not learn")] {
            let error = Settings::method(wrong).unwrap_err();
            assert_eq!(error.kind().exit_code(), 2);
            assert!(error.to_string().contains(says), "{error}");
        }
        let settings = |name: &str| Settings {
            batch: 1,
            length: 16,
            batch_given: false,
            method: Some(Settings::method(name).unwrap()),
            dtype: DType::F32,
            integers: false,
            effort: Effort { seconds: 0.0, repeat: None },
        };
        assert_eq!(settings("flexround").method_of(Part::Distill).unwrap().1, 4);
        assert_eq!(settings("seq").method_of(Part::Block).unwrap().1, 2);
    }
}
