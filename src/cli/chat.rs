//! `fewbit chat`: a conversation in the words of the model's chat template, or lines of text continued
//! one by one, with adapters that switch in between.

use std::io::{BufRead, IsTerminal};
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use clap::Args;

use super::dialogue::{Dialogue, TemplateArgs};
use super::generate::{ANSWER, Writer};
use super::kv::KvArgs;
use super::sampling::SamplingArgs;
use super::{ModelArgs, output, read_adapter};
use crate::error::{Error, Kind, Result};
use crate::export::{Adapter, Adapters};
use crate::model::{CausalLm, Ended, Memory, Sampler};
use crate::stop::StopFlag;

/// How long a line is waited for before the stop flag is asked again.
const PATIENCE: Duration = Duration::from_millis(50);

/// The name that stands for the base's own scales.
const NONE: &str = "none";

const HELP: &str = "a line of text      said to the model; where it has no chat template, continued by it\n\
                    /reset              forget the conversation\n\
                    /system TEXT        begin anew, the model told this before; without TEXT, told nothing\n\
                    /adapter NAME       put that adapter's scales in the model\n\
                    /adapter none       put the model's own scales back\n\
                    /adapters           list the adapters\n\
                    /help               this\n\
                    /quit               leave; so does the end of the input\n";

const COMMANDS: [&str; 6] = ["adapter", "adapters", "help", "quit", "reset", "system"];

/// Arguments of `chat`.
#[derive(Args, Debug)]
pub(super) struct ChatArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// A scale adapter for the model, which is then the packed base it was trained on; may be given
    /// several times, and the first is on at the start. NAME is what /adapter calls it [default:
    /// the name in the file]
    #[arg(long, value_name = "[NAME=]FILE")]
    adapter: Vec<String>,
    #[command(flatten)]
    template: TemplateArgs,
    /// Continue each line as plain text, without the model's chat template
    #[arg(long, conflicts_with_all = ["system", "chat_template_kwargs"])]
    plain: bool,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    kv: KvArgs,
}

pub(super) fn run(args: &ChatArgs, stop: &StopFlag) -> Result<()> {
    let adapters: Vec<(String, Adapter)> =
        args.adapter.iter().map(|text| named(text)).collect::<Result<_>>()?;
    check_names(&adapters)?;
    let session = args.model.open()?;
    let tokenizer = session.tokenizer()?;
    let dialogue = match &args.template {
        _ if args.plain => None,
        names if names.are_given() => Some(names.need(&session)?),
        names => names.template(&session)?,
    };
    let dialogue = dialogue.map(|template| Dialogue::new(template, args.template.system.clone()));
    let adapters = Adapters::new(&session.opened, &adapters)?;
    let kv = args.kv.setting(&session)?;
    let model = session.load()?.with_kv(kv);
    let generation = session.opened.generation()?;
    let sampler = args.sampling.sampler(generation.sampler()?);
    let (ends, stops) = (generation.ends, &args.sampling.stop);
    let max_new = args.sampling.max_new_tokens.unwrap_or(ANSWER);
    let writer = Writer { session: &session, tokenizer: &tokenizer, stop, ends, max_new, stops };
    let memory = Memory::default();
    let mut chat = Chat { writer, model, adapters, sampler, memory, dialogue };
    let first = chat.adapters.names().next().map(str::to_owned);
    if first.is_some() {
        chat.adapters.switch(&mut chat.model, first.as_deref())?;
    }
    output::aside(&format!(
        "{} on {}\n{}; /help for commands\n",
        args.model.model,
        session.device.name,
        match (&chat.dialogue, args.plain) {
            (Some(_), _) => "a conversation by the model's chat template",
            (None, true) => "each line is continued as plain text",
            (None, false) => "the model has no chat template: each line is continued as plain text",
        }
    ));
    if first.is_some() {
        output::aside(&chat.list());
    }
    chat.serve(stop).map_err(|error| match error.kind() {
        Kind::Stopped(_) => {
            // Ctrl-C leaves the cursor in the middle of a line.
            if std::io::stdin().is_terminal() {
                output::aside("\n");
            }
            error.fix("/quit to leave")
        }
        _ => error,
    })
}

