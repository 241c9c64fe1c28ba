//! `--set a.b=c`: its value in the document, with positions past the end of the file's text.

use std::borrow::Cow;
use std::ops::Range;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::names::nearest;
use super::words::found_words;
use crate::error::{Error, Result};

/// One `--set a.b=c`, its positions starting at `base`.
pub(super) struct Override<'a> {
    pub(super) raw: &'a str,
    pub(super) base: usize,
}

impl<'a> Override<'a> {
    pub(super) fn apply(&self, root: &mut Spanned<DeValue<'a>>) -> Result<()> {
        let Some((key, value)) = self.raw.split_once('=') else {
            return Err(self.refuse(format!("`{}` has no `=`", self.raw), "write --set key=value"));
        };
        let path = self.path(key)?;
        let start = self.raw.len() - value.trim_start().len();
        let value = value.trim();
        let plain = || Spanned::new(0..value.len(), DeValue::String(Cow::Borrowed(value)));
        let parsed = DeValue::parse(value).unwrap_or_else(|_| plain());
        *self.descend(root, &path)? = moved(parsed, self.base + start);
        Ok(())
    }

    /// The key's segments, read by TOML's own rules for dotted and quoted keys.
    pub(super) fn path(&self, key: &str) -> Result<Vec<Spanned<String>>> {
        let probe = format!("{key} = 0");
        let mut path = Vec::new();
        if let Ok(document) = DeTable::parse(&probe) {
            let mut next = Some(document.get_ref());
            while let Some((name, value)) = next.and_then(|table| table.iter().next()) {
                let span = name.span().start + self.base..name.span().end + self.base;
                path.push(Spanned::new(span, name.get_ref().to_string()));
                next = value.get_ref().as_table();
            }
        }
        if path.is_empty() {
            let what = format!("`{}` does not start with a key", self.raw);
            return Err(self.refuse(what, "write --set key=value, as in stage.distill.steps=100"));
        }
        Ok(path)
    }

    /// The place `path` leads to, tables created on the way. An entry of a list is named by its index, or by
    /// its choice where no other entry has that: `stage.distill`.
    pub(super) fn descend<'t>(
        &self,
        root: &'t mut Spanned<DeValue<'a>>,
        path: &[Spanned<String>],
    ) -> Result<&'t mut Spanned<DeValue<'a>>> {
        let mut node = root;
        let names: Vec<_> = path.iter().map(|key| key.get_ref().as_str()).collect();
        for (depth, key) in path.iter().enumerate() {
            let (span, key) = (key.span(), key.get_ref());
            let parent = || names[..depth].join(".");
            if let DeValue::Array(list) = node.get_ref() {
                let number = key.parse::<usize>();
                let by_index = number.is_ok();
                let index = number.or_else(|_| self.only_choice(&parent(), list, key))?;
                let length = list.len();
                node = entry(node, index).ok_or_else(|| self.no_entry(&parent(), key, length))?;
                if by_index {
                    continue;
                }
            }
            node = match node.get_mut() {
                DeValue::Table(table) => {
                    let name = Spanned::new(span.clone(), Cow::Owned(key.clone()));
                    let empty = || Spanned::new(span, DeValue::Table(DeTable::new()));
                    table.entry(name).or_insert_with(empty)
                }
                leaf => {
                    let what = format!("`{}` is {}, not a table", parent(), found_words(leaf));
                    return Err(self.refuse(what, format!("--set {}=… replaces it", parent())));
                }
            };
        }
        Ok(node)
    }

    fn no_entry(&self, list: &str, key: &str, length: usize) -> Error {
        let fix = match length {
            0 => "add the entry to the file".to_owned(),
            _ => format!("an index from 0 to {}, or add an entry to the file", length - 1),
        };
        let entries = if length == 1 { "1 entry".to_owned() } else { format!("{length} entries") };
        self.refuse(format!("`{list}` has {entries}, so there is no `{list}.{key}`"), fix)
    }

    /// The index of the one entry that is the choice `key`.
    fn only_choice(
        &self,
        list: &str,
        entries: &[Spanned<DeValue<'_>>],
        key: &str,
    ) -> Result<usize> {
        let choices: Vec<_> = entries.iter().map(|entry| choice(entry.get_ref())).collect();
        let places = |name: &str| {
            let found = choices.iter().enumerate().filter(|(_, choice)| **choice == Some(name));
            found.map(|(index, _)| index).collect::<Vec<_>>()
        };
        let indexed = |indices: Vec<usize>, name: &str| {
            let paths = indices.into_iter().map(|index| format!("{list}.{index}.{name}"));
            paths.collect::<Vec<_>>().join(" or ")
        };
        let found = places(key);
        if let [index] = found[..] {
            return Ok(index);
        }
        if !found.is_empty() {
            let what = format!("`{list}` has {} entries `{key}`", found.len());
            return Err(self.refuse(what, indexed(found, key)));
        }
        let known: Vec<&str> = choices.iter().flatten().copied().collect();
        let fix = match nearest(key, &known) {
            Some(near) => indexed(places(near), near),
            None if entries.is_empty() => "add the entry to the file".to_owned(),
            None if known.is_empty() => format!("put the index first: {list}.0.{key}"),
            None => format!("one of: {}, or add the entry to the file", known.join(", ")),
        };
        Err(self.refuse(format!("`{list}` has no entry `{key}`"), fix))
    }

    pub(super) fn refuse(&self, what: impl Into<String>, fix: impl Into<String>) -> Error {
        Error::usage(what).at(format!("--set {}", self.raw)).fix(fix)
    }
}

