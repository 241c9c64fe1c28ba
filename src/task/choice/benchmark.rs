//! The benchmarks: which columns their rows have, and how a row becomes a question with answers.
//!
//! Prompts, answers and what is compared are those of the task definitions of lm-evaluation-harness, which is
//! what published numbers are measured with.

use std::sync::LazyLock;

use regex::Regex;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::fields::{Fields, Wrong};
use super::group;
use crate::data::Columns;

/// A benchmark of questions with given answers.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Benchmark {
    /// Questions of 57 subjects with four answers, of which the letter is predicted.
    Mmlu,
    /// The easy part of ARC's questions of science.
    ArcEasy,
    /// Its hard part.
    ArcChallenge,
    /// Two ways to reach a goal.
    Piqa,
    /// Elementary science.
    Openbookqa,
    /// Yes or no, about a passage.
    Boolq,
    /// Two words for a gap; what follows it is predicted.
    Winogrande,
    /// Four endings of a text.
    Hellaswag,
}

/// A question.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(super) struct Question {
    /// Of MMLU; empty elsewhere.
    pub(super) subject: String,
    /// What stands before the continuations: one for all, or one for each.
    pub(super) contexts: Vec<String>,
    /// What is predicted: one for each answer, or one for all.
    pub(super) continuations: Vec<String>,
    /// The answers, whose lengths `acc_norm` divides by.
    pub(super) answers: Vec<String>,
    /// The right one.
    pub(super) right: usize,
}

impl Benchmark {
    /// Every benchmark.
    pub const ALL: [Self; 8] = [
        Self::Mmlu,
        Self::ArcEasy,
        Self::ArcChallenge,
        Self::Piqa,
        Self::Openbookqa,
        Self::Boolq,
        Self::Winogrande,
        Self::Hellaswag,
    ];

    /// Its name in recipes and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mmlu => "mmlu",
            Self::ArcEasy => "arc_easy",
            Self::ArcChallenge => "arc_challenge",
            Self::Piqa => "piqa",
            Self::Openbookqa => "openbookqa",
            Self::Boolq => "boolq",
            Self::Winogrande => "winogrande",
            Self::Hellaswag => "hellaswag",
        }
    }

    /// Examples before a question where nothing else is said.
    pub fn shots(self) -> usize {
        if self == Self::Mmlu { 5 } else { 0 }
    }

    /// Whether the answers' log-likelihoods are also compared by their length.
    pub(super) fn is_normed(self) -> bool {
        !matches!(self, Self::Mmlu | Self::Boolq | Self::Winogrande)
    }

    /// Of CSV files without a line of names.
    pub(super) fn columns(self) -> Columns {
        match self {
            Self::Mmlu => {
                Columns { names: &["question", "A", "B", "C", "D", "answer"], telling: "question" }
            }
            Self::ArcEasy | Self::ArcChallenge => {
                Columns { names: &["question", "choices", "answerKey"], telling: "question" }
            }
            Self::Piqa => Columns { names: &["goal", "sol1", "sol2", "label"], telling: "goal" },
            Self::Openbookqa => Columns {
                names: &["question_stem", "choices", "answerKey"],
                telling: "question_stem",
            },
            Self::Boolq => Columns { names: &["question", "passage", "label"], telling: "passage" },
            Self::Winogrande => Columns {
                names: &["sentence", "option1", "option2", "answer"],
                telling: "sentence",
            },
            Self::Hellaswag => Columns {
                names: &["activity_label", "ctx_a", "ctx_b", "endings", "label"],
                telling: "endings",
            },
        }
    }

    /// The question of a row, of a file called `file`.
    pub(super) fn question(self, fields: &Fields<'_>, file: &str) -> Result<Question, Wrong> {
        match self {
            Self::Mmlu => mmlu(fields, file),
            Self::ArcEasy | Self::ArcChallenge => arc(fields),
            Self::Piqa => piqa(fields),
            Self::Openbookqa => openbookqa(fields),
            Self::Boolq => boolq(fields),
            Self::Winogrande => winogrande(fields),
            Self::Hellaswag => hellaswag(fields),
        }
    }

    /// What stands before everything else.
    pub(super) fn head(self, question: &Question) -> String {
        match self {
            Self::Mmlu => {
                let subject = question.subject.replace('_', " ");
                format!(
                    "The following are multiple choice questions (with answers) about {subject}.\n\n"
                )
            }
            _ => String::new(),
        }
    }
}

impl Question {
    fn new(context: String, answers: Vec<String>, right: usize) -> Self {
        let continuations = answers.iter().map(|answer| format!(" {answer}")).collect();
        Self { contexts: vec![context], continuations, answers, right, ..Self::default() }
    }

    /// Itself and its right answer, as an example before others.
    pub(super) fn example(&self) -> String {
        let of = |all: &[String]| all.get(self.right).or_else(|| all.first()).cloned();
        let [context, continuation] =
            [&self.contexts, &self.continuations].map(|all| of(all).unwrap_or_default());
        format!("{context}{continuation}\n\n")
    }

