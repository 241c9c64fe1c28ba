//! Questions with given answers, of which a model chooses the likeliest.
//!
//! Each answer's log-likelihood behind its question is the sum over its tokens. `acc` is the share of questions
//! whose right answer is the likeliest, the first one of a tie; `acc_norm` divides log-likelihoods by the answers'
//! letters first. Numbers are those of lm-evaluation-harness on the same rows: its prompts, its way to cut
//! question and answer into tokens, and its rules for beginnings and for contexts that are too long.

mod benchmark;
mod fields;
mod group;
mod numbers;

use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use self::benchmark::Question;
use self::fields::Fields;
use self::numbers::Answered;
use super::files::{DATA, Source};
use super::kind::{Bench, Material, Number, Prepared, Refused, Score, Task};
use super::likelihood::{Request, log_likelihoods};
use crate::data::{Paths, Tokenizer, read_rows};
use crate::error::{Error, Result};
use crate::model::{Forward, ModelConfig};

pub use self::benchmark::Benchmark;

/// The key of the examples.
const EXAMPLES: &str = "examples";

/// `task.choice = { ... }`.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ChoiceConfig {
    /// Which prompts and answers.
    pub benchmark: Benchmark,
    /// Rows: files, or a folder of them. Of MMLU a file's name says the subject where no column does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<Paths>,
    /// Rows whose first ones, of MMLU those of the subject, stand before each question with their answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub examples: Option<Paths>,
    /// How many of them; 5 for MMLU, else none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shots: Option<usize>,
    /// Use only this many rows, of MMLU this many of each subject; the first ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<usize>,
    /// Whether a text is opened by the special tokens that the tokenizer puts there; default: as it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bos: Option<bool>,
    /// Tokens of a question with its answer, beyond which examples and question lose their beginning; default
    /// the model's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context: Option<usize>,
}

impl ChoiceConfig {
    fn shots(&self) -> usize {
        self.shots.unwrap_or(self.benchmark.shots())
    }

    /// The questions of a file's rows.
    fn questions(&self, path: &Path) -> Result<Vec<Question>> {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let rows = read_rows(path, self.benchmark.columns())?;
        let question = |row: &crate::data::Row| {
            self.benchmark.question(&Fields(&row.fields), name).map_err(|wrong| {
                Error::preflight(wrong.to_string()).at(path.display()).at(&row.place).fix(format!(
                    "rows of {}: docs/evaluation.md has their columns",
                    self.benchmark.name()
                ))
            })
        };
        rows.iter().map(question).collect()
    }

    fn context(&self, model: &ModelConfig) -> Result<usize> {
        let context = self.context.unwrap_or(model.max_positions);
        if context < 2 || context > model.max_positions {
            let most = model.max_positions;
            return Err(Error::usage(format!(
                "context = {context} is not between 2 and the model's {most}"
            ))
            .at("context")
            .fix(format!("context = {most}")));
        }
        Ok(context)
    }
}