/// An entry of a list.
fn entry<'t, 'a>(
    list: &'t mut Spanned<DeValue<'a>>,
    index: usize,
) -> Option<&'t mut Spanned<DeValue<'a>>> {
    let DeValue::Array(entries) = list.get_mut() else { return None };
    entries.get_mut(index)
}

/// The name of an entry that is one choice of several: a table with one key.
fn choice<'v>(entry: &'v DeValue<'_>) -> Option<&'v str> {
    let table = entry.as_table()?;
    let (name, _) = table.iter().next().filter(|_| table.len() == 1)?;
    Some(name.get_ref())
}

/// The same value with every position moved by `by`.
fn moved(value: Spanned<DeValue<'_>>, by: usize) -> Spanned<DeValue<'_>> {
    let shift = |span: Range<usize>| span.start + by..span.end + by;
    let span = shift(value.span());
    let inner = match value.into_inner() {
        DeValue::Array(list) => {
            DeValue::Array(list.into_iter().map(|entry| moved(entry, by)).collect())
        }
        DeValue::Table(table) => {
            let entries = table.into_iter().map(|(key, value)| {
                (Spanned::new(shift(key.span()), key.into_inner()), moved(value, by))
            });
            DeValue::Table(entries.collect())
        }
        scalar => scalar,
    };
    Spanned::new(span, inner)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::super::sample::{
        Compute, Flexround, Method, Quant, RECIPE, Stage, assert_set_error, read,
    };

    #[test]
    fn overrides_of_every_kind() {
        let (recipe, table) = read(
            RECIPE,
            &[
                "stage.0.reconstruct.steps=5",
                "stage.0.reconstruct.method.flexround.clip = true",
                "stage.1.distill.method={ lrq = { rank = 3 } }",
                "stage.1.\"distill\".betas=[0.9, 0.95]",
                "quant.override.0.match=*.up_proj",
                "model.path=runs/x=y",
                "model.compute=f32",
                "output=\"2024\"",
                "seed=1",
                "seed=2",
            ],
        )
        .unwrap();
        let flexround = Method::Flexround(Flexround { clip: true });
        let Stage::Reconstruct(first) = &recipe.stage[0] else { panic!("{recipe:?}") };
        assert_eq!((first.steps, &first.method), (5, &flexround));
        let Stage::Distill(second) = &recipe.stage[1] else { panic!("{recipe:?}") };
        assert_eq!((&second.method, second.steps), (&Method::Lrq { rank: 3 }, 7));
        assert_eq!(second.betas, [0.9, 0.95]);
        assert_eq!(recipe.model.path, "runs/x=y");
        assert_eq!(recipe.model.compute, Compute::F32);
        assert_eq!(recipe.quant.unwrap().overrides[0].r#match, "*.up_proj");
        assert_eq!((recipe.output, recipe.seed), (PathBuf::from("2024"), 2));
        assert_eq!(table["model"]["compute"].as_str(), Some("f32"));
        assert_eq!(table["stage"][1]["distill"]["method"]["lrq"]["rank"].as_integer(), Some(3));
    }

    #[test]
    fn overrides_create_missing_tables() {
        let text = "seed = 0\noutput = \"x\"\n[model]\npath = \"toy\"\n";
        let (recipe, _) = read(text, &["quant.bits=3"]).unwrap();
        assert_eq!(recipe.quant, Some(Quant { bits: 3, overrides: Vec::new() }));
        // A key the override brought may lack another: that, too, is the override's doing.
        let error = read(text, &["quant.override=[]"]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "missing key `bits` in `quant`\n  at   --set quant.override=[]\n  \
             try  add it to this table, or --set quant.bits=…"
        );
    }

    #[test]
    fn a_stage_is_named_by_what_it_does_where_it_is_the_only_one() {
        let sets = ["stage.distill.steps=5", "stage.distill.method={ lrq = { rank = 3 } }"];
        let (recipe, table) = read(RECIPE, &sets).unwrap();
        let Stage::Distill(stage) = &recipe.stage[1] else { panic!("{recipe:?}") };
        assert_eq!((&stage.method, stage.steps), (&Method::Lrq { rank: 3 }, 5));
        let by_index = sets.map(|set| set.replace("stage.", "stage.1."));
        assert_eq!(read(RECIPE, &by_index.each_ref().map(String::as_str)).unwrap().1, table);
        let error = read(RECIPE, &["stage.distill.stpes=5"]).unwrap_err().to_string();
        assert!(
            error.starts_with("unknown key `stpes`\n  at   --set stage.distill.stpes"),
            "{error}"
        );
        let twice = RECIPE.replace("stage.reconstruct", "stage.distill");
        let error = read(&twice, &["stage.distill.steps=5"]).unwrap_err();
        let expected = "`stage` has 2 entries `distill`\n  at   --set stage.distill.steps=5\n  \
                        try  stage.0.distill or stage.1.distill";
        assert_eq!(error.to_string(), expected);
    }

    #[test]
    fn an_override_that_does_not_fit_is_named() {
        let known = "`steps` (known here: betas, learning_rate, method, steps)";
        assert_set_error("stage.0.reconstruct.stpes=100", "unknown key `stpes`", known);
        let keys = "one of: model, output, quant, seed, stage";
        assert_set_error("extra.a.b=1", "unknown key `extra`", keys);
        assert_set_error(
            "stage.1.distill.method={ lqr = {} }",
            "unknown choice `lqr` for `method`",
            "`lrq` (known here: flexround, lrq, seq)",
        );
        assert_set_error(
            "stage.1.distill.method=lrq",
            "`lrq` has settings, so it is written as a table",
            "--set 'stage.1.distill.method={ lrq = {} }'",
        );
        assert_set_error(
            "stage.1.distill.method.lrq.rank=3",
            "`method` has 2 choices (seq, lrq), expected exactly one",
            "replace the whole table: --set 'stage.1.distill.method={ lrq = { … } }'",
        );
        assert_set_error(
            "stage.1.distil.steps=3",
            "`stage.1` has 2 choices (distill, distil), expected exactly one",
            "`distill`, which is there; instead of it: --set 'stage.1={ distil = { … } }'",
        );
        assert_set_error(
            "stage.0.reconstruct.steps=many",
            "`steps`: expected an integer, found string \"many\"",
            "write an integer",
        );
        assert_set_error(
            "output=2024-01-01",
            "`output`: expected a path, found date 2024-01-01",
            "--set 'output=\"2024-01-01\"'",
        );
    }

    #[test]
    fn an_override_that_leads_nowhere_is_named() {
        assert_set_error(
            "stage.2.distill.steps=1",
            "`stage` has 2 entries, so there is no `stage.2`",
            "an index from 0 to 1, or add an entry to the file",
        );
        assert_set_error(
            "quant.override.1.match=x",
            "`quant.override` has 1 entry, so there is no `quant.override.1`",
            "an index from 0 to 0, or add an entry to the file",
        );
        assert_set_error(
            "stage.distil.steps=1",
            "`stage` has no entry `distil`",
            "stage.1.distill",
        );
        assert_set_error(
            "stage.evaluate.every=1",
            "`stage` has no entry `evaluate`",
            "one of: reconstruct, distill, or add the entry to the file",
        );
        assert_set_error(
            "quant.override.match=x",
            "`quant.override` has no entry `match`",
            "put the index first: quant.override.0.match",
        );
        assert_set_error(
            "output.a=1",
            "`output` is string \"runs/x\", not a table",
            "--set output=… replaces it",
        );
        let example = "write --set key=value, as in stage.distill.steps=100";
        assert_set_error("=5", "`=5` does not start with a key", example);
        assert_set_error("a b=5", "`a b=5` does not start with a key", example);
        assert_set_error("seed", "`seed` has no `=`", "write --set key=value");
    }
}
