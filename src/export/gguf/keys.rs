//! Metadata by key, with errors that name the key.

use fewbit_gguf::Value;

use crate::error::{Error, Result};

/// The key of a tokenizer's kind.
pub(super) const MODEL: &str = "tokenizer.ggml.model";
/// The key of a tokenizer's pieces.
pub(super) const TOKENS: &str = "tokenizer.ggml.tokens";

/// The metadata of a file that somebody else may have written.
#[derive(Clone, Copy, Debug)]
pub(super) struct Keys<'a>(pub(super) &'a [(String, Value)]);

impl<'a> Keys<'a> {
    /// The value of a key, when it is there.
    pub(super) fn get(self, key: &str) -> Option<&'a Value> {
        self.0.iter().find(|(name, _)| name == key).map(|(_, value)| value)
    }

    /// A text.
    pub(super) fn text(self, key: &str) -> Result<Option<&'a str>> {
        self.read(key, "a text", Value::as_text)
    }

    /// A truth value.
    pub(super) fn truth(self, key: &str) -> Result<Option<bool>> {
        self.read(key, "a truth value", |value| match value {
            Value::Bool(truth) => Some(*truth),
            _ => None,
        })
    }

    /// A number that is not infinite.
    pub(super) fn number(self, key: &str) -> Result<Option<f64>> {
        self.read(key, "a finite number", |value| {
            let number = match value {
                // The shortest decimal of an f32 is what was meant: 1e-5, not 9.99999974e-6.
                Value::F32(narrow) => narrow.to_string().parse().ok()?,
                Value::F64(wide) => *wide,
                whole => whole.as_u64()? as f64,
            };
            number.is_finite().then_some(number)
        })
    }

    /// A token id.
    pub(super) fn id(self, key: &str) -> Result<Option<u32>> {
        self.read(key, "a token id", |value| value.as_u64()?.try_into().ok())
    }

    /// A count of at least 1. Files may give it as a list with a count per block, which must all be
    /// the same.
    pub(super) fn count(self, key: &str) -> Result<Option<usize>> {
        let one = |value: &Value| {
            let count = value.as_u64().and_then(|count| usize::try_from(count).ok());
            count.filter(|count| *count > 0)
        };
        let Some(Value::List(_, values)) = self.get(key) else {
            return self.read(key, "a count of at least 1", one);
        };
        let Some(first) = values.first().and_then(one) else {
            return Err(unexpected(key, "a count of at least 1", self.get(key)));
        };
        match values.iter().position(|value| one(value) != Some(first)) {
            None => Ok(Some(first)),
            Some(block) => Err(Error::preflight(format!(
                "`{key}` is {first} in block 0 and another number in block {block}; fewbit's blocks \
                 are all alike"
            ))
            .fix("a model whose blocks all have the same sizes")),
        }
    }

    /// [`Keys::count`] of a key that every file has.
    pub(super) fn needed_count(self, key: &str) -> Result<usize> {
        self.count(key)?.ok_or_else(|| missing(key))
    }

    /// A count that may be 0.
    pub(super) fn count_or_zero(self, key: &str) -> Result<Option<u64>> {
        self.read(key, "a count", Value::as_u64)
    }

    /// A list of texts.
    pub(super) fn texts(self, key: &str) -> Result<Option<Vec<&'a str>>> {
        self.list(key, "a list of texts", Value::as_text)
    }

    /// A list of numbers that are not infinite.
    pub(super) fn floats(self, key: &str) -> Result<Option<Vec<f32>>> {
        self.list(key, "a list of finite numbers", |value| {
            let number = match value {
                Value::F32(number) => *number,
                Value::I32(number) => *number as f32,
                _ => return None,
            };
            number.is_finite().then_some(number)
        })
    }

    /// A list of whole numbers that are not negative.
    pub(super) fn whole(self, key: &str) -> Result<Option<Vec<u64>>> {
        self.list(key, "a list of whole numbers", Value::as_u64)
    }

    fn read<T>(
        self,
        key: &str,
        wanted: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let found = self.get(key);
        found.map(|value| read(value).ok_or_else(|| unexpected(key, wanted, found))).transpose()
    }

    fn list<T>(
        self,
        key: &str,
        wanted: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<Vec<T>>> {
        self.read(key, wanted, |value| value.as_list()?.iter().map(&read).collect())
    }
}

/// An error about a key that a file must have.
pub(super) fn missing(key: &str) -> Error {
    Error::preflight(format!("the file has no metadata key `{key}`"))
        .fix("a complete file, for instance one made by llama.cpp's convert_hf_to_gguf.py")
}

fn unexpected(key: &str, wanted: &str, found: Option<&Value>) -> Error {
    let found = match found {
        Some(Value::List(kind, values)) => format!("a list of {} values ({kind:?})", values.len()),
        Some(Value::Text(text)) => format!("the text `{}`", text.escape_debug()),
        Some(other) => format!("{other:?}"),
        None => "missing".to_owned(),
    };
    Error::preflight(format!("the metadata key `{key}` is {found}; {wanted} is needed"))
}

#[cfg(test)]
mod tests {
    use fewbit_gguf::ValueKind;

    use super::*;

    #[test]
    fn readings_and_refusals() {
        let list = |numbers: &[u32]| {
            Value::List(ValueKind::U32, numbers.iter().map(|number| Value::U32(*number)).collect())
        };
        let all: Vec<(String, Value)> = [
            ("eps", Value::F32(1e-5)),
            ("nan", Value::F64(f64::NAN)),
            ("same", list(&[3, 3])),
            ("other", list(&[3, 4])),
            ("none", list(&[])),
            ("zero", Value::U32(0)),
            ("minus", Value::I32(-1)),
            ("text", "x".into()),
            ("true", true.into()),
        ]
        .map(|(key, value)| (key.to_owned(), value))
        .into();
        let keys = Keys(&all);
        assert_eq!(keys.number("eps").unwrap(), Some(1e-5));
        assert_eq!(keys.count("same").unwrap(), Some(3));
        assert_eq!(keys.truth("true").unwrap(), Some(true));
        assert_eq!(keys.text("absent").unwrap(), None);
        assert_eq!(keys.texts("none").unwrap(), Some(Vec::new()));
        for (error, part) in [
            (keys.number("nan").unwrap_err(), "`nan` is F64(NaN); a finite"),
            (
                keys.count("other").unwrap_err(),
                "`other` is 3 in block 0 and another number in block 1",
            ),
            (keys.count("none").unwrap_err(), "`none` is a list of 0"),
            (keys.count("zero").unwrap_err(), "`zero` is U32(0)"),
            (keys.id("minus").unwrap_err(), "`minus` is I32(-1); a token id"),
            (keys.truth("text").unwrap_err(), "`text` is the text `x`; a truth"),
            (keys.texts("same").unwrap_err(), "`same` is a list of 2 values (U32)"),
            (keys.needed_count("absent").unwrap_err(), "no metadata key `absent`"),
        ] {
            assert!(error.to_string().contains(part), "{error}");
        }
    }
}
