//! Reading a `config.json`: every value typed and bounded, every complaint with its key, and a refusal
//! of options that change what a model computes and that its family did not ask for.

use std::cell::RefCell;
use std::collections::BTreeSet;

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// Largest width a config may say: no product of two leaves an `u64`.
pub(super) const MAX_WIDTH: usize = 1 << 20;
/// Most rows of a table.
pub(super) const MAX_ROWS: usize = 1 << 26;
/// Most decoder blocks.
pub(super) const MAX_BLOCKS: usize = 1 << 12;

/// Most linears of all blocks; the largest model of experts has a third of it.
pub(super) const MAX_LINEARS: usize = 1 << 18;

/// Options of some family that change what a model computes, with the values besides null, false, 0
/// and empty that change nothing.
const OPTIONS: [(&str, &[&str]); 34] = [
    ("add_cross_attention", &[]),
    ("alibi", &[]),
    ("attention_bias", &[]),
    ("attention_multiplier", &[]),
    ("attn_logit_softcapping", &[]),
    ("clip_qkv", &[]),
    ("embedding_multiplier", &["1", "1.0"]),
    ("enable_bias", &["true"]),
    ("final_logit_softcapping", &[]),
    ("kv_lora_rank", &[]),
    ("layer_norm_elementwise_affine", &["true"]),
    ("layer_types", &[]),
    ("llama_4_scaling_beta", &[]),
    ("logit_scale", &["1", "1.0"]),
    ("logits_scaling", &["1", "1.0"]),
    ("mlp_bias", &[]),
    ("multi_query", &[]),
    ("n_routed_experts", &[]),
    ("no_rope_layers", &[]),
    ("num_experts", &[]),
    ("num_local_experts", &[]),
    ("parallel_attn", &[]),
    ("partial_rotary_factor", &["1", "1.0"]),
    ("qk_layernorm", &[]),
    ("query_pre_attn_scalar", &[]),
    ("residual_multiplier", &["1", "1.0"]),
    ("rotary_pct", &["1", "1.0"]),
    ("scale_attn_by_inverse_layer_idx", &[]),
    ("scale_attn_weights", &["true"]),
    ("shared_expert_intermediate_size", &[]),
    ("sliding_window", &[]),
    ("use_parallel_residual", &[]),
    ("use_post_norm", &[]),
    ("use_qk_norm", &[]),
];

/// The keys of one config, or of a table in it.
pub(super) struct Keys<'a> {
    values: &'a Map<String, Value>,
    /// What stands before a key in a complaint.
    path: String,
    read: RefCell<BTreeSet<String>>,
}

impl<'a> Keys<'a> {
    pub(super) fn new(values: &'a Map<String, Value>) -> Self {
        Self { values, path: String::new(), read: RefCell::default() }
    }

