//! `fewbit data generate`: training text in the words of a model, usually the teacher: answers to prompts
//! (BitDistiller, QAD), or free text from the token that opens a text (LLM-QAT, arXiv 2305.17888).
//!
//! Lines are appended a batch at a time, and the settings lie beside them: the same command goes on where it
//! was interrupted, and gives the bytes of one that was not.

use std::io::Write;
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Map, Value, json};

use crate::cli::dialogue::TemplateArgs;
use crate::cli::sampling::SamplingArgs;
use crate::cli::{AdaptedArgs, Session, output};
use crate::data::chat::{Chat, ChatTemplate};
use crate::data::{Answer, Asked, Tokenizer, read_prompts, sha256_of};
use crate::error::{Error, Result};
use crate::model::{Ended, Generation, Prompt, Sampler};
use crate::report::terminal::Terminal;
use crate::report::{Event, Reporter};
use crate::run::model_sha256;
use crate::stop::StopFlag;
use crate::store::folder::write_atomic;
use crate::store::locate;

/// Arguments of `data generate`.
#[derive(Args, Debug)]
pub(in crate::cli) struct GenerateArgs {
    #[command(flatten)]
    source: AdaptedArgs,
    /// Prompts to answer: JSONL or a JSON list of objects with "messages", "conversations",
    /// "instruction" or "prompt" (an answer that is there is left out), or plain text, a prompt a line
    #[arg(long, value_name = "FILE", required_unless_present = "free", conflicts_with = "free")]
    prompts: Option<String>,
    /// Write this many texts from the token that opens a text
    #[arg(long, value_name = "N")]
    free: Option<usize>,
    /// The JSONL file that is written
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Answers to each prompt
    #[arg(long, value_name = "N", default_value_t = 1)]
    per_prompt: usize,
    /// Use only this many prompts, the first ones
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Texts that are written together
    #[arg(long, value_name = "N", default_value_t = 16)]
    batch: usize,
    /// Continue prompts as plain text, without the model's chat template
    #[arg(long, conflicts_with_all = ["system", "chat_template_kwargs"])]
    plain: bool,
    #[command(flatten)]
    template: TemplateArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Start over where the file holds what other settings gave
    #[arg(long)]
    fresh: bool,
}

/// Tokens of a text, unless it is said how many.
const TEXT: usize = 512;

/// One text to be written.
struct Job {
    tokens: Vec<u32>,
    /// What the line holds beside what is written.
    given: Given,
}

/// What stands before a text in its line.
enum Given {
    /// Nothing.
    Free,
    /// A plain prompt.
    Prompt(String),
    /// A conversation up to the answer.
    Messages(Map<String, Value>),
}

pub(in crate::cli) fn run(args: &GenerateArgs, stop: &StopFlag) -> Result<()> {
    locate::output_file(&args.out)?;
    if args.batch == 0 || args.per_prompt == 0 {
        return Err(Error::usage("nothing is written together, or for each prompt")
            .fix("--batch 16 --per-prompt 1"));
    }
    let session = args.source.open()?;
    let tokenizer = session.tokenizer()?;
    let generation = session.opened.generation()?;
    let template = match &args.template {
        _ if args.plain || args.free.is_some() => None,
        names if names.are_given() => Some(names.need(&session)?),
        names => names.template(&session)?,
    };
    let base = Sampler { temperature: 1.0, ..Sampler::default() };
    let sampler = args.sampling.sampler(base);
    let jobs = args.jobs(&session, &tokenizer, template.as_ref(), &generation.ends)?;
    let settings = args.settings(&session, sampler, jobs.len(), stop)?;
    let done = begun(args, &settings, jobs.len())?;
    let mut screen = Terminal::new();
    if done == jobs.len() {
        output::aside(&format!("{} has all {done} texts\n", args.out.display()));
        return Ok(());
    }
    let model = session.load()?;
    let writer = Writer {
        session: &session,
        tokenizer: &tokenizer,
        stops: &args.sampling.stop,
        how: Generation {
            model: &model,
            device: &session.device.device,
            sampler,
            max_new: args.sampling.max_new_tokens.unwrap_or(TEXT),
            ends: &generation.ends,
        },
        stop,
    };
    let mut file = std::fs::OpenOptions::new().append(true).open(&args.out);
    let file = file.as_mut().map_err(|e| Error::io("open", &args.out, e))?;
    let mut tokens = 0;
    for (batch, jobs_of) in jobs[done..].chunks(args.batch).enumerate() {
        let first = done + batch * args.batch;
        stop.check()?;
        let (lines, count) = writer.lines(first, jobs_of)?;
        file.write_all(lines.as_bytes())
            .and_then(|()| file.sync_data())
            .map_err(|e| Error::io("write", &args.out, &e))?;
        tokens += count;
        screen.emit(&Event::Progress {
            verb: "generate".to_owned(),
            done: (first + jobs_of.len()) as u64,
            of: jobs.len() as u64,
            detail: format!("{tokens} tokens"),
        });
    }
    drop(screen);
    output::aside(&format!(
        "{} texts in {}, {tokens} tokens written now\n",
        jobs.len(),
        args.out.display()
    ));
    Ok(())
}

