//! The tasks: one file, one line in the `tasks!` list each.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::choice::{Benchmark, ChoiceConfig};
use super::divergence::KlConfig;
use super::gsm8k::Gsm8kConfig;
use super::ifeval::IfevalConfig;
use super::kind::Task;
use super::perplexity::PplConfig;

/// The enum of the tasks, and which keys each has.
macro_rules! tasks {
    ($($(#[$doc:meta])* $name:ident { $key:literal, $config:ty },)*) => {
        /// `task.NAME = { ... }`.
        #[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
        pub enum TaskConfig {
            $($(#[$doc])* #[serde(rename = $key)] $name($config),)*
        }

        /// The name of every task in recipes.
        pub const NAMES: &[&str] = &[$($key,)*];

        impl TaskConfig {
            /// The name in recipes and reports.
            pub fn name(&self) -> &'static str {
                match self {
                    $(Self::$name(_) => $key,)*
                }
            }

            /// What it says of itself, and measures.
            pub fn task(&self) -> &dyn Task {
                match self {
                    $(Self::$name(config) => config,)*
                }
            }

            /// As [`TaskConfig::task`], to change its keys.
            pub fn task_mut(&mut self) -> &mut dyn Task {
                match self {
                    $(Self::$name(config) => config,)*
                }
            }
        }
    };
}

tasks! {
    /// Perplexity on `[data.validation]`.
    Ppl { "ppl", PplConfig },
    /// Divergence from the float model on `[data.validation]`.
    Kl { "kl", KlConfig },
    /// Questions with given answers.
    Choice { "choice", ChoiceConfig },
    /// Word problems with a number for an answer.
    Gsm8k { "gsm8k", Gsm8kConfig },
    /// Instructions whose following a program can check.
    Ifeval { "ifeval", IfevalConfig },
}

/// What a name on the command line stands for: a task, and keys of it. A benchmark goes by its own name.
pub fn named(name: &str) -> Option<(&'static str, Vec<String>)> {
    if let Some(known) = NAMES.iter().find(|known| **known == name) {
        return Some((known, Vec::new()));
    }
    let benchmark = Benchmark::ALL.into_iter().find(|benchmark| benchmark.name() == name)?;
    Some(("choice", vec![format!("benchmark=\"{}\"", benchmark.name())]))
}

/// Every name that [`named`] knows.
pub fn every_name() -> Vec<&'static str> {
    let benchmarks = Benchmark::ALL.into_iter().map(Benchmark::name);
    NAMES.iter().copied().chain(benchmarks).collect()
}

impl TaskConfig {
    /// What it goes by in reports: its name, or the benchmark's.
    pub fn label(&self) -> String {
        match self {
            Self::Choice(choice) => choice.benchmark.name().to_owned(),
            _ => self.name().to_owned(),
        }
    }

    /// The protocol of a perplexity on the validation text, under which exports are checked.
    pub fn perplexity(&self) -> Option<&PplConfig> {
        match self {
            Self::Ppl(config) => Some(config).filter(|config| config.protocol.is_none()),
            _ => None,
        }
    }
}

impl Default for TaskConfig {
    fn default() -> Self {
        Self::Ppl(PplConfig::default())
    }
}
