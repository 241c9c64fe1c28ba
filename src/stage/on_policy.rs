//! On-policy distillation: the student goes on from prompts of the training text, and is compared with its
//! teacher on what it wrote itself (GKD, arXiv 2306.13649).
//!
//! What it wrote is kept in the stage's folder, a file for each step at which it wrote: a resumed run goes
//! on with it.

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::cost::{Cost, Scene};
use super::keys::Keys;
use crate::data::{TokenStream, seed_of};
use crate::error::{Error, Result};
use crate::model::{CausalLm, Ended, Generation, Prompt, Sampler};
use crate::objective::ObjectiveConfig;
use crate::stop::StopFlag;
use crate::store::folder::write_atomic;

/// Tokens of a plain text that make a prompt, unless `prompt_tokens` says how many.
const PROMPT_TOKENS: usize = 32;
/// Texts that are written together.
const TOGETHER: usize = 16;

/// Keys of `on_policy = { ... }` of a stage that distils.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct OnPolicy {
    /// The share of each micro-batch that the student writes itself; 0.5.
    pub share: f64,
    /// Steps between one writing and the next; 10. Longer is cheaper, as more texts are written
    /// together, and they are further from what the student would write by now.
    pub every: u64,
    /// Tokens that it writes at most; 64.
    pub max_new_tokens: usize,
    /// At which temperature; 1.
    pub temperature: f64,
    /// From the smallest set of tokens that reaches this probability; 1.
    pub top_p: f64,
    /// Tokens at the beginning of a window of plain text that make its prompt; 32, at most half a
    /// window. Examples have prompts of their own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_tokens: Option<usize>,
    /// What student and teacher are compared by there; the stage's own objective unless said otherwise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub objective: Option<ObjectiveConfig>,
}

impl Default for OnPolicy {
    fn default() -> Self {
        Self {
            share: 0.5,
            every: 10,
            max_new_tokens: 64,
            temperature: 1.0,
            top_p: 1.0,
            prompt_tokens: None,
            objective: None,
        }
    }
}

impl OnPolicy {
    /// Refuses what writes nothing.
    ///
    /// # Errors
    /// A usage error that names the key.
    pub(super) fn check(&self, batch: usize, objective: &ObjectiveConfig) -> Result<()> {
        let refused = |what: String, fix: &str| Err(Error::usage(what).at("on_policy").fix(fix));
        if !(self.share > 0.0 && self.share <= 1.0) {
            return refused(format!("share = {} is not a share", self.share), "share = 0.5");
        }
        if self.rows(batch) == 0 {
            let what = format!("share = {} of a batch of {batch} is no sequence", self.share);
            return refused(what, &format!("share = {}, or a larger batch", 1.0 / batch as f64));
        }
        for (key, value) in [("every", self.every), ("max_new_tokens", self.max_new_tokens as u64)]
        {
            if value == 0 {
                return refused(format!("{key} = 0"), &format!("{key} = 1"));
            }
        }
        if self.prompt_tokens == Some(0) {
            return refused("prompt_tokens = 0".to_owned(), "prompt_tokens = 32");
        }
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return refused(format!("temperature = {}", self.temperature), "temperature = 1.0");
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return refused(format!("top_p = {}", self.top_p), "top_p = 1.0");
        }
        let objective = self.objective.as_ref().unwrap_or(objective);
        super::keys::check_objective(objective, "on_policy")?;
        if !objective.needs_teacher() {
            return refused(
                format!("objective.{} compares with no teacher", objective.name()),
                "objective = { kl_reverse = {} }",
            );
        }
        Ok(())
    }

    /// Sequences of a micro-batch that the student writes.
    pub(super) fn rows(&self, batch: usize) -> usize {
        (self.share * batch as f64).round() as usize
    }

    /// What the writing takes.
    pub(super) fn cost(&self, scene: &Scene<'_>, keys: &Keys<'_>) -> Cost {
        let rows = (self.rows(keys.batch) * keys.accumulate) as u64 * keys.steps;
        let together = (self.every * rows / keys.steps.max(1)).clamp(1, TOGETHER as u64);
        let cost = scene.writing(rows, together, self.max_new_tokens as u64);
        // The student's weights besides, as it writes with them.
        Cost { device: 4 * scene.linears + cost.device, ..cost }
    }

    fn sampler(&self, seed: u64) -> Sampler {
        Sampler {
            temperature: self.temperature as f32,
            top_p: self.top_p as f32,
            seed,
            ..Sampler::default()
        }
    }

    /// The prompt in a window of the text; `pick` chooses among several.
    fn prompt<'t>(
        &self,
        text: &'t TokenStream,
        window: usize,
        length: usize,
        pick: u64,
    ) -> Option<&'t [u32]> {
        let tokens = text.window(window, length);
        // Of a text without a prompt of its own.
        let beginning = |start: usize, end: usize| {
            let most = self.prompt_tokens.unwrap_or(PROMPT_TOKENS).min((end - start).div_ceil(2));
            &tokens[start..start + most]
        };
        let Some(supervised) = text.supervision(window, length) else {
            return Some(beginning(0, length));
        };
        let starts = text.starts(window, length);
        // Where an answer begins, behind a prompt in the same example.
        let begins = (1..length)
            .filter(|at| supervised[*at] && !supervised[at - 1])
            .map(|at| (starts.map_or(0, |starts| starts[at] as usize), at))
            .filter(|(start, at)| start < at)
            .collect::<Vec<_>>();
        let (start, at) = *begins.get((pick % begins.len().max(1) as u64) as usize)?;
        // One token, as BOS or the first of a text in a mix, asks nothing.
        let end = (at..length).find(|end| !supervised[*end]).unwrap_or(length);
        Some(if at - start > 1 { &tokens[start..at] } else { beginning(start, end) })
    }
}

