//! GSM8K ("Training Verifiers to Solve Math Word Problems", Cobbe et al. 2021, arXiv:2110.14168):
//! word problems whose answer ends in a number.
//!
//! Prompts, examples and numbers are those of lm-evaluation-harness, task `gsm8k`, version 3.0.

mod prompt;
pub mod score;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use self::prompt::{Problem, Shots, conversations, problems};
use super::conversation;
use super::files::{DATA, Files, Source};
use super::kind::{Bench, Material, Number, Prepared, Refused, Score, Task, Writes};
use super::written::{self, Prompts, Writing, Written, mean, numbers};
use crate::data::Paths;
use crate::error::Result;
use crate::model::Forward;

/// The key of the examples.
const EXAMPLES: &str = "examples";
/// What ends an answer: the next question, or what some models write there.
const STOPS: [&str; 3] = ["Question:", "</s>", "<|im_end|>"];
const STRICT: &str = "strict_match";
const FLEXIBLE: &str = "flexible_extract";

/// `task.gsm8k = { ... }`.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Gsm8kConfig {
    /// Rows with a `question` and an `answer` that ends with `#### ` and a number: files, or a folder.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<Paths>,
    /// Rows of which some, drawn anew for each question, stand before it with their answers; default the
    /// other rows of `data`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub examples: Option<Paths>,
    /// How many of them.
    pub shots: usize,
    /// Seed of those draws, which are Python's.
    pub seed: u32,
    /// Use only this many rows, the first ones.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<usize>,
    /// Tokens of an answer at most.
    pub max_new_tokens: usize,
    /// Answers that are written together.
    pub batch: usize,
    /// Put the prompt into the model's chat template, examples as turns of a conversation.
    pub chat_template: bool,
    /// With the template, the examples as turns of their own and not in one turn with the question.
    pub multiturn: bool,
    /// With the template, what stands in the system's turn.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system: Option<String>,
}

impl Default for Gsm8kConfig {
    fn default() -> Self {
        Self {
            data: None,
            examples: None,
            shots: 5,
            seed: 1234,
            limit: None,
            max_new_tokens: 256,
            batch: 16,
            chat_template: false,
            multiturn: true,
            system: None,
        }
    }
}

impl Task for Gsm8kConfig {
    fn goes_on(&self) -> bool {
        true
    }

    fn numbers(&self) -> &'static [Number] {
        const {
            &[
                Number { name: STRICT, tag: "eval/gsm8k_strict_match" },
                Number { name: "strict_match_stderr", tag: "eval/gsm8k_strict_match_stderr" },
                Number { name: FLEXIBLE, tag: "eval/gsm8k_flexible_extract" },
                Number {
                    name: "flexible_extract_stderr",
                    tag: "eval/gsm8k_flexible_extract_stderr",
                },
            ]
        }
    }

    fn source(&self) -> Source<'_> {
        Source::Rows(vec![(DATA, self.data.as_ref()), (EXAMPLES, self.examples.as_ref())])
    }

    fn check(&self) -> Result<(), Refused> {
        written::check(DATA, self.data.is_some(), "gsm8k")?;
        written::check_counts(self.limit, self.max_new_tokens, self.batch)?;
        conversation::check(self.chat_template, self.system.as_deref())
    }

    fn read(&mut self, data: &Paths) {
        self.data.get_or_insert_with(|| data.clone());
    }

    fn limit(&mut self, rows: usize) {
        self.limit.get_or_insert(rows);
    }

    fn writes(&self, files: &Files) -> Result<Option<Writes>> {
        let rows = problems(files.of(DATA).unwrap_or_default())?.len();
        Ok(Some(written::writes(rows, self.limit, self.batch, self.max_new_tokens)))
    }

    fn prepare<'a>(&'a self, material: &Material<'a>) -> Result<Box<dyn Prepared + 'a>> {
        let writing = Writing::new(material, &STOPS, self.max_new_tokens, self.batch)?;
        let template = conversation::template(self.chat_template, material)?;
        let mut all = problems(material.files(DATA)?)?;
        let examples = match (&self.examples, self.shots) {
            (Some(_), 1..) => Some(problems(material.files(EXAMPLES)?)?),
            _ => None,
        };
        let shots = Shots { count: self.shots, seed: self.seed };
        let limit = self.limit.unwrap_or(all.len());
        let mut asked = conversations(&all, examples.as_deref(), shots, limit)?;
        all.truncate(asked.len());
        for asked in &mut asked {
            asked.system.clone_from(&self.system);
        }
        let texts = asked.iter().map(|asked| asked.text(template, self.multiturn));
        let texts: Vec<String> = texts.collect::<Result<_>>()?;
        let prompts = writing.prompts(&texts, material.config.max_positions)?;
        Ok(Box::new(Ready { task: self, rows: all, texts, prompts, writing }))
    }

    fn result(&self, score: &Score) -> String {
        let rows = written::counted(score, "rows");
        let number = |name: &str| written::number_text(score, name);
        format!("gsm8k   {}   {} over {rows} rows", number(STRICT), number(FLEXIBLE))
    }

    fn protocol(&self, score: &Score) -> String {
        let shots = match written::counted(score, "shots") {
            0 => "0-shot".to_owned(),
            shots => format!("{shots}-shot drawn with seed {}", written::counted(score, "seed")),
        };
        format!("{shots}, {}", written::protocol_text(score))
    }

    fn marks(&self, score: &Score) -> Vec<[String; 2]> {
        let shots = format!("{}-shot", written::counted(score, "shots"));
        let mut marks = written::marks(score);
        marks.insert(1, [shots.clone(), shots]);
        marks
    }
}