impl GenerateArgs {
    fn jobs(
        &self,
        session: &Session,
        tokenizer: &Tokenizer,
        template: Option<&ChatTemplate>,
        ends: &[u32],
    ) -> Result<Vec<Job>> {
        let bos = session.bos(tokenizer)?;
        let Some(path) = &self.prompts else {
            // A model without a token that opens a text has seen texts begin behind one that ends one.
            let opening =
                bos.or_else(|| session.opened.config.eos.first().or(ends.first()).copied());
            let opening = opening.ok_or_else(|| {
                Error::preflight("the model has no token that opens or ends a text")
                    .at(session.opened.dir.display())
                    .fix("--prompts with a file of beginnings")
            })?;
            let count = self.free.unwrap_or(0) * self.per_prompt;
            return Ok((0..count)
                .map(|_| Job { tokens: vec![opening], given: Given::Free })
                .collect());
        };
        let path = locate::data(path)?;
        let most = session.opened.config.max_positions;
        let mut jobs = Vec::new();
        for (index, asked) in
            read_prompts(&path)?.into_iter().take(self.limit.unwrap_or(usize::MAX)).enumerate()
        {
            let at = |e: Error| e.at(format!("{}, prompt {}", path.display(), index + 1));
            let (text, given, opened) = self.opening(asked, template).map_err(at)?;
            let mut tokens: Vec<u32> = bos.into_iter().filter(|_| !opened).collect();
            tokens.extend(tokenizer.encode(&text)?);
            if tokens.is_empty() || tokens.len() >= most {
                let what = format!(
                    "the prompt has {} tokens, and the model's context {most}",
                    tokens.len()
                );
                return Err(at(Error::preflight(what).fix("a file without this prompt")));
            }
            jobs.extend(
                (0..self.per_prompt).map(|_| Job { tokens: tokens.clone(), given: given.copy() }),
            );
        }
        if jobs.is_empty() {
            return Err(Error::preflight("there is no prompt")
                .at(path.display())
                .fix("a prompt a line"));
        }
        Ok(jobs)
    }

    /// A prompt as the model reads it, what its line says of it, and whether the text opens itself.
    fn opening(
        &self,
        asked: Asked,
        template: Option<&ChatTemplate>,
    ) -> Result<(String, Given, bool)> {
        match (asked, template) {
            (Asked::Text(text), None) => Ok((text.clone(), Given::Prompt(text), false)),
            (Asked::Text(text), Some(template)) => {
                let chat = Chat {
                    messages: vec![json!({ "role": "user", "content": text })],
                    ..Default::default()
                };
                self.chat(chat, template)
            }
            (Asked::Chat(chat), Some(template)) => self.chat(chat, template),
            (Asked::Chat(_), None) => {
                Err(Error::preflight("a conversation needs a chat template, and there is none")
                    .fix("a model with a chat template, or prompts as plain text"))
            }
        }
    }

    fn chat(&self, mut chat: Chat, template: &ChatTemplate) -> Result<(String, Given, bool)> {
        let told = chat.messages.first().is_some_and(|message| message["role"] == "system");
        if let (Some(system), false) = (&self.template.system, told) {
            chat.messages.insert(0, json!({ "role": "system", "content": system }));
        }
        let text = template.render(&chat, true)?;
        let mut given = Map::new();
        given.insert("messages".to_owned(), chat.messages.into());
        for (name, column) in [("tools", chat.tools), ("documents", chat.documents)] {
            given.extend(column.map(|column| (name.to_owned(), column.into())));
        }
        Ok((text, Given::Messages(given), true))
    }

    /// All that the texts follow from.
    fn settings(
        &self,
        session: &Session,
        sampler: Sampler,
        texts: usize,
        stop: &StopFlag,
    ) -> Result<Value> {
        let dir = &session.opened.dir;
        let weights = if dir.is_file() {
            vec![dir.clone()]
        } else {
            session.opened.checkpoint.files().to_vec()
        };
        let prompts = self.prompts.as_ref().map(|path| locate::data(path)).transpose()?;
        let prompts_sha256 = prompts.map(|path| sha256_of(&[path])).transpose()?;
        let adapter = session.adapter.as_ref().map(|path| sha256_of(&[path])).transpose()?;
        Ok(json!({
            "made_by": format!("fewbit {} data generate", env!("CARGO_PKG_VERSION")),
            "model": self.source.model.model,
            "model_sha256": model_sha256(&session.opened.dir, &weights, stop)?,
            "adapter_sha256": adapter,
            "prompts": self.prompts,
            "prompts_sha256": prompts_sha256,
            "system": self.template.system,
            "chat_template_kwargs": self.template.chat_template_kwargs,
            "plain": self.plain,
            "texts": texts,
            "per_prompt": self.per_prompt,
            "batch": self.batch,
            "max_new_tokens": self.sampling.max_new_tokens.unwrap_or(TEXT),
            "stop": self.sampling.stop,
            "temperature": sampler.temperature,
            "top_k": sampler.top_k,
            "top_p": sampler.top_p,
            "min_p": sampler.min_p,
            "repetition_penalty": sampler.repetition_penalty,
            "seed": sampler.seed,
            "device": session.device.name,
            "compute": format!("{:?}", session.compute.dtype()),
        }))
    }
}