/// What the student wrote behind one prompt.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(super) struct Sample {
    /// Given.
    pub prompt: Vec<u32>,
    /// Written, the token that ended it included.
    pub answer: Vec<u32>,
}

impl Sample {
    /// Prompt and answer.
    pub(super) fn tokens(&self) -> impl Iterator<Item = u32> {
        self.prompt.iter().chain(&self.answer).copied()
    }
}

/// What the student wrote at one step, in the order in which the steps from there on use it.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(super) struct Samples {
    /// When.
    pub step: u64,
    samples: Vec<Sample>,
}

/// Who writes, from what, and how.
pub(super) struct Writing<'a> {
    /// The recipe's keys.
    pub keys: &'a OnPolicy,
    /// The student, off the tape, its weights as they are quantized now.
    pub student: &'a CausalLm,
    /// The training text.
    pub text: &'a TokenStream,
    /// Tokens of its windows.
    pub length: usize,
    /// Tokens that end a text.
    pub ends: &'a [u32],
    /// Where tensors live.
    pub device: &'a Device,
    /// Set by signals.
    pub stop: &'a StopFlag,
    /// Of the stage's draws.
    pub seed: u64,
}

impl Writing<'_> {
    /// What the student writes at `step` for `windows` of the text. `progress(done, of)` is called
    /// now and then.
    ///
    /// # Errors
    /// When its logits are no numbers, or a signal came.
    pub(super) fn write(
        &self,
        step: u64,
        windows: &[u32],
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Samples> {
        let Self { keys, student, device, .. } = self;
        let seed = seed_of(self.seed, &format!("on policy {step}"));
        let most = student.config.max_positions.saturating_sub(1);
        let prompts: Vec<Vec<u32>> = windows
            .iter()
            .zip(0u64..)
            .map(|(window, place)| {
                let pick = seed_of(seed, &format!("prompt {place}"));
                let prompt = keys.prompt(self.text, *window as usize, self.length, pick);
                // A window of one long example may hold no whole prompt.
                let prompt =
                    prompt.unwrap_or(&self.text.window(*window as usize, self.length)[..1]);
                prompt[prompt.len().saturating_sub(most)..].to_vec()
            })
            .collect();
        let how = Generation {
            model: student,
            device,
            sampler: keys.sampler(seed),
            max_new: keys.max_new_tokens,
            ends: self.ends,
        };
        // Texts of about one length are written together, which wastes no padding.
        let mut order: Vec<usize> = (0..prompts.len()).collect();
        order.sort_by_key(|index| (prompts[*index].len(), *index));
        let mut answers = vec![Vec::new(); prompts.len()];
        for (done, together) in order.chunks(TOGETHER).enumerate() {
            progress(done * TOGETHER, prompts.len());
            let rows: Vec<Prompt<'_>> = together
                .iter()
                .map(|index| Prompt { tokens: &prompts[*index], stream: *index as u64 })
                .collect();
            let ended = how.batch(&rows, &mut |row, token| {
                self.stop.check()?;
                answers[together[row]].push(token);
                Ok(true)
            })?;
            for (index, ended) in together.iter().zip(ended) {
                if let Ended::Token(token) = ended {
                    answers[*index].push(token);
                }
            }
        }
        let pairs = prompts.into_iter().zip(answers);
        let samples = pairs.map(|(prompt, answer)| Sample { prompt, answer }).collect();
        Ok(Samples { step, samples })
    }
}

