//! `{% generation %}` … `{% endgeneration %}`: transformers' tags around what an assistant has said.
//!
//! minijinja takes no tags of others, so they become `{% with %}` and `{% endwith %}`, which keep what
//! stands between them and a scope of its own too. Only the word is exchanged: signs of white space
//! control stay where they are.

/// Puts the tags that minijinja knows in place of these.
pub(super) fn replaced(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = next_open(rest) {
        let kind = rest.as_bytes()[at + 1];
        out.push_str(&rest[..at + 2]);
        rest = &rest[at + 2..];
        let length = match kind {
            b'#' => rest.find("#}").map_or(rest.len(), |end| end + 2),
            b'{' => code_length(rest, "}}"),
            _ => {
                let (before, name) = tag_name(rest);
                let put = match name {
                    "generation" => Some("with"),
                    "endgeneration" => Some("endwith"),
                    _ => None,
                };
                if let Some(put) = put {
                    out.push_str(&rest[..before]);
                    out.push_str(put);
                    rest = &rest[before + name.len()..];
                }
                let code = code_length(rest, "%}");
                if name == "raw" {
                    let (tag, body) = rest.split_at(code);
                    out.push_str(tag);
                    // Jinja keeps the line feed behind this tag, and minijinja takes one away.
                    out.push_str(if tag.ends_with("-%}") || !body.starts_with('\n') {
                        ""
                    } else {
                        "\n"
                    });
                    rest = body;
                    raw_length(body)
                } else {
                    code
                }
            }
        };
        out.push_str(&rest[..length]);
        rest = &rest[length..];
    }
    out.push_str(rest);
    out
}

/// Where the next `{{`, `{%` or `{#` begins.
fn next_open(text: &str) -> Option<usize> {
    text.as_bytes().windows(2).position(|pair| pair[0] == b'{' && b"{%#".contains(&pair[1]))
}

/// The name of a tag, and the bytes before it.
fn tag_name(code: &str) -> (usize, &str) {
    let start = code.trim_start_matches(['-', '+']);
    let start = start.trim_start();
    let before = code.len() - start.len();
    let end = start.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(start.len());
    (before, &start[..end])
}

/// The bytes up to and with `close`, strings and brackets passed over.
fn code_length(code: &str, close: &str) -> usize {
    let bytes = code.as_bytes();
    let (mut at, mut open) = (0, 0_usize);
    while at < bytes.len() {
        if open == 0 && bytes[at..].starts_with(close.as_bytes()) {
            return at + close.len();
        }
        match bytes[at] {
            quote @ (b'"' | b'\'') => {
                at += 1;
                while at < bytes.len() && bytes[at] != quote {
                    at += if bytes[at] == b'\\' { 2 } else { 1 };
                }
            }
            b'{' | b'[' | b'(' => open += 1,
            b'}' | b']' | b')' => open = open.saturating_sub(1),
            _ => {}
        }
        at += 1;
    }
    code.len()
}

/// The bytes up to the `{% endraw %}` that ends raw text.
fn raw_length(text: &str) -> usize {
    let mut from = 0;
    while let Some(at) = text[from..].find("{%") {
        let inside = from + at + 2;
        if tag_name(&text[inside..]).1 == "endraw" {
            return inside + code_length(&text[inside..], "%}");
        }
        from = inside;
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_exchanged_and_nothing_else() {
        for (source, expected) in [
            ("a{%- generation -%} b {% endgeneration +%}", "a{%- with -%} b {% endwith +%}"),
            ("{%generation%}{%endgeneration%}", "{%with%}{%endwith%}"),
            (
                "{{ '{% generation %}' }}{# {% generation %} #}",
                "{{ '{% generation %}' }}{# {% generation %} #}",
            ),
            ("{% set a = '%} {% generation %}' %}x", "{% set a = '%} {% generation %}' %}x"),
            (
                "{% raw %}{% generation %}{%- endraw %}{% generation %}",
                "{% raw %}{% generation %}{%- endraw %}{% with %}",
            ),
            ("{{ {'a': {}} }}{% generation %}", "{{ {'a': {}} }}{% with %}"),
            ("{% generations %}{ % generation %}", "{% generations %}{ % generation %}"),
            ("{{ 'é\\'' }}{% generation %}{", "{{ 'é\\'' }}{% with %}{"),
            ("{% generation", "{% with"),
        ] {
            assert_eq!(replaced(source), expected, "{source}");
        }
    }
}
