//! The instructions that an answer can be checked for, and their keys in the data.

use serde_json::{Map, Value};

use super::pattern::Pattern;

/// One instruction with what it asks for. The names are those of the data, `group:name`.
#[derive(Clone, Debug)]
pub enum Instruction {
    /// `keywords:existence`: all of them are there.
    Keywords(Vec<Word>),
    /// `keywords:frequency`.
    KeywordFrequency(Word, Count),
    /// `keywords:forbidden_words`: none of them is there as a word.
    Forbidden(Vec<Word>),
    /// `keywords:letter_frequency`, in either case.
    LetterFrequency(char, Count),
    /// `language:response_language`: a code of ISO 639-1.
    Language(String),
    /// `length_constraints:number_sentences`.
    Sentences(Count),
    /// `length_constraints:number_paragraphs`: this many, with `***` between them.
    Paragraphs(u64),
    /// `length_constraints:number_words`.
    Words(Count),
    /// `length_constraints:nth_paragraph_first_word`: paragraphs with an empty line between them.
    FirstWord {
        /// How many of them.
        paragraphs: u64,
        /// Which of them, from 1.
        nth: u64,
        /// What it begins with, in lower case.
        word: String,
    },
    /// `detectable_content:number_placeholders`: at least this many `[…]`.
    Placeholders(u64),
    /// `detectable_content:postscript`.
    Postscript(Word),
    /// `detectable_format:number_bullet_lists`: exactly this many lines with `*` or `-`.
    Bullets(u64),
    /// `detectable_format:constrained_response`: yes, no or maybe, in three sentences that are given.
    Constrained,
    /// `detectable_format:number_highlighted_sections`: at least this many `*…*`.
    Highlights(u64),
    /// `detectable_format:multiple_sections`: at least this many headings with a number.
    Sections(Word, u64),
    /// `detectable_format:json_format`.
    Json,
    /// `detectable_format:title`: `<<…>>`.
    Title,
    /// `combination:two_responses`: two unlike ones with `******` between them.
    TwoResponses,
    /// `combination:repeat_prompt`: begins with this.
    Repeat(String),
    /// `startend:end_checker`: ends with this, in lower case.
    End(String),
    /// `startend:quotation`.
    Quotation,
    /// `change_case:capital_word_frequency`.
    CapitalWords(Count),
    /// `change_case:english_capital`.
    Capitals,
    /// `change_case:english_lowercase`.
    SmallLetters,
    /// `punctuation:no_comma`.
    NoComma,
}

/// A word or a pattern that is searched for.
#[derive(Clone, Debug)]
pub struct Word(pub(super) Pattern);

/// How many there are to be.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Count {
    /// Fewer than this many.
    LessThan(u64),
    /// This many or more.
    AtLeast(u64),
}

impl Count {
    /// Whether `found` is as many as there are to be.
    pub fn holds(self, found: u64) -> bool {
        match self {
            Self::LessThan(count) => found < count,
            Self::AtLeast(count) => found >= count,
        }
    }
}

impl Instruction {
    /// Reads an instruction by its name and keys. Keys that are null are as good as absent, as are keys
    /// of other instructions, which data in columns carries along.
    ///
    /// # Errors
    /// Words on what is missing or wrong.
    pub fn parse(name: &str, keys: &Map<String, Value>) -> Result<Self, String> {
        let keys = Keys { name, keys };
        Ok(match name {
            "keywords:existence" => Self::Keywords(keys.words("keywords", Pattern::ignoring_case)?),
            "keywords:frequency" => {
                let word = keys.text("keyword")?.trim_matches(super::python::is_space);
                Self::KeywordFrequency(
                    Word(Pattern::ignoring_case(word)?),
                    keys.counted("frequency", "relation")?,
                )
            }
            "keywords:forbidden_words" => {
                Self::Forbidden(keys.words("forbidden_words", Pattern::word)?)
            }
            "keywords:letter_frequency" => Self::LetterFrequency(
                keys.letter("letter")?,
                keys.counted("let_frequency", "let_relation")?,
            ),
            "language:response_language" => Self::Language(keys.language("language")?),
            "length_constraints:number_sentences" => {
                Self::Sentences(keys.counted("num_sentences", "relation")?)
            }
            "length_constraints:number_paragraphs" => {
                Self::Paragraphs(keys.number("num_paragraphs")?)
            }
            "length_constraints:number_words" => {
                Self::Words(keys.counted("num_words", "relation")?)
            }
            "length_constraints:nth_paragraph_first_word" => Self::FirstWord {
                paragraphs: keys.number("num_paragraphs")?,
                nth: keys.number("nth_paragraph")?,
                word: keys.text("first_word")?.to_lowercase(),
            },
            "detectable_content:number_placeholders" => {
                Self::Placeholders(keys.number("num_placeholders")?)
            }
            "detectable_content:postscript" => {
                Self::Postscript(postscript(keys.stripped("postscript_marker")?)?)
            }
            "detectable_format:number_bullet_lists" => Self::Bullets(keys.number("num_bullets")?),
            "detectable_format:constrained_response" => Self::Constrained,
            "detectable_format:number_highlighted_sections" => {
                Self::Highlights(keys.number("num_highlights")?)
            }
            "detectable_format:multiple_sections" => {
                let heading = keys.stripped("section_spliter")?;
                Self::Sections(heading_with_number(heading)?, keys.number("num_sections")?)
            }
            "detectable_format:json_format" => Self::Json,
            "detectable_format:title" => Self::Title,
            "combination:two_responses" => Self::TwoResponses,
            "combination:repeat_prompt" => {
                Self::Repeat(keys.stripped("prompt_to_repeat")?.to_lowercase())
            }
            "startend:end_checker" => Self::End(keys.stripped("end_phrase")?.to_lowercase()),
            "startend:quotation" => Self::Quotation,
            "change_case:capital_word_frequency" => {
                Self::CapitalWords(keys.counted("capital_frequency", "capital_relation")?)
            }
            "change_case:english_capital" => Self::Capitals,
            "change_case:english_lowercase" => Self::SmallLetters,
            "punctuation:no_comma" => Self::NoComma,
            _ => return Err(format!("{name:?} is no instruction of IFEval")),
        })
    }
}