impl Samples {
    /// Those for the micro-batch `part` of a step, `rows` each.
    pub(super) fn of(&self, step: u64, [part, parts]: [usize; 2], rows: usize) -> Vec<&Sample> {
        let first = ((step - self.step) as usize * parts + part) * rows;
        self.samples.iter().skip(first).take(rows).collect()
    }

    /// The step at which the texts for `step` are written.
    pub(super) fn written_at(step: u64, keys: &OnPolicy) -> u64 {
        step / keys.every * keys.every
    }

    fn file(dir: &Path, step: u64) -> PathBuf {
        dir.join(format!("samples-{step:06}.json"))
    }

    /// Keeps them in the stage's folder.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub(super) fn save(&self, dir: &Path) -> Result<()> {
        let text = serde_json::to_string(self)
            .map_err(|e| Error::failed(format!("cannot encode the student's texts: {e}")))?;
        write_atomic(&Self::file(dir, self.step), text.as_bytes())
    }

    /// Those that were kept at a step; `None` where they are gone or damaged.
    pub(super) fn read(dir: &Path, step: u64) -> Option<Self> {
        let text = std::fs::read_to_string(Self::file(dir, step)).ok()?;
        serde_json::from_str(&text).ok().filter(|samples: &Self| samples.step == step)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_end_where_answers_begin() {
        let keys = OnPolicy::default();
        let text = TokenStream { tokens: (0..200).collect(), ..TokenStream::default() };
        assert_eq!(keys.prompt(&text, 1, 100, 0).unwrap(), (100..132).collect::<Vec<_>>());
        assert_eq!(keys.prompt(&text, 0, 10, 0).unwrap().len(), 5);
        // The same text in a mix with examples.
        let supervised = Some((0..200).map(|at| at % 100 > 0).collect());
        let mixed = TokenStream { supervised, starts: Some(vec![0; 200]), ..text.clone() };
        assert_eq!(keys.prompt(&mixed, 1, 100, 0), keys.prompt(&text, 1, 100, 0));
        let supervised = [0, 0, 1, 1, 0, 1, 0, 0, 0, 1].map(|flag| flag == 1).to_vec();
        let packed = TokenStream {
            tokens: (0..10).collect(),
            supervised: Some(supervised),
            packed: Some(10),
            starts: Some(vec![0, 0, 0, 0, 0, 0, 6, 6, 6, 6]),
            ..TokenStream::default()
        };
        // A second turn has the first before it, another example has not.
        for (pick, prompt) in
            [(0, &[0, 1][..]), (1, &[0, 1, 2, 3, 4]), (2, &[6, 7, 8]), (3, &[0, 1])]
        {
            assert_eq!(keys.prompt(&packed, 0, 10, pick).unwrap(), prompt);
        }
    }

    #[test]
    fn each_step_has_samples_of_its_own() {
        let sample = |i: u32| Sample { prompt: vec![i], answer: vec![i, i] };
        let samples = Samples { step: 20, samples: (0..12).map(sample).collect() };
        let firsts = |step, part| -> Vec<u32> {
            samples.of(step, [part, 2], 2).iter().map(|sample| sample.prompt[0]).collect()
        };
        assert_eq!(
            (firsts(20, 0), firsts(20, 1), firsts(22, 1)),
            (vec![0, 1], vec![2, 3], vec![10, 11])
        );
        let folder = tempfile::tempdir().unwrap();
        samples.save(folder.path()).unwrap();
        assert_eq!(Samples::read(folder.path(), 20), Some(samples));
        assert_eq!(Samples::read(folder.path(), 10), None);
    }

    #[test]
    fn what_writes_nothing_is_refused() {
        let jsd = ObjectiveConfig::Jsd(crate::objective::JsdObjective::default());
        let check = |change: &dyn Fn(&mut OnPolicy)| {
            let mut keys = OnPolicy::default();
            change(&mut keys);
            keys.check(4, &jsd).map_err(|error| {
                assert_eq!(error.kind().exit_code(), 2);
                error.what().to_owned()
            })
        };
        assert!(check(&|_| ()).is_ok());
        let error = check(&|keys| keys.share = 0.1).unwrap_err();
        assert_eq!(error, "share = 0.1 of a batch of 4 is no sequence");
        for change in [
            (|keys| keys.share = 1.5) as fn(&mut OnPolicy),
            |keys| keys.every = 0,
            |keys| keys.max_new_tokens = 0,
            |keys| keys.temperature = f64::NAN,
            |keys| keys.top_p = 0.0,
            |keys| keys.prompt_tokens = Some(0),
            |keys| {
                let none = crate::objective::CrossEntropyObjective {};
                keys.objective = Some(ObjectiveConfig::CrossEntropy(none));
            },
        ] {
            assert!(check(&change).is_err());
        }
    }
}