    /// The value under the first of `names` that is there and not null, with its name.
    fn find<'n>(&self, names: &[&'n str]) -> Option<(&'n str, &'a Value)> {
        self.read.borrow_mut().extend(names.iter().map(|name| (*name).to_owned()));
        let found = |name: &&'n str| {
            self.values.get(*name).filter(|value| !value.is_null()).map(|value| (*name, value))
        };
        names.iter().find_map(found)
    }

    /// Whether a key is there, were it null.
    pub(super) fn has(&self, name: &str) -> bool {
        self.values.contains_key(name)
    }

    /// A whole number from 1 to `max`.
    pub(super) fn count(&self, names: &[&str], max: usize) -> Result<Option<usize>> {
        let Some((name, value)) = self.find(names) else { return Ok(None) };
        let number = value.as_u64().and_then(|number| usize::try_from(number).ok());
        match number.filter(|number| (1..=max).contains(number)) {
            Some(number) => Ok(Some(number)),
            None => Err(self.wrong(name, value, &format!("a whole number from 1 to {max}"))),
        }
    }

    /// As [`Keys::count`], of a key that must be there.
    pub(super) fn needed(&self, names: &[&str], max: usize) -> Result<usize> {
        let missing = || self.missing(names.first().copied().unwrap_or_default());
        self.count(names, max)?.ok_or_else(missing)
    }

    /// A width that must be there.
    pub(super) fn width(&self, names: &[&str]) -> Result<usize> {
        self.needed(names, MAX_WIDTH)
    }

    /// A finite number above 0.
    pub(super) fn positive(&self, name: &str) -> Result<Option<f64>> {
        let Some((name, value)) = self.find(&[name]) else { return Ok(None) };
        match value.as_f64().filter(|number| number.is_finite() && *number > 0.0) {
            Some(number) => Ok(Some(number)),
            None => Err(self.wrong(name, value, "a number above 0")),
        }
    }

    /// As [`Keys::positive`], of a key that must be there.
    pub(super) fn needed_positive(&self, name: &str) -> Result<f64> {
        self.positive(name)?.ok_or_else(|| self.missing(name))
    }

    /// A list of numbers above 0.
    pub(super) fn positives(&self, name: &str) -> Result<Vec<f64>> {
        let Some((name, value)) = self.find(&[name]) else { return Err(self.missing(name)) };
        let number = |value: &Value| value.as_f64().filter(|n| n.is_finite() && *n > 0.0);
        let all = value.as_array().and_then(|list| list.iter().map(number).collect());
        all.ok_or_else(|| self.wrong(name, value, "a list of numbers above 0"))
    }

    pub(super) fn flag(&self, name: &str, default: bool) -> Result<bool> {
        match self.find(&[name]) {
            None => Ok(default),
            Some((_, Value::Bool(flag))) => Ok(*flag),
            Some((name, value)) => Err(self.wrong(name, value, "true or false")),
        }
    }

    pub(super) fn text(&self, names: &[&str]) -> Result<Option<&'a str>> {
        match self.find(names) {
            None => Ok(None),
            Some((_, Value::String(text))) => Ok(Some(text)),
            Some((name, value)) => Err(self.wrong(name, value, "a text")),
        }
    }

    /// A list of texts.
    pub(super) fn texts(&self, name: &str) -> Result<Option<Vec<&'a str>>> {
        let Some((name, value)) = self.find(&[name]) else { return Ok(None) };
        let all = value.as_array().and_then(|list| list.iter().map(Value::as_str).collect());
        all.map(Some).ok_or_else(|| self.wrong(name, value, "a list of texts"))
    }

    /// A list of whole numbers.
    pub(super) fn integers(&self, name: &str) -> Result<Option<Vec<u64>>> {
        let Some((name, value)) = self.find(&[name]) else { return Ok(None) };
        let all = value.as_array().and_then(|list| list.iter().map(Value::as_u64).collect());
        all.map(Some).ok_or_else(|| self.wrong(name, value, "a list of whole numbers"))
    }

    /// Kinds with their repetitions, `[[[kind, ..], times], ..]`, spelled out.
    pub(super) fn nested_kinds(&self, name: &str) -> Result<Option<Vec<String>>> {
        let Some((name, value)) = self.find(&[name]) else { return Ok(None) };
        let part = |part: &Value| -> Option<Vec<String>> {
            let kinds: Vec<String> = serde_json::from_value(part.get(0)?.clone()).ok()?;
            let times =
                usize::try_from(part.get(1)?.as_u64()?).ok().filter(|t| *t <= MAX_BLOCKS)?;
            Some(std::iter::repeat_n(kinds, times).flatten().collect())
        };
        let all: Option<Vec<Vec<String>>> =
            value.as_array().and_then(|list| list.iter().map(part).collect());
        let all = all.ok_or_else(|| self.wrong(name, value, "a list of [kinds, repetitions]"))?;
        Ok(Some(all.concat()))
    }

    /// The table under the first of `names` that is there.
    pub(super) fn table(&self, names: &[&str]) -> Result<Option<Self>> {
        match self.find(names) {
            None => Ok(None),
            Some((name, Value::Object(values))) => {
                let path = format!("{}{name}.", self.path);
                Ok(Some(Self { values, path, read: RefCell::default() }))
            }
            Some((name, value)) => Err(self.wrong(name, value, "a table")),
        }
    }

    /// Whether every value is a table itself.
    pub(super) fn holds_tables(&self) -> bool {
        !self.values.is_empty() && self.values.values().all(Value::is_object)
    }

    /// Token ids from a number, a list of numbers, or nothing, each one of `vocab`.
    pub(super) fn tokens(&self, name: &str, vocab: usize) -> Result<Vec<u32>> {
        let list = match self.find(&[name]) {
            None => return Ok(Vec::new()),
            Some((_, Value::Array(list))) => list.iter().collect(),
            Some((_, value)) => vec![value],
        };
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let token = |value| match id(value) {
            Some(id) if (id as usize) < vocab => Ok(id),
            _ => Err(self.wrong(name, value, &format!("a token from 0 to {}", vocab - 1))),
        };
        list.into_iter().map(token).collect()
    }

    /// Refuses options that change what the model computes and that nobody read.
    pub(super) fn refuse_unread(&self, model_type: &str) -> Result<()> {
        let read = self.read.borrow();
        for (name, neutral) in OPTIONS {
            let Some(value) = self.values.get(name).filter(|_| !read.contains(name)) else {
                continue;
            };
            let nothing = match value {
                Value::Null | Value::Bool(false) => true,
                Value::Number(number) => number.as_f64() == Some(0.0),
                Value::Array(list) => list.is_empty() || list.iter().all(|v| v == "full_attention"),
                Value::Object(table) => table.is_empty(),
                _ => false,
            };
            if !nothing && !neutral.contains(&value.to_string().as_str()) {
                let what =
                    format!("`{name}` is {value}, which fewbit's {model_type} does not have");
                return Err(Error::preflight(what).fix("a model without this option"));
            }
        }
        Ok(())
    }

    pub(super) fn missing(&self, name: &str) -> Error {
        Error::preflight(format!("config.json has no `{}{name}`", self.path))
            .fix("a Hugging Face model folder with a complete config.json")
    }

    /// A complaint about a value.
    pub(super) fn wrong(&self, name: &str, value: &Value, fix: &str) -> Error {
        let mut shown = value.to_string();
        if let Some((end, _)) = shown.char_indices().nth(60) {
            shown.truncate(end);
            shown.push('…');
        }
        Error::preflight(format!("`{}{name}` is {shown}", self.path)).fix(fix.to_owned())
    }

    /// As [`Keys::wrong`], of a value that was read.
    pub(super) fn refuse(&self, name: &str, value: impl std::fmt::Display, fix: &str) -> Error {
        Error::preflight(format!("{}{name} `{value}` is not supported", self.path))
            .fix(fix.to_owned())
    }
}