/// `[NAME=]FILE`; a path with `=` in it is taken as it is where there is such a file.
pub(super) fn named(text: &str) -> Result<(String, Adapter)> {
    let split = text.split_once('=').filter(|(name, _)| !name.contains(['/', '\\']));
    let (name, path) = match split {
        Some((name, path)) if !Path::new(text).exists() => (Some(name), path),
        _ => (None, text),
    };
    let (_, adapter) = read_adapter(Path::new(path))?;
    Ok((name.unwrap_or(&adapter.head().name).to_owned(), adapter))
}

/// Refuses names that two adapters have, or none can.
pub(super) fn check_names(adapters: &[(String, Adapter)]) -> Result<()> {
    for (index, (name, _)) in adapters.iter().enumerate() {
        let refused = |what: String| {
            Err(Error::usage(what).at("--adapter").fix("--adapter NAME=FILE with another name"))
        };
        if name.is_empty() || name.contains(char::is_whitespace) || name == NONE {
            return refused(format!("{name:?} cannot be the name of an adapter"));
        }
        if adapters[..index].iter().any(|(other, _)| other == name) {
            return refused(format!("two adapters are named {name}"));
        }
    }
    Ok(())
}

/// A model that answers lines.
struct Chat<'a> {
    writer: Writer<'a>,
    model: CausalLm,
    adapters: Adapters,
    sampler: Sampler,
    memory: Memory,
    /// Where the model has a chat template.
    dialogue: Option<Dialogue>,
}

impl Chat<'_> {
    fn serve(&mut self, stop: &StopFlag) -> Result<()> {
        let lines = lines();
        let terminal = std::io::stdin().is_terminal();
        loop {
            if terminal {
                output::aside("> ");
            }
            let Some(line) = next(&lines, stop)? else {
                if terminal {
                    output::aside("\n");
                }
                return Ok(());
            };
            let Ok(line) = String::from_utf8(line) else {
                output::aside("this line is not UTF-8 text\n");
                continue;
            };
            let line = line.trim_end_matches(['\r', '\n']);
            let command = line.trim().strip_prefix('/').map(str::trim_end);
            match command {
                Some("quit") => return Ok(()),
                Some(command) => self.obey(command)?,
                None if line.trim().is_empty() => {}
                None => self.answer(line)?,
            }
            if output::is_closed() {
                return Ok(());
            }
        }
    }

    /// Answers a line; one that cannot be answered gets a sentence.
    fn answer(&mut self, line: &str) -> Result<()> {
        let prompt = match &mut self.dialogue {
            None => self.writer.prompt(line),
            Some(dialogue) => {
                dialogue.ask(line);
                said(dialogue, &self.writer)
            }
        };
        let prompt = match prompt {
            Ok(prompt) => prompt,
            Err(error) => {
                self.dialogue.iter_mut().for_each(Dialogue::take_back);
                output::aside(&format!("{}\n", error.what()));
                return Ok(());
            }
        };
        let Self { writer, model, memory, sampler, .. } = self;
        let (answer, ended) = writer.go_on(model, memory, (&prompt, ""), *sampler)?;
        if let Some(dialogue) = &mut self.dialogue {
            dialogue.answered(&answer);
            if ended == Ended::Length {
                output::aside("(cut at --max-new-tokens)\n");
            }
        }
        // The next answer gets draws of its own.
        self.sampler.seed = self.sampler.seed.wrapping_add(1);
        Ok(())
    }

    /// Forgets what was said; the model is told `system` from now on.
    fn begin(&mut self, system: Option<String>) {
        match &mut self.dialogue {
            Some(dialogue) => {
                dialogue.begin(system);
                output::aside("a new conversation\n");
            }
            None => output::aside("without a chat template no line is remembered\n"),
        }
    }

    fn obey(&mut self, command: &str) -> Result<()> {
        let (word, rest) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
        match (word, rest.trim()) {
            ("help", _) => output::aside(HELP),
            ("adapters", _) | ("adapter", "") => output::aside(&self.list()),
            ("adapter", name) => self.switch(name)?,
            ("reset", _) => {
                let told = self.dialogue.as_ref().and_then(|d| d.system().map(str::to_owned));
                self.begin(told);
            }
            ("system", text) => self.begin((!text.is_empty()).then(|| text.to_owned())),
            _ => {
                let known =
                    suggestion(word, &COMMANDS).map(|near| format!("did you mean /{near}?"));
                let known = known.unwrap_or_else(|| "/help lists them".to_owned());
                output::aside(&format!("there is no command /{word}; {known}\n"));
            }
        }
        Ok(())
    }

    fn switch(&mut self, name: &str) -> Result<()> {
        let known: Vec<&str> = self.adapters.names().chain([NONE]).collect();
        if !known.contains(&name) {
            let near = suggestion(name, &known).map(|near| format!("did you mean {near}?"));
            let near = near.unwrap_or_else(|| format!("known here: {}", known.join(", ")));
            output::aside(&format!("there is no adapter {name}; {near}\n"));
            return Ok(());
        }
        let start = Instant::now();
        self.adapters.switch(&mut self.model, (name != NONE).then_some(name))?;
        // Its keys and values are those of other scales.
        self.memory = Memory::default();
        let took = 1e3 * start.elapsed().as_secs_f64();
        let now = match self.adapters.on() {
            Some(name) => format!("adapter {name} is on"),
            None => "the model's own scales are on".to_owned(),
        };
        output::aside(&format!("{now}, in {took:.1} ms\n"));
        Ok(())
    }

    /// The adapters, the one that is on with a star.
    fn list(&self) -> String {
        let on = self.adapters.on();
        let star = |is_on: bool| if is_on { "*" } else { " " };
        let named =
            self.adapters.names().map(|name| format!("{} {name}\n", star(on == Some(name))));
        let own = format!("{} {NONE}, the model's own scales\n", star(on.is_none()));
        named.chain([own]).collect()
    }
}