/// Problems with their prompts.
struct Ready<'a> {
    task: &'a Gsm8kConfig,
    rows: Vec<Problem>,
    texts: Vec<String>,
    prompts: Prompts,
    writing: Writing<'a>,
}

impl Prepared for Ready<'_> {
    fn measure(
        &self,
        bench: &Bench<'_>,
        model: &dyn Forward,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Score> {
        let answers = self.writing.write(&self.prompts, bench, model, progress)?;
        let rows = self.rows.iter().zip(&self.texts).zip(&answers).enumerate();
        let rows =
            rows.map(|(row, ((problem, text), answer))| Answered::new(row, problem, text, answer));
        let rows: Vec<Answered> = rows.collect();
        let share = |right: fn(&Answered) -> bool| {
            mean(&rows.iter().map(|row| f64::from(u8::from(right(row)))).collect::<Vec<_>>())
        };
        let mut found = numbers(STRICT, share(|row| row.strict));
        found.extend(numbers(FLEXIBLE, share(|row| row.flexible)));
        let mut protocol = self.writing.protocol(&self.prompts);
        protocol.insert("rows".to_owned(), rows.len().into());
        protocol.insert("shots".to_owned(), self.task.shots.into());
        protocol.insert("seed".to_owned(), self.task.seed.into());
        protocol.insert("chat_template".to_owned(), self.task.chat_template.into());
        if self.task.chat_template {
            protocol.insert("multiturn".to_owned(), self.task.multiturn.into());
            protocol
                .extend(self.task.system.clone().map(|text| ("system".to_owned(), text.into())));
        }
        let tokens = answers.iter().map(|answer| answer.tokens as u64).sum();
        let samples = rows.into_iter().map(|row| row.sample).collect();
        Ok(Score { numbers: found, tokens, protocol, samples })
    }
}

/// A problem with what became of it.
struct Answered {
    strict: bool,
    flexible: bool,
    sample: Value,
}

impl Answered {
    fn new(row: usize, problem: &Problem, prompt: &str, answer: &Written) -> Self {
        let found = [score::strict(&answer.text), score::flexible(&answer.text)];
        let [strict, flexible] = found.map(|number| score::is_right(number, &problem.answer));
        let sample = json!({
            "row": row,
            "question": problem.question,
            "target": problem.answer,
            "prompt": prompt,
            "answer": answer.text,
            "tokens": answer.tokens,
            "ended": answer.ended.name(),
            "strict": found[0],
            "flexible": found[1],
            STRICT: strict,
            FLEXIBLE: flexible,
        });
        Self { strict, flexible, sample }
    }
}
