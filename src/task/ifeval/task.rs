//! The task: prompts, answers, and the shares of what was followed.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::super::conversation::{self, Conversation};
use super::super::files::{DATA, Files, Source};
use super::super::kind::{Bench, Material, Number, Prepared, Refused, Score, Task, Writes};
use super::super::written::{self, Prompts, Writing, Written, mean, numbers};
use super::followed::{Followed, check};
use super::rows::{Asked, asked};
use crate::data::Paths;
use crate::error::Result;
use crate::model::Forward;

/// `task.ifeval = { ... }`.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct IfevalConfig {
    /// Rows with a `prompt`, its `instruction_id_list` and their `kwargs`: files, or a folder.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<Paths>,
    /// Use only this many rows, the first ones.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<usize>,
    /// Tokens of an answer at most.
    pub max_new_tokens: usize,
    /// Answers that are written together.
    pub batch: usize,
    /// Put the prompt into the model's chat template.
    pub chat_template: bool,
    /// With the template, what stands in the system's turn.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system: Option<String>,
}

impl Default for IfevalConfig {
    fn default() -> Self {
        Self {
            data: None,
            limit: None,
            max_new_tokens: 1280,
            batch: 16,
            chat_template: false,
            system: None,
        }
    }
}

/// The four shares, each with its error behind it.
const NAMES: [&str; 4] = [
    "prompt_level_strict_acc",
    "inst_level_strict_acc",
    "prompt_level_loose_acc",
    "inst_level_loose_acc",
];

impl Task for IfevalConfig {
    fn goes_on(&self) -> bool {
        true
    }

    fn numbers(&self) -> &'static [Number] {
        const {
            &[
                Number { name: NAMES[0], tag: "eval/ifeval_prompt_strict" },
                Number {
                    name: "prompt_level_strict_acc_stderr",
                    tag: "eval/ifeval_prompt_strict_stderr",
                },
                Number { name: NAMES[1], tag: "eval/ifeval_inst_strict" },
                Number {
                    name: "inst_level_strict_acc_stderr",
                    tag: "eval/ifeval_inst_strict_stderr",
                },
                Number { name: NAMES[2], tag: "eval/ifeval_prompt_loose" },
                Number {
                    name: "prompt_level_loose_acc_stderr",
                    tag: "eval/ifeval_prompt_loose_stderr",
                },
                Number { name: NAMES[3], tag: "eval/ifeval_inst_loose" },
                Number {
                    name: "inst_level_loose_acc_stderr",
                    tag: "eval/ifeval_inst_loose_stderr",
                },
            ]
        }
    }

    fn source(&self) -> Source<'_> {
        Source::Rows(vec![(DATA, self.data.as_ref())])
    }

    fn check(&self) -> Result<(), Refused> {
        written::check(DATA, self.data.is_some(), "ifeval")?;
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
        let rows = asked(files.of(DATA).unwrap_or_default())?.len();
        Ok(Some(written::writes(rows, self.limit, self.batch, self.max_new_tokens)))
    }

    fn prepare<'a>(&'a self, material: &Material<'a>) -> Result<Box<dyn Prepared + 'a>> {
        let writing = Writing::new(material, &[], self.max_new_tokens, self.batch)?;
        let template = conversation::template(self.chat_template, material)?;
        let mut rows = asked(material.files(DATA)?)?;
        rows.truncate(self.limit.unwrap_or(rows.len()));
        let text = |row: &Asked| {
            let (system, question) = (self.system.clone(), row.prompt.clone());
            Conversation { system, question, ..Conversation::default() }.text(template, true)
        };
        let texts: Vec<String> = rows.iter().map(text).collect::<Result<_>>()?;
        let prompts = writing.prompts(&texts, material.config.max_positions)?;
        Ok(Box::new(Ready { task: self, rows, prompts, writing }))
    }

    fn result(&self, score: &Score) -> String {
        let count = |key: &str| written::counted(score, key);
        let number = |name: &str| written::number_text(score, name);
        let lines: Vec<String> = NAMES
            .chunks(2)
            .map(|pair| format!("{}   {}", number(pair[0]), number(pair[1])))
            .collect();
        format!(
            "ifeval   {} over {} rows with {} instructions",
            lines.join("\n         "),
            count("rows"),
            count("instructions")
        )
    }

    fn protocol(&self, score: &Score) -> String {
        written::protocol_text(score)
    }

    fn marks(&self, score: &Score) -> Vec<[String; 2]> {
        written::marks(score)
    }
}

