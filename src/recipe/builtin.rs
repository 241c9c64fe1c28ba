//! The recipes built into the binary, and how a recipe's name is looked up.

use std::path::{Path, PathBuf};

use super::parse::nearest;
use crate::error::{Error, Result};

/// A recipe that ships with the binary.
#[derive(Clone, Copy, Debug)]
pub struct Builtin {
    /// Its name, without `.toml`.
    pub name: &'static str,
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
    ($($name:literal),* $(,)?) => {
        &[$(Builtin {
            name: $name,
            text: include_str!(concat!("../../recipes/", $name, ".toml")),
        }),*]
    };
}

const BUILTINS: &[Builtin] = builtin![
    "adadim_w3g128",
    "alphatuning_w3",
    "anybcq_w234",
    "attn4_mlp2",
    "awq_w4g128",
    "bcq_w3",
    "bitdistiller_w2g64",
    "e2e_qp_w2",
    "efficientqat_w2g64",
    "flexround_w4",
    "gptq_w4g128",
    "int2_blocks_then_scales",
    "int2_small",
    "int4_chat",
    "lrq_w4",
    "lrq_w8a8",
    "lsq_w4",
    "omniquant_w3",
    "paretoq_w2",
    "peqa_w3g128",
    "peqa_w4",
    "qlora_w4",
    "rtn_w4g128",
    "sign_w1",
    "signround_w4",
    "ternary_w2",
    "uniquanf_w3",
    "upq_int2",
    "upq_int2_chat",
    "upq_int2_g64",
    "upq_paper",
];

/// Every built-in recipe, by name.
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
    use super::*;

    #[test]
    fn names_are_sorted_and_described() {
        assert!(BUILTINS.is_sorted_by_key(|builtin| builtin.name));
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
