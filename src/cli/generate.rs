//! `fewbit generate`: texts continued, one as it comes or several together.

use clap::Args;
use serde_json::json;

use super::dialogue::{Dialogue, TemplateArgs};
use super::kv::{self, KvArgs};
use super::sampling::SamplingArgs;
use super::{AdaptedArgs, Session, output};
use crate::data::{Answer, ChatTemplate, Tokenizer};
use crate::error::{Error, Result};
use crate::model::{CausalLm, Ended, Generation, KvHeld, Memory, Prompt, Sampler};
use crate::stop::StopFlag;

/// Tokens of a text, unless it is said how many.
const TEXT: usize = 128;
/// Tokens of an answer.
pub(super) const ANSWER: usize = 512;

/// Arguments of `generate`.
#[derive(Args, Debug)]
pub(super) struct GenerateArgs {
    #[command(flatten)]
    source: AdaptedArgs,
    /// The text to continue; several are continued together
    #[arg(long, required = true)]
    prompt: Vec<String>,
    /// Say the prompt to the model in the words of its chat template, and show its answer alone
    #[arg(long)]
    chat: bool,
    #[command(flatten)]
    template: TemplateArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    kv: KvArgs,
    /// One JSON object for each prompt: prompt, text, tokens, and why it ended
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &GenerateArgs, stop: &StopFlag) -> Result<()> {
    let session = args.source.open()?;
    let tokenizer = session.tokenizer()?;
    let ends = session.opened.generation()?.ends;
    let sampler = args.sampling.sampler(Sampler::default());
    let chat = args.chat || args.template.are_given();
    let max_new = args.sampling.max_new_tokens.unwrap_or(if chat { ANSWER } else { TEXT });
    let stops = &args.sampling.stop;
    let writer = Writer { session: &session, tokenizer: &tokenizer, stop, ends, max_new, stops };
    let template = chat.then(|| args.template.need(&session)).transpose()?;
    let tokens = |text: &String| match &template {
        None => writer.prompt(text),
        Some(template) => writer.question(template, args.template.system.clone(), text),
    };
    let tokens = |text| tokens(text).map_err(|e| e.at("--prompt"));
    let prompts: Vec<Vec<u32>> = args.prompt.iter().map(tokens).collect::<Result<_>>()?;
    let setting = args.kv.setting(&session)?;
    let model = session.load()?.with_kv(setting);
    if let ([prompt], false) = (&prompts[..], args.json) {
        let given = if chat { "" } else { &args.prompt[0] };
        let mut memory = Memory::default();
        writer.go_on(&model, &mut memory, (prompt, given), sampler)?;
        if let Some(setting) = &setting {
            output::aside(&kv::line(setting, memory.held()));
        }
        return Ok(());
    }
    for ((text, (answer, ended, held)), index) in
        args.prompt.iter().zip(writer.together(&model, &prompts, sampler)?).zip(0..)
    {
        if args.json {
            let mut found = json!({
                "prompt": text,
                "text": answer.text(),
                "tokens": answer.tokens().len(),
                "ended": ended.name(),
            });
            if let (Some(found), Some(setting), Some(held)) =
                (found.as_object_mut(), &setting, held)
            {
                found.extend(kv::object(setting, held, model.config.head_dim));
            }
            output::json(&found)?;
        } else {
            let between = if index > 0 { "\n" } else { "" };
            let given = if chat { "" } else { text };
            output::line(&format!("{between}{given}{}", answer.text()))?;
        }
    }
    Ok(())
}

/// Continues prompts on stdout.
pub(super) struct Writer<'a> {
    /// The opened model.
    pub(super) session: &'a Session,
    /// Its tokenizer.
    pub(super) tokenizer: &'a Tokenizer,
    /// Asked at every token.
    pub(super) stop: &'a StopFlag,
    /// Tokens that end a text.
    pub(super) ends: Vec<u32>,
    /// Tokens that are written at most.
    pub(super) max_new: usize,
    /// Texts that end one.
    pub(super) stops: &'a [String],
}