/// Prompts with their instructions.
struct Ready<'a> {
    task: &'a IfevalConfig,
    rows: Vec<Asked>,
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
        let followed: Vec<Followed> = self
            .rows
            .iter()
            .zip(&answers)
            .map(|(row, answer)| check(&row.instructions, &answer.text))
            .collect();
        let mut found = Vec::new();
        for (names, kind) in NAMES.chunks(2).zip([strict, loose]) {
            let rows: Vec<&[bool]> = followed.iter().map(kind).collect();
            found.extend(numbers(names[0], of_prompts(&rows)));
            found.extend(numbers(names[1], of_instructions(&rows)));
        }
        let mut protocol = self.writing.protocol(&self.prompts);
        let instructions: usize = self.rows.iter().map(|row| row.instructions.len()).sum();
        protocol.insert("rows".to_owned(), self.rows.len().into());
        protocol.insert("instructions".to_owned(), instructions.into());
        protocol.insert("chat_template".to_owned(), self.task.chat_template.into());
        protocol.extend(self.task.system.clone().map(|text| ("system".to_owned(), text.into())));
        let tokens = answers.iter().map(|answer| answer.tokens as u64).sum();
        let rows = self.rows.iter().zip(&answers).zip(&followed).enumerate();
        let samples =
            rows.map(|(row, ((asked, answer), followed))| sample(row, asked, answer, followed));
        Ok(Score { numbers: found, tokens, protocol, samples: samples.collect() })
    }
}

fn strict(followed: &Followed) -> &[bool] {
    &followed.strict
}

fn loose(followed: &Followed) -> &[bool] {
    &followed.loose
}

/// The share of prompts all of whose instructions are followed.
fn of_prompts(rows: &[&[bool]]) -> (f64, Option<f64>) {
    let all = |row: &&[bool]| f64::from(u8::from(row.iter().all(|followed| *followed)));
    mean(&rows.iter().map(all).collect::<Vec<_>>())
}

/// The share of instructions that are followed. Those of one prompt stand or fall together, so the error is
/// that of a ratio of sums over prompts: its residuals, prompt by prompt.
fn of_instructions(rows: &[&[bool]]) -> (f64, Option<f64>) {
    let count: usize = rows.iter().map(|row| row.len()).sum();
    let followed = |row: &[bool]| row.iter().filter(|followed| **followed).count() as f64;
    let share = rows.iter().map(|row| followed(row)).sum::<f64>() / count.max(1) as f64;
    let residuals: f64 =
        rows.iter().map(|row| (followed(row) - share * row.len() as f64).powi(2)).sum();
    let prompts = rows.len() as f64;
    let error = || (prompts / (prompts - 1.0) * residuals).sqrt() / count as f64;
    (share, (rows.len() > 1).then(error))
}

fn sample(row: usize, asked: &Asked, answer: &Written, followed: &Followed) -> Value {
    json!({
        "row": row,
        "key": asked.key,
        "prompt": asked.prompt,
        "answer": answer.text,
        "tokens": answer.tokens,
        "ended": answer.ended.name(),
        "instructions": asked.names,
        "strict": followed.strict,
        "loose": followed.loose,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_need_all_and_instructions_count_each() {
        let rows: [&[bool]; 3] = [&[true, true], &[true, false, false], &[true]];
        let (prompts, error) = of_prompts(&rows);
        assert!((prompts - 2.0 / 3.0).abs() < 1e-12 && (error.unwrap() - 1.0 / 3.0).abs() < 1e-12);
        let (instructions, error) = of_instructions(&rows);
        assert!((instructions - 4.0 / 6.0).abs() < 1e-12);
        // Residuals 2/3, -1 and 1/3: sqrt(3/2 * 14/9) / 6.
        assert!((error.unwrap() - (7.0_f64 / 3.0).sqrt() / 6.0).abs() < 1e-12);
        assert_eq!(of_instructions(&rows[..1]), (1.0, None));
    }
}