    /// Each context with its continuation.
    pub(super) fn pairs(&self) -> impl Iterator<Item = (&str, &str)> {
        let of = |all: &[String], index: usize| if all.len() == 1 { 0 } else { index };
        (0..self.answers.len()).map(move |index| {
            let context = &self.contexts[of(&self.contexts, index)];
            (&context[..], &self.continuations[of(&self.continuations, index)][..])
        })
    }
}

fn mmlu(fields: &Fields<'_>, file: &str) -> Result<Question, Wrong> {
    let answers = if fields.has("choices") {
        fields.list("choices")?
    } else {
        let letters = ["A", "B", "C", "D"].map(|letter| fields.text(letter));
        letters.into_iter().collect::<Result<_, _>>()?
    };
    let [a, b, c, d] = &answers[..] else {
        return Err(Wrong::new(format!("the row has {} answers, expected 4", answers.len())));
    };
    let right = fields.number_or_letter("answer", 4)?;
    let subject =
        if fields.has("subject") { fields.text("subject")? } else { group::subject_of(file) };
    let question = fields.text("question")?;
    let question = question.trim();
    let context = format!("{question}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer:");
    let letters = ["A", "B", "C", "D"].map(str::to_owned).into();
    Ok(Question { subject, ..Question::new(context, letters, right) })
}

fn arc(fields: &Fields<'_>) -> Result<Question, Wrong> {
    let (question, answers, right) = fields.instruction_or("question", "Answer", || {
        let (answers, right) = fields.labelled_answers()?;
        Ok((fields.stem("question")?, answers, right))
    })?;
    Ok(Question::new(format!("Question: {question}\nAnswer:"), answers, right))
}

fn openbookqa(fields: &Fields<'_>) -> Result<Question, Wrong> {
    let (question, answers, right) = fields.instruction_or("question", "Answer", || {
        let (answers, right) = fields.labelled_answers()?;
        Ok((fields.stem("question_stem")?, answers, right))
    })?;
    Ok(Question::new(question, answers, right))
}

fn piqa(fields: &Fields<'_>) -> Result<Question, Wrong> {
    let (goal, answers, right) = fields.instruction_or("question", "Solution", || {
        let answers = vec![fields.text("sol1")?, fields.text("sol2")?];
        Ok((fields.text("goal")?, answers, fields.number("label", 2)?))
    })?;
    Ok(Question::new(format!("Question: {goal}\nAnswer:"), answers, right))
}

fn boolq(fields: &Fields<'_>) -> Result<Question, Wrong> {
    let (passage, question) = (fields.text("passage")?, fields.text("question")?);
    let right = if fields.has("label") {
        fields.number("label", 2)?
    } else {
        fields.truth("answer")?.into()
    };
    let answers = ["no", "yes"].map(str::to_owned).into();
    Ok(Question::new(format!("{passage}\nQuestion: {question}?\nAnswer:"), answers, right))
}

fn winogrande(fields: &Fields<'_>) -> Result<Question, Wrong> {
    let (sentence, options, right) = fields.instruction_or("sentence", "Option", || {
        let options = vec![fields.text("option1")?, fields.text("option2")?];
        let right = fields.counted("answer", 2)?;
        Ok((fields.text("sentence")?, options, right))
    })?;
    let Some((before, after)) = sentence.split_once('_') else {
        return Err(Wrong::new("the sentence has no gap, `_`"));
    };
    let contexts: Vec<String> = options.iter().map(|option| format!("{before}{option}")).collect();
    Ok(Question {
        answers: contexts.clone(),
        contexts,
        continuations: vec![format!(" {}", after.trim())],
        right,
        ..Question::default()
    })
}

fn hellaswag(fields: &Fields<'_>) -> Result<Question, Wrong> {
    let endings = fields.list("endings")?;
    let (first, second) = (fields.text("ctx_a")?, fields.text("ctx_b")?);
    let label = fields.text("activity_label")?;
    let context = cleaned(&format!("{label}: {first} {}", capitalized(&second)));
    let right = fields.number("label", endings.len())?;
    Ok(Question::new(context, endings.iter().map(|ending| cleaned(ending)).collect(), right))
}

/// The first letter large, all others small.
fn capitalized(text: &str) -> String {
    let mut letters = text.chars();
    let first = letters.next().into_iter().flat_map(char::to_uppercase);
    first.chain(letters.as_str().to_lowercase().chars()).collect()
}

