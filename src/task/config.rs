//! The tasks: one file, one line in the `tasks!` list each.

use serde::{Deserialize, Serialize};

use super::kind::Task;
use super::perplexity::PplConfig;

/// The enum of the tasks, and which keys each has.
macro_rules! tasks {
    ($($(#[$doc:meta])* $name:ident { $key:literal, $config:ty },)*) => {
        /// `task.NAME = { ... }`.
        #[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
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
}

/// What a name on the command line stands for: a task, and keys of it.
pub fn named(name: &str) -> Option<(&'static str, Vec<String>)> {
    NAMES.iter().find(|known| **known == name).map(|known| (*known, Vec::new()))
}

/// Every name that [`named`] knows.
pub fn every_name() -> Vec<&'static str> {
    NAMES.to_vec()
}

/// Whether the task of this name is measured on text.
pub fn is_on_text(name: &str) -> bool {
    name == "ppl"
}

impl TaskConfig {
    /// What it goes by in reports.
    pub fn label(&self) -> String {
        self.name().to_owned()
    }

    /// The protocol of a perplexity, under which exports are checked.
    pub fn perplexity(&self) -> Option<&PplConfig> {
        match self {
            Self::Ppl(config) => Some(config),
            #[allow(unreachable_patterns)] // as long as it is the only task
            _ => None,
        }
    }
}

impl Default for TaskConfig {
    fn default() -> Self {
        Self::Ppl(PplConfig::default())
    }
}