/// The two usual ones may have a space behind a period; answers are in lower case when they are searched.
fn postscript(marker: &str) -> Result<Word, String> {
    let space = format!("[{}]?", super::python::SPACE);
    let pattern = match marker {
        "P.P.S" => format!(r"p\.{space}p\.{space}s"),
        "P.S." => format!(r"p\.{space}s\."),
        other => other.to_lowercase(),
    };
    Pattern::between("", &pattern, "").map(Word)
}

fn heading_with_number(heading: &str) -> Result<Word, String> {
    let space = format!("[{}]?", super::python::SPACE);
    Pattern::between(&space, heading, &format!(r"{space}\d+{space}")).map(Word)
}

/// The keys of one instruction.
struct Keys<'a> {
    name: &'a str,
    keys: &'a Map<String, Value>,
}

impl<'a> Keys<'a> {
    fn get(&self, key: &str) -> Result<&'a Value, String> {
        match self.keys.get(key) {
            None | Some(Value::Null) => Err(format!("{} has no {key}", self.name)),
            Some(value) => Ok(value),
        }
    }

    fn wrong(&self, key: &str, value: &Value, what: &str) -> String {
        format!("{}: {key} is {value} and not {what}", self.name)
    }

    fn text(&self, key: &str) -> Result<&'a str, String> {
        let value = self.get(key)?;
        let text = value.as_str().filter(|text| !text.is_empty());
        text.ok_or_else(|| self.wrong(key, value, "a text"))
    }

    fn stripped(&self, key: &str) -> Result<&'a str, String> {
        self.text(key).map(super::python::strip)
    }

    fn language(&self, key: &str) -> Result<String, String> {
        let code = self.text(key)?;
        let known = super::language::is_known(code).then(|| code.to_owned());
        let value = self.get(key)?;
        known.ok_or_else(|| self.wrong(key, value, "the code of a language that is known"))
    }

    /// A whole number; tables of columns may hold it as `3.0`.
    fn number(&self, key: &str) -> Result<u64, String> {
        let value = self.get(key)?;
        let whole = |number: f64| (number >= 0.0 && number.fract() == 0.0).then_some(number as u64);
        let number = value.as_u64().or_else(|| value.as_f64().and_then(whole));
        number.ok_or_else(|| self.wrong(key, value, "a whole number"))
    }

    fn counted(&self, count: &str, relation: &str) -> Result<Count, String> {
        let count = self.number(count)?;
        let value = self.get(relation)?;
        match value.as_str() {
            Some("less than") => Ok(Count::LessThan(count)),
            Some("at least") => Ok(Count::AtLeast(count)),
            _ => Err(self.wrong(relation, value, "\"less than\" or \"at least\"")),
        }
    }

    /// One character, in lower case.
    fn letter(&self, key: &str) -> Result<char, String> {
        let text = self.text(key)?;
        let lower = text.to_lowercase();
        let mut letters = lower.chars();
        match (letters.next(), letters.next()) {
            (Some(letter), None) => Ok(letter),
            _ => Err(format!("{}: {key} is {text:?} and not one letter", self.name)),
        }
    }

    fn words(
        &self,
        key: &str,
        pattern: fn(&str) -> Result<Pattern, String>,
    ) -> Result<Vec<Word>, String> {
        let value = self.get(key)?;
        let wrong = || self.wrong(key, value, "a list of words");
        let list = value.as_array().filter(|list| !list.is_empty()).ok_or_else(wrong)?;
        let word = |value: &Value| pattern(value.as_str().ok_or_else(wrong)?).map(Word);
        list.iter().map(word).collect()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(name: &str, keys: &Value) -> Result<Instruction, String> {
        Instruction::parse(name, keys.as_object().unwrap())
    }

    #[test]
    fn what_is_missing_or_wrong_is_named() {
        let refused = |name: &str, keys: Value| parse(name, &keys).unwrap_err();
        let words = "length_constraints:number_words";
        assert_eq!(
            refused(words, json!({ "num_words": null })),
            format!("{words} has no num_words")
        );
        let found = refused(words, json!({ "num_words": 3, "relation": "more than" }));
        assert!(found.ends_with("relation is \"more than\" and not \"less than\" or \"at least\""));
        assert!(refused(words, json!({ "num_words": -1 })).contains("not a whole number"));
        assert!(
            refused("keywords:existence", json!({ "keywords": [] })).contains("a list of words")
        );
        assert!(refused("keywords:key_sentences", json!({})).contains("no instruction"));
        let letters = json!({ "letter": "ab", "let_frequency": 1, "let_relation": "at least" });
        assert!(refused("keywords:letter_frequency", letters).contains("one letter"));
    }

    #[test]
    fn numbers_of_tables_are_whole_numbers() {
        let bullets = json!({ "num_bullets": 3.0, "language": null });
        let bullets = parse("detectable_format:number_bullet_lists", &bullets).unwrap();
        assert!(matches!(bullets, Instruction::Bullets(3)));
    }
}