/// The conversation as tokens; exchanges that it has no room for are forgotten, the first ones first.
fn said(dialogue: &mut Dialogue, writer: &Writer<'_>) -> Result<Vec<u32>> {
    loop {
        let tokens = writer.tokenizer.encode(&dialogue.text()?)?;
        match writer.fitting(tokens) {
            Err(_) if dialogue.forget_first() => {
                output::aside(
                    "(the conversation outgrew the context: its first exchange is forgotten)\n",
                );
            }
            fitting => return fitting,
        }
    }
}

/// The known word that was probably meant.
fn suggestion<'k>(word: &str, known: &[&'k str]) -> Option<&'k str> {
    let word = word.to_lowercase();
    let edits = |known: &str| strsim::damerau_levenshtein(&word, &known.to_lowercase());
    let begun = known.iter().copied().find(|known| !word.is_empty() && known.starts_with(&word));
    let near = || known.iter().copied().min_by_key(|known| edits(known));
    let few = |known: &&str| edits(known) <= ((word.chars().count() + 1) / 3).max(1);
    begun.or_else(|| near().filter(few))
}

/// Lines of the standard input, read on a thread of their own: a wait for one must not keep a
/// signal waiting.
fn lines() -> Receiver<std::io::Result<Vec<u8>>> {
    let (send, receive) = sync_channel(1);
    std::thread::spawn(move || {
        let mut input = std::io::stdin().lock();
        loop {
            let mut line = Vec::new();
            let read = input.read_until(b'\n', &mut line);
            let more = matches!(read, Ok(1..));
            if matches!(read, Ok(0)) || send.send(read.map(|_| line)).is_err() || !more {
                return;
            }
        }
    });
    receive
}

/// The next line; `None` at the end of the input.
fn next(lines: &Receiver<std::io::Result<Vec<u8>>>, stop: &StopFlag) -> Result<Option<Vec<u8>>> {
    loop {
        stop.check()?;
        match lines.recv_timeout(PATIENCE) {
            Ok(Ok(line)) => return Ok(Some(line)),
            Ok(Err(e)) => return Err(Error::io("read", Path::new("stdin"), &e)),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slips_are_understood_and_guesses_are_not_made() {
        assert_eq!(suggestion("adaptr", &COMMANDS), Some("adapter"));
        assert_eq!(suggestion("ad", &COMMANDS), Some("adapter"));
        assert_eq!(suggestion("exit", &COMMANDS), None);
        assert_eq!(suggestion("", &COMMANDS), None);
        assert_eq!(suggestion("pega", &["peqa", NONE]), Some("peqa"));
        assert_eq!(suggestion("Tails", &["tales", NONE]), Some("tales"));
        assert_eq!(suggestion("x", &[]), None);
    }
}