impl Task for ChoiceConfig {
    fn numbers(&self) -> &'static [Number] {
        const {
            &[
                Number { name: "acc", tag: "eval/acc" },
                Number { name: "acc_stderr", tag: "eval/acc_stderr" },
                Number { name: "acc_norm", tag: "eval/acc_norm" },
                Number { name: "acc_norm_stderr", tag: "eval/acc_norm_stderr" },
                Number { name: "flipped", tag: "eval/flipped" },
                Number { name: "humanities", tag: "eval/humanities" },
                Number { name: "humanities_stderr", tag: "eval/humanities_stderr" },
                Number { name: "social_sciences", tag: "eval/social_sciences" },
                Number { name: "social_sciences_stderr", tag: "eval/social_sciences_stderr" },
                Number { name: "stem", tag: "eval/stem" },
                Number { name: "stem_stderr", tag: "eval/stem_stderr" },
                Number { name: "other", tag: "eval/other" },
                Number { name: "other_stderr", tag: "eval/other_stderr" },
            ]
        }
    }

    fn source(&self) -> Source<'_> {
        Source::Rows(vec![(DATA, self.data.as_ref()), (EXAMPLES, self.examples.as_ref())])
    }

    fn check(&self) -> Result<(), Refused> {
        let refused = |key, what: &str, fix: &str| {
            Err(Refused { key, error: Error::usage(what).fix(fix.to_owned()) })
        };
        if self.limit == Some(0) {
            return refused("limit", "limit = 0 measures nothing", "limit = 1");
        }
        if self.shots() > 0 && self.examples.is_none() {
            let what = format!(
                "{} examples stand before each question, and no rows for them are named",
                self.shots()
            );
            return refused(EXAMPLES, &what, "examples = a file or a folder of rows, or shots = 0");
        }
        if self.data.is_none() {
            let what = format!(
                "{} is measured on rows, and no file of them is named",
                self.benchmark.name()
            );
            return refused(DATA, &what, "data = a file or a folder of rows");
        }
        Ok(())
    }

    fn read(&mut self, data: &Paths) {
        self.data.get_or_insert_with(|| data.clone());
    }

    fn limit(&mut self, rows: usize) {
        self.limit.get_or_insert(rows);
    }

    fn prepare<'a>(&'a self, material: &Material<'a>) -> Result<Box<dyn Prepared + 'a>> {
        let tokenizer = material.tokenizer()?;
        let context = self.context(material.config)?;
        let read = |key: &str| -> Result<Vec<Question>> {
            let files = material.files(key)?.iter().map(|path| self.questions(path));
            Ok(files.collect::<Result<Vec<_>>>()?.concat())
        };
        let mut questions = read(DATA)?;
        if let Some(limit) = self.limit {
            first_of_each_subject(&mut questions, limit);
        }
        let shots = self.shots();
        let pool = if shots > 0 { read(EXAMPLES)? } else { Vec::new() };
        // An example that is the question itself would tell its answer.
        let same = self.examples == self.data;
        let mut texts = Vec::new();
        for question in &questions {
            let own = pool.iter().filter(|example| example.subject == question.subject);
            let own = own.filter(|example| !same || *example != question);
            let examples: Vec<String> = own.take(shots).map(Question::example).collect();
            if examples.len() < shots {
                let found = examples.len();
                let of = match &question.subject[..] {
                    "" => String::new(),
                    subject => format!(" of {subject}"),
                };
                return Err(Error::preflight(format!(
                    "there are {found} examples{of}, and shots = {shots}"
                ))
                .at(EXAMPLES)
                .fix(format!("shots = {found}, or more rows")));
            }
            texts.push(self.benchmark.head(question) + &examples.concat());
        }
        Ok(Box::new(Questions { task: self, list: questions, before: texts, tokenizer, context }))
    }

    /// `flipped`: the share of questions with another answer, right or wrong.
    fn compare(&self, score: &mut Score, reference: &[Value]) {
        let rows = score.samples.len();
        if rows == 0 || rows != reference.len() {
            return;
        }
        let pairs = score.samples.iter().zip(reference);
        let flipped = pairs.filter(|(ours, theirs)| ours["answer"] != theirs["answer"]).count();
        score.numbers.push(("flipped".to_owned(), flipped as f64 / rows as f64));
    }

    fn result(&self, score: &Score) -> String {
        let of = |name: &str| score.number(name);
        let number = |name: &str| {
            let error =
                of(&format!("{name}_stderr")).map_or(String::new(), |e| format!(" ± {e:.4}"));
            of(name).map(|value| format!("{name} {value:.4}{error}"))
        };
        let rows = score.protocol.get("rows").and_then(Value::as_u64).unwrap_or(0);
        let mut first: Vec<String> = ["acc", "acc_norm"].into_iter().filter_map(number).collect();
        first.extend(of("flipped").map(|share| format!("flipped {share:.4}")));
        let mut lines =
            vec![format!("{}   {} over {rows} rows", self.benchmark.name(), first.join("   "))];
        let groups = group::GROUPS.iter().filter_map(|(name, _)| {
            let error =
                of(&format!("{name}_stderr")).map_or(String::new(), |e| format!(" ± {e:.4}"));
            Some(format!("  {name:<16} acc {:.4}{error}", of(name)?))
        });
        lines.extend(groups);
        lines.join("\n")
    }

    fn protocol(&self, score: &Score) -> String {
        let of = |key: &str| score.protocol.get(key).and_then(Value::as_u64).unwrap_or(0);
        let begins = match score.protocol.get("bos").and_then(Value::as_bool) {
            Some(true) => "opened by BOS",
            _ => "no BOS",
        };
        let cut = match of("cut") {
            0 => String::new(),
            cut => format!(",\n           {cut} answers whose context lost its beginning"),
        };
        format!("{}-shot, {begins}, context {}{cut}", of("shots"), of("context"))
    }

    fn marks(&self, score: &Score) -> Vec<[String; 2]> {
        let of = |key: &str| score.protocol.get(key).and_then(Value::as_u64).unwrap_or(0);
        let shots = format!("{}-shot", of("shots"));
        vec![
            [format!("{} rows", of("rows")), format!("{} rows", of("rows"))],
            [shots.clone(), shots],
        ]
    }
}