/// Without the marks that its source left in HellaSwag.
fn cleaned(text: &str) -> String {
    static MARKS: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"\[.*?\]").ok());
    let text = text.trim().replace(" [title]", ". ");
    let text = match &*MARKS {
        Some(marks) => marks.replace_all(&text, "").into_owned(),
        None => text,
    };
    text.replace("  ", " ")
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn question(benchmark: Benchmark, row: Value) -> Result<Question, String> {
        let Value::Object(fields) = row else { panic!() };
        benchmark.question(&Fields(&fields), "anatomy_val.csv").map_err(|wrong| wrong.to_string())
    }

    fn pairs(question: &Question) -> Vec<(&str, &str)> {
        question.pairs().collect()
    }

    #[test]
    fn names_are_those_of_recipes() {
        for benchmark in Benchmark::ALL {
            assert_eq!(serde_json::to_value(benchmark).unwrap(), benchmark.name());
        }
    }

    #[test]
    fn letters_of_mmlu() {
        let row =
            json!({"question": " Which? ", "A": "w", "B": "x", "C": "y", "D": "z", "answer": "C"});
        let found = question(Benchmark::Mmlu, row).unwrap();
        let context = "Which?\nA. w\nB. x\nC. y\nD. z\nAnswer:";
        assert_eq!(pairs(&found)[2], (context, " C"));
        assert_eq!((found.right, &found.subject[..]), (2, "anatomy"));
        assert_eq!(found.example(), format!("{context} C\n\n"));
        let head = "The following are multiple choice questions (with answers) about anatomy.\n\n";
        assert_eq!(Benchmark::Mmlu.head(&found), head);
        let row = json!({"question": "Which?", "choices": ["w", "x", "y", "z"], "answer": 2,
            "subject": "us_foreign_policy"});
        let other = question(Benchmark::Mmlu, row).unwrap();
        assert_eq!((&other.contexts, other.right), (&found.contexts, 2));
        assert_eq!(other.subject, "us_foreign_policy");
    }

    #[test]
    fn answers_of_arc_go_by_their_labels() {
        let row = json!({"question": "Why?", "choices": {"text": ["a", "b"], "label": ["1", "2"]},
            "answerKey": "2"});
        let found = question(Benchmark::ArcEasy, row).unwrap();
        assert_eq!(pairs(&found)[1], ("Question: Why?\nAnswer:", " b"));
        assert_eq!(found.right, 1);
        let row = json!({"instruction": "Please choose the correct answer to the question: Why?\n\n\
            Answer1: a Answer2: b \n\nAnswer format: answer1/answer2", "answer": "answer2"});
        let adapted = question(Benchmark::ArcChallenge, row).unwrap();
        assert_eq!(adapted.answers, ["a", "b "]);
        assert_eq!((&adapted.contexts, adapted.right), (&found.contexts, 1));
        let row = json!({"question": {"stem": "Why?", "choices": [{"text": "a", "label": "A"},
            {"text": "b", "label": "B"}]}, "answerKey": "B"});
        assert_eq!(question(Benchmark::ArcEasy, row).unwrap(), found);
    }

    #[test]
    fn a_gap_is_filled_and_what_follows_is_predicted() {
        let row = json!({"sentence": "Ann saw Bea as _ came in .", "option1": "Ann", "option2": "Bea",
            "answer": "2"});
        let found = question(Benchmark::Winogrande, row).unwrap();
        let expected = [("Ann saw Bea as Ann", " came in ."), ("Ann saw Bea as Bea", " came in .")];
        assert_eq!(pairs(&found), expected);
        assert_eq!(found.example(), "Ann saw Bea as Bea came in .\n\n");
        assert_eq!(found.right, 1);
    }

    #[test]
    fn endings_are_cleaned() {
        let row = json!({"activity_label": "Roofing", "ctx_a": "A man [header] sits.", "ctx_b": "he Sees",
            "endings": [" one [title] two", "b"], "label": "1"});
        let found = question(Benchmark::Hellaswag, row).unwrap();
        assert_eq!(pairs(&found)[0], ("Roofing: A man sits. He sees", " one. two"));
        assert_eq!(found.right, 1);
    }

    #[test]
    fn yes_and_no() {
        let row = json!({"passage": "P.", "question": "is it", "answer": true});
        let found = question(Benchmark::Boolq, row).unwrap();
        assert_eq!(pairs(&found)[1], ("P.\nQuestion: is it?\nAnswer:", " yes"));
        assert_eq!(found.right, 1);
    }

    #[test]
    fn rows_without_what_is_needed_are_refused() {
        let refused = |benchmark, row| question(benchmark, row).unwrap_err();
        assert_eq!(
            refused(Benchmark::Piqa, json!({"goal": "g", "sol1": "a"})),
            "the row has no `sol2` column (found: goal, sol1)"
        );
        let row = json!({"goal": "g", "sol1": "a", "sol2": "b", "label": -1});
        assert_eq!(refused(Benchmark::Piqa, row), "the row has no answer: `label` is -1");
        let row = json!({"goal": "g", "sol1": "a", "sol2": "b", "label": 2});
        assert_eq!(refused(Benchmark::Piqa, row), "`label` is 2, and there are 2 answers, from 0");
        let row = json!({"sentence": "no gap", "option1": "a", "option2": "b", "answer": ""});
        assert_eq!(refused(Benchmark::Winogrande, row), "the row has no answer: `answer` is empty");
        let row =
            json!({"question": "q", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "B"});
        let what = "`answerKey` is B, and the answers are labelled A";
        assert_eq!(refused(Benchmark::ArcEasy, row), what);
    }
}
