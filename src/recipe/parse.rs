//! TOML in, typed value out, with errors that point at the wrong key.
//!
//! Generic machinery: it knows no recipe. The document is kept with the position of every key and
//! value, `--set` overrides are written into it, and the type is read from the result. An override
//! gets positions past the end of the text, so the position of an error alone says whether the file
//! or the command line is to blame.

mod explain;
mod names;
mod overrides;
mod place;
#[cfg(test)]
mod sample;
mod source;
mod words;

use serde::Serialize;
use serde::de::{Deserialize as _, DeserializeOwned};
use toml::Spanned;
use toml::de::{DeTable, DeValue, ValueDeserializer};

use self::explain::explain;
pub(super) use self::names::nearest;
use self::source::Source;
use crate::error::{Error, Result};

/// Parses `text` as TOML, applies `overrides` (`a.b.0.c=value`) and reads a `T` from the result.
///
/// Returns the value and the table it was read from, overrides included. An override's value is
/// TOML, or else a plain string; missing tables on its way are created, list entries are not.
/// `file` only names the text in errors.
///
/// # Errors
/// Usage errors naming the line with an excerpt, or the override: broken TOML, an override that
/// leads nowhere, and everything `T` refuses.
pub fn parse<T: DeserializeOwned>(
    text: &str,
    file: &str,
    overrides: &[String],
) -> Result<(T, toml::Table)> {
    let source = Source::new(text, file, overrides);
    let document = DeTable::parse(text).map_err(|error| source.broken_toml(&error))?;
    let mut root = Spanned::new(0..0, DeValue::Table(document.into_inner()));
    for set in &source.overrides {
        set.apply(&mut root)?;
    }
    let refused = |error: toml::de::Error| explain(&error, &root, &source);
    let value = T::deserialize(ValueDeserializer::from(root.clone())).map_err(refused)?;
    let table = toml::Table::deserialize(ValueDeserializer::from(root.clone())).map_err(refused)?;
    Ok((value, table))
}

/// Writes `value` as TOML text that [`parse`] reads back.
///
/// # Errors
/// If the value has no TOML form, such as a number beyond 64 bits.
pub fn to_toml<T: Serialize>(value: &T) -> Result<String> {
    toml::to_string_pretty(value)
        .map_err(|error| Error::failed(format!("cannot be written as TOML: {error}")))
}

#[cfg(test)]
mod tests {
    use super::sample::{RECIPE, read};
    use super::*;

    #[test]
    fn reads_a_recipe_and_its_table_in_order() {
        let (recipe, table) = read(RECIPE, &[]).unwrap();
        assert_eq!(recipe.stage.len(), 2);
        assert_eq!(table.keys().collect::<Vec<_>>(), ["seed", "output", "model", "quant", "stage"]);
        assert_eq!(table["stage"][1]["distill"]["steps"].as_integer(), Some(7));
    }

    #[test]
    fn what_is_written_reads_back() {
        let (recipe, _) =
            read(RECIPE, &["stage.0.reconstruct.method={ lrq = { rank = 4 } }"]).unwrap();
        let text = to_toml(&recipe).unwrap();
        assert_eq!(read(&text, &[]).unwrap().0, recipe);
        assert!(to_toml(&u128::MAX).is_err());
    }
}