/// Of each subject in order the first `limit` questions.
fn first_of_each_subject(questions: &mut Vec<Question>, limit: usize) {
    let mut counts = std::collections::BTreeMap::<String, usize>::new();
    questions.retain(|question| {
        let count = counts.entry(question.subject.clone()).or_default();
        *count += 1;
        *count <= limit
    });
}

/// The questions of a task.
struct Questions<'a> {
    task: &'a ChoiceConfig,
    list: Vec<Question>,
    /// What stands before each: a head and examples.
    before: Vec<String>,
    tokenizer: &'a Tokenizer,
    /// Tokens of a window.
    context: usize,
}

impl Questions<'_> {
    /// The requests of all answers in order, and how many contexts were cut. An answer that melts into the
    /// context's last token has no token of its own: its log-likelihood is an empty sum.
    fn requests(&self) -> Result<(Vec<Request>, u64)> {
        let mut texts = Vec::new();
        for (question, before) in self.list.iter().zip(&self.before) {
            for (context, continuation) in question.pairs() {
                texts.push(split(format!("{before}{context}"), continuation));
            }
        }
        let opens = self.task.bos;
        let wholes: Vec<String> = texts.iter().map(|(a, b)| format!("{a}{b}")).collect();
        let wholes = self.tokenizer.encode_opened(&wholes, opens)?;
        // Answers of a question share its context.
        let mut contexts: Vec<String> = texts.into_iter().map(|(context, _)| context).collect();
        let mut kept = Vec::with_capacity(contexts.len());
        contexts.dedup_by(|next, last| {
            let same = next == last;
            kept.push(usize::from(!same));
            same
        });
        let contexts = self.tokenizer.encode_opened(&contexts, opens)?;
        let mut at = 0;
        let mut cut = 0;
        let mut requests = Vec::with_capacity(wholes.len());
        for (index, whole) in wholes.iter().enumerate() {
            // `kept` begins with the second text.
            at += if index == 0 { 0 } else { kept[index - 1] };
            // Where a token reaches over the end of the context, the context's own tokens are read.
            let context = &contexts[at];
            let continuation = whole.get(context.len()..).unwrap_or_default();
            if context.is_empty() {
                return Err(Error::preflight("nothing stands before an answer")
                    .at(format!("answer {}", index + 1))
                    .fix("rows with questions, or bos = true"));
            }
            if continuation.len() > self.context {
                let (tokens, most) = (continuation.len(), self.context);
                return Err(Error::preflight(format!(
                    "an answer has {tokens} tokens, and the context {most}"
                ))
                .fix("a larger context, or other rows"));
            }
            cut += u64::from(context.len() + continuation.len() > self.context + 1);
            requests.push(Request::new(context, continuation, self.context));
        }
        Ok((requests, cut))
    }
}

