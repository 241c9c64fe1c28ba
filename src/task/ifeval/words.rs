//! Tokens of an English sentence as NLTK's word tokenizer makes them: the Penn Treebank's rules, in which
//! spaces are put around marks, step by step, and the text is then split at spaces.

use std::sync::LazyLock;

use regex::{Captures, Regex};

use super::{punkt, python};

/// A pattern, and what stands in its place.
struct Step {
    pattern: Regex,
    replacement: &'static str,
}

fn steps(list: &[(&str, &'static str)]) -> Vec<Step> {
    let step = |(pattern, replacement): &(&str, &'static str)| Step {
        pattern: python::compile(pattern),
        replacement,
    };
    list.iter().map(step).collect()
}

/// Opening quotes. A straight one opens at the start and behind an opening bracket.
static OPENING: LazyLock<Vec<Step>> = LazyLock::new(|| {
    steps(&[
        ("([«“‘„]|`+)", " $1 "),
        ("^\"", "``"),
        ("(``)", " $1 "),
        ("([ (\\[{<])(?:\"|'{2})", "$1 `` "),
    ])
});

/// Marks and brackets.
static MARKS: LazyLock<Vec<Step>> = LazyLock::new(|| {
    steps(&[
        // The period at the end, with closing marks behind it.
        ("([^.])(\\.)([\\])}>\"'»”’ ]*)\\s*$", "$1 $2 $3 "),
        (r"([:,])(\D)", " $1 $2"),
        ("([:,])$", " $1 "),
        (r"(\.{2,})", " $1 "),
        ("([;@#$%&])", " $1 "),
        (r"([\x{2012}-\x{2015}])", " $1 "),
        ("([^.])(\\.)([\\])}>\"']*)\\s*$", "$1 $2$3 "),
        ("([?!])", " $1 "),
        ("([^'])' ", "$1 ' "),
        (r"(\*)", " $1 "),
        (r"([\]\[(){}<>])", " $1 "),
        ("--", " -- "),
    ])
});

/// Closing quotes and what is left of words behind an apostrophe.
static CLOSING: LazyLock<Vec<Step>> = LazyLock::new(|| {
    steps(&[
        ("([»”’])", " $1 "),
        ("(?:''|\")", " '' "),
        (r"\s+", " "),
        ("([^' ])('[sS]|'[mM]|'[dD]|') ", "$1 $2 "),
        ("([^' ])('ll|'LL|'re|'RE|'ve|'VE|n't|N'T) ", "$1 $2 "),
    ])
});

/// Words that are two; each between a word's edges, the last ones behind a space or before one.
static TWO: LazyLock<Vec<(Regex, Edges)>> = LazyLock::new(|| {
    let both = [
        "(can)(not)",
        "(d)('ye)",
        "(g[iıİ]m)(me)",
        "(gon)(na)",
        "(got)(ta)",
        "(lem)(me)",
        "(more)('n)",
    ];
    let both = both.map(|words| (words, Edges::Both)).into_iter();
    let list = both.chain([
        ("(wan)(na)", Edges::LeftAndSpace),
        ("('t)([iıİ]s)", Edges::SpaceAndRight),
        ("('t)(was)", Edges::SpaceAndRight),
    ]);
    list.map(|(words, edges)| (python::compile(&format!("(?i){words}")), edges)).collect()
});

/// What has to be on either side.
#[derive(Clone, Copy)]
enum Edges {
    Both,
    LeftAndSpace,
    /// The space is replaced, too.
    SpaceAndRight,
}

/// The tokens of a text of any number of sentences.
pub(super) fn tokens(text: &str) -> Vec<String> {
    let of_sentence = |sentence: &str| -> Vec<String> {
        python::split(&spaced(sentence)).map(str::to_owned).collect()
    };
    punkt::sentences(text).into_iter().flat_map(of_sentence).collect()
}

/// A sentence with spaces between its tokens.
fn spaced(sentence: &str) -> String {
    let mut text = replaced(sentence.to_owned(), &OPENING);
    text = before_apostrophes(&text);
    text = replaced(text, &MARKS);
    text = replaced(format!(" {text} "), &CLOSING);
    for (words, edges) in TWO.iter() {
        text = apart(&text, words, *edges);
    }
    text
}

fn replaced(text: String, steps: &[Step]) -> String {
    let each = |text: String, step: &Step| {
        if !step.pattern.is_match(&text) {
            return text;
        }
        step.pattern.replace_all(&text, step.replacement).into_owned()
    };
    steps.iter().fold(text, each)
}

/// A space behind each apostrophe that opens a word and is no contraction.
fn before_apostrophes(text: &str) -> String {
    static CONTRACTION: LazyLock<Regex> =
        LazyLock::new(|| python::compile(r"^(?i:re|ve|ll|m|t|s|d|n)\b"));
    static WORD: LazyLock<Regex> = LazyLock::new(|| python::compile(r"^\w$"));
    let is_word = |c: char| WORD.is_match(c.encode_utf8(&mut [0; 4]));
    let mut spaced = String::with_capacity(text.len() + 8);
    let mut before = None;
    for (at, character) in text.char_indices() {
        spaced.push(character);
        let behind = &text[at + character.len_utf8()..];
        if character == '\''
            && !before.is_some_and(is_word)
            && behind.chars().next().is_some_and(is_word)
            && !CONTRACTION.is_match(behind)
        {
            spaced.push(' ');
        }
        before = Some(character);
    }
    spaced
}

/// Two words that are written as one, apart.
fn apart(text: &str, words: &Regex, edges: Edges) -> String {
    let mut spaced = String::with_capacity(text.len() + 8);
    let (mut done, mut from) = (0, 0);
    while let Some(found) = words.captures_at(text, from) {
        let [whole, first, second] = parts(&found);
        let edge = |at: usize| python::is_boundary(text, at);
        let space = |behind: &str| behind.chars().next().is_some_and(python::is_space);
        let fits = match edges {
            Edges::Both => edge(whole.0) && edge(whole.1),
            Edges::LeftAndSpace => edge(whole.0) && space(&text[whole.1..]),
            Edges::SpaceAndRight => {
                whole.0 > done && text[..whole.0].ends_with(' ') && edge(whole.1)
            }
        };
        if !fits {
            from = whole.0 + 1;
            continue;
        }
        let start = whole.0 - usize::from(matches!(edges, Edges::SpaceAndRight));
        spaced.push_str(&text[done..start]);
        for (start, end) in [first, second] {
            spaced.push(' ');
            spaced.push_str(&text[start..end]);
            spaced.push(' ');
        }
        (done, from) = (whole.1, whole.1);
    }
    spaced.push_str(&text[done..]);
    spaced
}

/// Where the whole and its two words are.
fn parts(found: &Captures<'_>) -> [(usize, usize); 3] {
    [0, 1, 2].map(|group| found.get(group).map_or((0, 0), |part| (part.start(), part.end())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_quotes_and_contractions_are_tokens() {
        let text = "\"I CAN'T,\" she said; 'TIS $5.00 (U.S. money). You cannot -- GONNA stop...";
        let expected = [
            "``", "I", "CA", "N'T", ",", "''", "she", "said", ";", "'", "TIS", "$", "5.00", "(",
            "U.S.", "money", ")", ".", "You", "can", "not", "--", "GON", "NA", "stop", "...",
        ];
        assert_eq!(tokens(text), expected);
    }
}
