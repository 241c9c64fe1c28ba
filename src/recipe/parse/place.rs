//! The key or value that an error's position points at.

use std::ops::Range;

use toml::Spanned;
use toml::de::DeValue;

/// What an error's position points at.
pub(super) struct Found<'d, 'a> {
    /// Keys and list indices from the root.
    pub(super) path: Vec<String>,
    pub(super) value: &'d DeValue<'a>,
    /// The position is the key's, not the value's.
    pub(super) is_key: bool,
}

impl<'d> Found<'d, '_> {
    /// The last key, with the indices after it: what the reader sees in the line.
    pub(super) fn name(&self) -> String {
        last_key(&self.path)
    }

    /// The word found there: the string, where it is a value, or else the key.
    pub(super) fn written(&self) -> &str {
        let word: Option<&'d str> = self.value.as_str().filter(|_| !self.is_key);
        word.or(self.path.last().map(String::as_str)).unwrap_or_default()
    }
}

pub(super) fn last_key(path: &[String]) -> String {
    let is_index = |segment: &String| segment.bytes().all(|byte| byte.is_ascii_digit());
    let start = path.iter().rposition(|segment| !is_index(segment)).unwrap_or(0);
    path[start..].join(".")
}

/// The innermost key or value at exactly `span`.
pub(super) fn locate<'d, 'a>(
    node: &'d Spanned<DeValue<'a>>,
    span: &Range<usize>,
    path: &mut Vec<String>,
) -> Option<Found<'d, 'a>> {
    for (name, key_span, child) in children(node.get_ref()) {
        path.push(name);
        if key_span.as_ref() == Some(span) {
            return Some(Found { path: path.clone(), value: child.get_ref(), is_key: true });
        }
        let found = locate(child, span, path);
        if found.is_some() {
            return found;
        }
        path.pop();
    }
    let found = || Found { path: path.clone(), value: node.get_ref(), is_key: false };
    (node.span() == *span).then(found)
}

/// A table's or list's entries: the key or index, the key's position, and the value.
type Child<'d, 'a> = (String, Option<Range<usize>>, &'d Spanned<DeValue<'a>>);

fn children<'d, 'a>(value: &'d DeValue<'a>) -> Vec<Child<'d, 'a>> {
    let list = value.as_array().into_iter().flatten().enumerate();
    let table = value.as_table().into_iter().flatten();
    list.map(|(index, value)| (index.to_string(), None, value))
        .chain(table.map(|(key, value)| (key.get_ref().to_string(), Some(key.span()), value)))
        .collect()
}