/// Context and continuation with the spaces between them in front of the latter, as words have them.
fn split(mut context: String, continuation: &str) -> (String, String) {
    let end = context.trim_end().len();
    let spaces = context.split_off(end);
    (context, spaces + continuation)
}

impl Prepared for Questions<'_> {
    fn measure(
        &self,
        bench: &Bench<'_>,
        model: &dyn Forward,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Score> {
        let (requests, cut) = self.requests()?;
        let sums = log_likelihoods(&requests, bench, model, progress)?;
        let mut sums = sums.into_iter();
        let answered: Vec<Answered> = self
            .list
            .iter()
            .map(|question| {
                let own = sums.by_ref().take(question.answers.len()).collect();
                Answered::new(question, own)
            })
            .collect();
        let benchmark = self.task.benchmark;
        let (numbers, subjects) = numbers::numbers(&self.list, &answered, benchmark.is_normed());
        let opens = self.task.bos.unwrap_or(self.tokenizer.opens());
        let mut protocol = Map::new();
        protocol.insert("benchmark".to_owned(), benchmark.name().into());
        protocol.insert("rows".to_owned(), self.list.len().into());
        protocol.insert("shots".to_owned(), self.task.shots().into());
        protocol.insert("context".to_owned(), self.context.into());
        protocol.insert("cut".to_owned(), cut.into());
        protocol.insert("bos".to_owned(), opens.into());
        protocol.extend(subjects.map(|subjects| ("subjects".to_owned(), subjects)));
        let tokens = requests.iter().map(|request| request.scored() as u64).sum();
        let samples = self.list.iter().zip(&answered).enumerate();
        let samples =
            samples.map(|(row, (question, found))| sample(row, question, found, benchmark));
        Ok(Score { numbers, tokens, protocol, samples: samples.collect() })
    }
}

fn sample(row: usize, question: &Question, found: &Answered, benchmark: Benchmark) -> Value {
    let mut sample = json!({
        "row": row,
        "right": question.right,
        "answer": found.likeliest,
        "log_likelihoods": found.log_likelihoods,
    });
    if let Some(fields) = sample.as_object_mut() {
        if benchmark.is_normed() {
            fields.insert("answer_norm".to_owned(), found.likeliest_by_length.into());
        }
        if !question.subject.is_empty() {
            fields.insert("subject".to_owned(), question.subject.clone().into());
        }
    }
    sample
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spaces_belong_to_what_follows() {
        assert_eq!(split("a b \n".into(), "c"), ("a b".into(), " \nc".into()));
        assert_eq!(split("a".into(), " c"), ("a".into(), " c".into()));
    }

    #[test]
    fn a_flip_is_another_answer_right_or_wrong() {
        let task: ChoiceConfig = serde_json::from_value(json!({"benchmark": "piqa"})).unwrap();
        let samples = |answers: &[u64]| -> Vec<Value> {
            answers.iter().map(|answer| json!({ "answer": answer })).collect()
        };
        let mut score = Score { samples: samples(&[0, 1, 2, 1]), ..Score::default() };
        task.compare(&mut score, &samples(&[0, 2, 1, 1]));
        assert_eq!(score.number("flipped"), Some(0.5));
        let mut other = Score { samples: samples(&[0]), ..Score::default() };
        task.compare(&mut other, &samples(&[]));
        assert_eq!(other.number("flipped"), None);
    }

    #[test]
    fn a_limit_is_for_each_subject() {
        let question = |subject: &str| Question { subject: subject.into(), ..Question::default() };
        let mut all = ["a", "a", "b", "a", "b"].map(question).to_vec();
        first_of_each_subject(&mut all, 1);
        assert_eq!(all, [question("a"), question("b")]);
    }
}