impl Writer<'_> {
    /// The tokens of `text`, behind the token that opens a text.
    ///
    /// # Errors
    /// A usage error when there are none, or too many to add one.
    pub(super) fn prompt(&self, text: &str) -> Result<Vec<u32>> {
        let mut tokens: Vec<u32> = self.session.bos(self.tokenizer)?.into_iter().collect();
        tokens.extend(self.tokenizer.encode(text)?);
        self.fitting(tokens)
    }

    /// The tokens of a question in the words of a chat template.
    ///
    /// # Errors
    /// As [`Writer::prompt`], and what the template says.
    pub(super) fn question(
        &self,
        template: &ChatTemplate,
        system: Option<String>,
        text: &str,
    ) -> Result<Vec<u32>> {
        let mut dialogue = Dialogue::new(template.clone(), system);
        dialogue.ask(text);
        // The template opens the text itself.
        self.fitting(self.tokenizer.encode(&dialogue.text()?)?)
    }

    /// Tokens that the model's context has room behind.
    ///
    /// # Errors
    /// As [`Writer::prompt`].
    pub(super) fn fitting(&self, tokens: Vec<u32>) -> Result<Vec<u32>> {
        let (count, limit) = (tokens.len(), self.session.opened.config.max_positions);
        if count == 0 || count >= limit {
            let what = format!("the prompt has {count} tokens, and the model's context {limit}");
            return Err(Error::usage(what).fix("a prompt of another length"));
        }
        Ok(tokens)
    }

    fn generation<'m>(&'m self, model: &'m CausalLm, sampler: Sampler) -> Generation<'m> {
        let device = &self.session.device.device;
        Generation { model, device, sampler, max_new: self.max_new, ends: &self.ends }
    }

    /// Prints the continuation of a prompt as it comes, behind a text that is there already, and gives it.
    ///
    /// # Errors
    /// When a signal came, or stdout cannot be written.
    pub(super) fn go_on(
        &self,
        model: &CausalLm,
        memory: &mut Memory,
        (prompt, given): (&[u32], &str),
        sampler: Sampler,
    ) -> Result<(String, Ended)> {
        let mut answer = Answer::new(self.tokenizer, prompt, self.stops);
        // Nothing is shown before the model has said something.
        let (mut shown, mut given) = (0, given);
        let mut show = |text: &str| {
            let new = text.get(shown..).unwrap_or_default();
            shown = text.len().max(shown);
            output::print(&format!("{}{new}", std::mem::take(&mut given)))
        };
        let mut each = |token: u32| {
            self.stop.check()?;
            let more = answer.push(token)?;
            show(answer.settled())?;
            Ok(more && !output::is_closed())
        };
        let row = Prompt { tokens: prompt, stream: 0 };
        let ended = self.generation(model, sampler).one(memory, row, &mut each);
        let ended = ended.map_err(|e| e.at(self.session.opened.dir.display()))?;
        answer.finish()?;
        show(answer.text())?;
        output::line("")?;
        Ok((answer.text().to_owned(), ended))
    }

    /// The continuations of several prompts, and where they are continued one after the other what their keys and
    /// values took.
    ///
    /// # Errors
    /// When a signal came.
    pub(super) fn together(
        &self,
        model: &CausalLm,
        prompts: &[Vec<u32>],
        sampler: Sampler,
    ) -> Result<Vec<(Answer<'_>, Ended, Option<KvHeld>)>> {
        let mut answers: Vec<Answer<'_>> =
            prompts.iter().map(|prompt| Answer::new(self.tokenizer, prompt, self.stops)).collect();
        let rows: Vec<Prompt<'_>> =
            prompts.iter().zip(0..).map(|(tokens, stream)| Prompt { tokens, stream }).collect();
        let generation = self.generation(model, sampler);
        let ended: Result<Vec<(Ended, Option<KvHeld>)>> = if model.kv.is_some() {
            let alone = rows.iter().zip(&mut answers).map(|(row, answer)| {
                let mut memory = Memory::default();
                let ended = generation.one(&mut memory, *row, &mut |token| {
                    self.stop.check()?;
                    answer.push(token)
                })?;
                Ok((ended, Some(memory.held())))
            });
            alone.collect()
        } else {
            let ended = generation.batch(&rows, &mut |row, token| {
                self.stop.check()?;
                answers[row].push(token)
            });
            ended.map(|all| all.into_iter().map(|ended| (ended, None)).collect())
        };
        let ended = ended.map_err(|e| e.at(self.session.opened.dir.display()))?;
        answers.iter_mut().try_for_each(Answer::finish)?;
        let all = answers.into_iter().zip(ended);
        Ok(all.map(|(answer, (ended, held))| (answer, ended, held)).collect())
    }
}
