//! The recipes built into the binary, and how a recipe's name is looked up.

use std::path::{Path, PathBuf};

use super::parse::nearest;
use crate::error::{Error, Result};

/// A recipe that ships with the binary.
#[derive(Clone, Copy, Debug)]
pub struct Builtin {
    /// Its name, without `.toml`.
    pub name: &'static str,
    /// What it is for, with others.
    pub group: &'static str,
    /// Its text.
    pub text: &'static str,
}

impl Builtin {
    /// The first line of its head comment.
    pub fn about(&self) -> &'static str {
        self.text.lines().next().map_or("", |line| line.trim_start_matches(['#', ' ']))
    }
}

macro_rules! builtin {
    ($($group:literal: [$($name:literal),* $(,)?]),* $(,)?) => {
        &[$($(Builtin {
            name: $name,
            group: $group,
            text: include_str!(concat!("../../recipes/", $name, ".toml")),
        }),*),*]
    };
}

/// By purpose, in the order of the list that people see.
const BUILTINS: &[Builtin] = builtin![
    "2 bits and less, trained end to end": [
        "upq_int2",
        "upq_int2_chat",
        "upq_int2_g64",
        "int2_small",
        "int2_small_g64",
        "int2_blocks_then_scales",
        "attn4_mlp2",
        "efficientqat_w2g64",
        "bitdistiller_w2g64",
        "aqlm_w2",
        "paretoq_w2",
        "upq_paper",
        "ternary_w2",
        "sign_w1",
    ],
    "4 and 3 bits, learned block by block": [
        "int4_chat",
        "flexround_w4",
        "lrq_w4",
        "signround_w4",
        "uniquanf_w3",
        "omniquant_w3",
        "adadim_w3g128",
    ],
    "4 bits in minutes, nothing learned": ["gptq_w4g128", "awq_w4g128", "rtn_w4g128"],
    "Weights and activations, or every step learned": ["lrq_w8a8", "lsq_w4"],
    "Sign planes, for LUT-GEMM": ["bcq_w3", "anybcq_w234"],
    "Fine-tuning of packed weights": [
        "peqa_w4",
        "peqa_w3g128",
        "alphatuning_w3",
        "e2e_qp_w2",
        "qlora_w4",
    ],
];

/// Every built-in recipe, by purpose.
pub fn builtins() -> &'static [Builtin] {
    BUILTINS
}

/// The text of a recipe and what to call it in errors: a path, then `recipes/`, then the built-in
/// ones; `.toml` may be left out.
///
/// # Errors
/// A usage error that names a built-in recipe with a similar name, where there is one.
pub fn find(name: &str) -> Result<(String, String)> {
    let bare = name.strip_suffix(".toml").unwrap_or(name);
    let in_folder = Path::new("recipes").join(format!("{bare}.toml"));
    for path in [PathBuf::from(name), PathBuf::from(format!("{bare}.toml")), in_folder] {
        if path.is_file() {
            let text = std::fs::read_to_string(&path).map_err(|e| {
                let error = Error::io("read", &path, &e);
                error.with_kind(crate::error::Kind::Usage)
            })?;
            return Ok((text, path.display().to_string()));
        }
    }
    if let Some(builtin) = BUILTINS.iter().find(|builtin| builtin.name == bare) {
        return Ok((builtin.text.to_owned(), format!("{bare}.toml (built in)")));
    }
    let names: Vec<_> = BUILTINS.iter().map(|builtin| builtin.name).collect();
    let fix = match nearest(bare, &names) {
        Some(near) => format!("{near}, or `fewbit recipes list`"),
        None => "`fewbit recipes list`".to_owned(),
    };
    Err(Error::usage(format!("there is no recipe `{name}`"))
        .at("the path itself, recipes/, and the built-in recipes")
        .fix(fix))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_recipe_of_the_folder_is_built_in_once_and_described() {
        let names: BTreeSet<&str> = BUILTINS.iter().map(|builtin| builtin.name).collect();
        assert_eq!(names.len(), BUILTINS.len());
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes");
        let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        let stems: BTreeSet<String> =
            files.map(|path| path.file_stem().unwrap().to_string_lossy().into_owned()).collect();
        assert!(stems.iter().map(String::as_str).eq(names.iter().copied()), "{stems:?}");
        assert!(BUILTINS.iter().all(|builtin| builtin.about().len() > 20));
    }

    #[test]
    fn a_misspelt_name_gets_the_nearest() {
        let error = find("upq_in2.toml").unwrap_err();
        assert!(error.to_string().contains("try  upq_int2"), "{error}");
        assert_eq!(error.kind().exit_code(), 2);
        let error = find("missing.toml").unwrap_err();
        assert!(error.to_string().ends_with("try  `fewbit recipes list`"), "{error}");
    }
}