impl Given {
    fn copy(&self) -> Self {
        match self {
            Self::Free => Self::Free,
            Self::Prompt(text) => Self::Prompt(text.clone()),
            Self::Messages(map) => Self::Messages(map.clone()),
        }
    }

    /// The line of a text behind it.
    fn line(&self, text: &str) -> Map<String, Value> {
        match self {
            Self::Free => Map::from_iter([("text".to_owned(), text.into())]),
            Self::Prompt(prompt) => Map::from_iter([
                ("prompt".to_owned(), prompt.as_str().into()),
                ("completion".to_owned(), text.into()),
            ]),
            Self::Messages(given) => {
                let mut line = given.clone();
                if let Some(Value::Array(messages)) = line.get_mut("messages") {
                    messages.push(json!({ "role": "assistant", "content": text }));
                }
                line
            }
        }
    }
}

/// Where the settings of a file lie.
fn beside(out: &Path) -> PathBuf {
    let mut name = out.as_os_str().to_owned();
    name.push(".settings.json");
    PathBuf::from(name)
}

/// How many texts an earlier command with the same settings left; begins the file where none did. What of
/// it is torn, or belongs to a batch that is not whole, is cut off.
fn begun(args: &GenerateArgs, settings: &Value, texts: usize) -> Result<usize> {
    let (out, side) = (&args.out, beside(&args.out));
    let text = serde_json::to_string_pretty(settings).unwrap_or_default() + "\n";
    let begin = || {
        write_atomic(&side, text.as_bytes())?;
        write_atomic(out, b"").map(|()| 0)
    };
    if !out.exists() {
        return begin();
    }
    let known = std::fs::read_to_string(&side).ok();
    if known.as_deref() != Some(text.as_str()) {
        if args.fresh {
            return begin();
        }
        let differs = known.and_then(|known| {
            let known: Value = serde_json::from_str(&known).ok()?;
            let names = settings.as_object()?.keys();
            names.into_iter().find(|name| known[*name] != settings[*name]).cloned()
        });
        let what = match differs {
            Some(name) => format!("the file was begun with other settings: {name} is not the same"),
            None => "the file is not one that data generate began".to_owned(),
        };
        return Err(Error::usage(what)
            .at(out.display())
            .fix("another --out, or --fresh to start over"));
    }
    let bytes = std::fs::read(out).map_err(|e| Error::io("read", out, &e))?;
    let ends: Vec<usize> = bytes
        .iter()
        .enumerate()
        .filter(|(_, byte)| **byte == b'\n')
        .map(|(at, _)| at + 1)
        .collect();
    let mut whole = ends.len().min(texts);
    if whole < texts {
        whole = whole / args.batch * args.batch;
    }
    let length = whole.checked_sub(1).map_or(0, |last| ends[last]) as u64;
    if length < bytes.len() as u64 {
        let file = std::fs::OpenOptions::new().write(true).open(out);
        file.and_then(|file| file.set_len(length)).map_err(|e| Error::io("write", out, &e))?;
    }
    Ok(whole)
}

struct Writer<'a> {
    session: &'a Session,
    tokenizer: &'a Tokenizer,
    stops: &'a [String],
    how: Generation<'a>,
    stop: &'a StopFlag,
}

impl Writer<'_> {
    /// The lines of a batch, the first of them text number `first`, and how many tokens were written.
    fn lines(&self, first: usize, jobs: &[Job]) -> Result<(String, usize)> {
        let rows: Vec<Prompt<'_>> = jobs
            .iter()
            .zip(first as u64..)
            .map(|(job, stream)| Prompt { tokens: &job.tokens, stream })
            .collect();
        let mut answers: Vec<Answer<'_>> =
            jobs.iter().map(|job| Answer::new(self.tokenizer, &job.tokens, self.stops)).collect();
        let ended = self.how.batch(&rows, &mut |row, token| {
            self.stop.check()?;
            answers[row].push(token)
        });
        let ended: Vec<Ended> = ended.map_err(|e| e.at(self.session.opened.dir.display()))?;
        let (mut lines, mut tokens) = (String::new(), 0);
        for (((job, answer), ended), index) in jobs.iter().zip(&mut answers).zip(ended).zip(first..)
        {
            answer.finish()?;
            let mut line = job.given.line(answer.text());
            line.insert("index".to_owned(), index.into());
            line.insert("tokens".to_owned(), answer.tokens().len().into());
            line.insert("ended".to_owned(), ended.name().into());
            tokens += answer.tokens().len();
            lines.push_str(&Value::Object(line).to_string());
            lines.push('\n');
        }
        Ok((lines, tokens))
    }
}
