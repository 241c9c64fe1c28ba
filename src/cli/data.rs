//! `fewbit data`: what a data set becomes, shown before anything is trained on it.

mod generate;
mod sample;

use std::path::PathBuf;

use clap::builder::PossibleValuesParser;
use clap::{Args, Subcommand};
use serde_json::{Map, Value, json};
use unicode_width::UnicodeWidthStr;

use self::sample::{Sample, runs, samples};
use super::dialogue::kwargs;
use super::{Arithmetic, ModelArgs, output};
use crate::data::{DataFormat, Reading, TemplateChoice, TokenStream, Tokenizer, TrainOn};
use crate::error::{Error, Result};
use crate::run::{Options, data_of};
use crate::stage::Corpus;
use crate::stop::StopFlag;
use crate::store::locate;

/// Columns of what is printed.
const WIDTH: usize = 80;
/// Window length where neither the model nor anybody says less.
const DEFAULT_LENGTH: usize = 2048;

/// Arguments of `data`.
#[derive(Args, Debug)]
pub(super) struct DataArgs {
    #[command(subcommand)]
    command: DataCommand,
}

#[derive(Debug, Subcommand)]
enum DataCommand {
    /// Show samples with the trained tokens marked, and count documents, tokens and what is cut
    Preview(PreviewArgs),
    /// Have a model write training text: answers to prompts, or free text
    ///
    /// The file is JSONL that `[data.*]` of a recipe reads. The same command goes on with a file that is
    /// not whole; what it was made by lies beside it in FILE.settings.json.
    Generate(generate::GenerateArgs),
}

/// How data is read: the keys of a recipe's `[data.*]`.
#[derive(Args, Debug)]
pub(super) struct ReadingArgs {
    /// What the data holds: text, messages (or "conversations"), instruction ("instruction", "input",
    /// "output"), completion ("prompt", "completion"), tokens ("input_ids", "labels") or auto; but of
    /// text only what is answered counts [default: text]
    #[arg(long, visible_alias = "format", value_name = "FORMAT", value_parser = super::data_format)]
    data_format: Option<DataFormat>,
    /// What of a conversation counts
    #[arg(long, value_name = "WHAT", value_parser = PossibleValuesParser::new(TrainOn::ALL.map(TrainOn::name)))]
    train_on: Option<String>,
    /// The chat template: a file, or `model` for the model's own, through which instructions and
    /// completions go then too [default: the model's, for messages]
    #[arg(long, value_name = "FILE")]
    chat_template: Option<String>,
    /// Values for names in the chat template, as JSON: {"enable_thinking": false}
    #[arg(long, value_name = "JSON", value_parser = kwargs)]
    chat_template_kwargs: Option<Map<String, Value>>,
    /// What a chat template that asks is told of today's date
    #[arg(long, value_name = "DATE")]
    date: Option<String>,
}

impl ReadingArgs {
    /// The keys that they stand for.
    pub(super) fn reading(&self) -> Reading {
        let train_on = self.train_on.as_deref();
        let train_on = TrainOn::ALL.into_iter().find(|on| Some(on.name()) == train_on);
        let template = self.chat_template.as_deref().map(|name| match name {
            "model" => TemplateChoice::Model(true),
            path => TemplateChoice::File(path.to_owned()),
        });
        Reading {
            format: self.data_format.unwrap_or_default(),
            train_on: train_on.unwrap_or_default(),
            chat_template: template,
            chat_template_kwargs: self.chat_template_kwargs.clone().unwrap_or_default(),
            date: self.date.clone(),
        }
    }
}

/// Arguments of `data preview`.
#[derive(Args, Debug)]
struct PreviewArgs {
    /// A recipe, all of whose data sets are shown
    #[arg(long, value_name = "RECIPE", conflicts_with_all = ["model", "data"])]
    recipe: Option<String>,
    /// Overrides a key of the recipe; repeatable
    #[arg(long, value_name = "KEY=VALUE", requires = "recipe")]
    set: Vec<String>,
    /// Only this data set of the recipe: train, calibration or validation
    #[arg(long, requires = "recipe", value_parser = PossibleValuesParser::new(["train", "calibration", "validation"]))]
    role: Option<String>,
    /// The model whose tokenizer and chat template are taken
    #[arg(long, value_name = "DIR")]
    model: Option<String>,
    /// Data files, joined in order, or hub:owner/name/FILE
    #[arg(long, value_name = "FILE", requires = "model")]
    data: Vec<String>,
    #[command(flatten)]
    reading: ReadingArgs,
    /// Window length in tokens [default: the model's context, at most 2048]
    #[arg(long)]
    length: Option<usize>,
    /// Samples to show of each data set, evenly spread
    #[arg(long, default_value_t = 3)]
    samples: usize,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &DataArgs, stop: &StopFlag) -> Result<()> {
    match &args.command {
        DataCommand::Preview(args) => preview(args),
        DataCommand::Generate(args) => generate::run(args, stop),
    }
}

fn preview(args: &PreviewArgs) -> Result<()> {
    let (sets, tokenizer) = match &args.recipe {
        Some(recipe) => of_recipe(recipe, args)?,
        None => of_files(args)?,
    };
    let mark = if output::is_plain() { ["[[", "]]"] } else { ["\x1b[7m", "\x1b[0m"] };
    let mut found = Vec::new();
    for (index, (role, corpus)) in sets.iter().enumerate() {
        let counts = Counts::of(corpus);
        let samples = samples(&corpus.stream, corpus.length, args.samples);
        let samples: Vec<Sample> = samples
            .into_iter()
            .map(|sample| sample.told(&corpus.stream, &tokenizer))
            .collect::<Result<_>>()?;
        if args.json {
            found.push(counts.json(role, corpus, &samples));
            continue;
        }
        let space = if index > 0 { "\n" } else { "" };
        output::line(&format!("{space}{}", counts.lines(role, corpus)))?;
        for (number, sample) in samples.iter().enumerate() {
            output::line(&format!("\n{}", sample.lines(number + 1, samples.len(), mark)))?;
        }
    }
    if args.json {
        return output::json(&json!({ "sets": found }));
    }
    Ok(())
}

type Sets = Vec<(String, Corpus)>;

fn of_recipe(recipe: &str, args: &PreviewArgs) -> Result<(Sets, Tokenizer)> {
    let options = Options {
        probe: false,
        reuse: None,
        price_per_hour: None,
        recipe: recipe.to_owned(),
        set: args.set.clone(),
        output: None,
        device: None,
        fresh: false,
    };
    let (data, folder) = data_of(&options)?;
    let all =
        [("train", data.train), ("calibration", data.calibration), ("validation", data.validation)];
    let wanted = |role: &str| args.role.as_deref().is_none_or(|own| own == role);
    let sets: Sets = all
        .into_iter()
        .filter(|(role, _)| wanted(role))
        .filter_map(|(role, corpus)| Some((format!("data.{role}"), corpus?)))
        .collect();
    if sets.is_empty() {
        let what = match &args.role {
            Some(role) => format!("the recipe has no [data.{role}]"),
            None => "the recipe has no data".to_owned(),
        };
        return Err(Error::usage(what).at(recipe).fix("[data.train] with a path"));
    }
    Ok((sets, Tokenizer::load(&folder)?))
}

fn of_files(args: &PreviewArgs) -> Result<(Sets, Tokenizer)> {
    let (Some(model), false) = (&args.model, args.data.is_empty()) else {
        return Err(Error::usage("nothing says which data").fix("--recipe, or --model and --data"));
    };
    let (device, compute) = ("cpu".to_owned(), Arithmetic::F32);
    let session = ModelArgs { model: model.clone(), device, compute, bits: None }.open()?;
    let mut paths: Vec<PathBuf> = Vec::new();
    for name in &args.data {
        paths.extend(locate::data_files(name)?);
    }
    let reading = args.reading.reading().resolved(&paths)?;
    let most = session.opened.config.max_positions.min(DEFAULT_LENGTH);
    let length = args.length.unwrap_or(most);
    let tokenizer = session.tokenizer()?;
    let marks = session.marks(&tokenizer)?;
    let stream = session.read(&paths, &reading, &tokenizer, marks, length)?;
    let names = args.data.iter().map(|path| path.rsplit('/').next().unwrap_or(path));
    let name = names.collect::<Vec<_>>().join("+");
    let corpus = Corpus {
        stream,
        reading,
        sha256: crate::data::sha256_of(&paths)?,
        template: None,
        name,
        samples: None,
        length,
    };
    Ok((vec![("data".to_owned(), corpus)], tokenizer))
}

/// What there is of a data set.
struct Counts {
    documents: usize,
    tokens: usize,
    windows: usize,
    supervised: usize,
    cut: usize,
    empty: usize,
    filled: usize,
    /// Shortest, median, 90th and 99th percentile, longest, in tokens.
    lengths: [u32; 5],
}

impl Counts {
    fn of(corpus: &Corpus) -> Self {
        let stream = &corpus.stream;
        let mut sorted = stream.lengths.clone();
        sorted.sort_unstable();
        // The smallest length that this share of documents does not exceed.
        let rank =
            |share: f64| ((share * sorted.len() as f64).ceil() as usize).clamp(1, sorted.len());
        let at = |share: f64| sorted.get(rank(share).wrapping_sub(1)).copied().unwrap_or(0);
        let lengths = if sorted.is_empty() { [0; 5] } else { [0.0, 0.5, 0.9, 0.99, 1.0].map(at) };
        Self {
            documents: stream.documents,
            tokens: stream.tokens.len(),
            windows: stream.windows(corpus.length),
            supervised: stream.counted(),
            cut: stream.cut,
            empty: stream.empty,
            filled: filled(stream, corpus.length),
            lengths,
        }
    }

    fn lines(&self, role: &str, corpus: &Corpus) -> String {
        let Reading { format, train_on, .. } = &corpus.reading;
        let mut kind = format!("format {}", format.name());
        if corpus.reading.is_chat() {
            kind = format!("{kind}, train_on {}", train_on.name());
        }
        let percent = |part: usize, of: usize| 100.0 * part as f64 / of.max(1) as f64;
        let mut lines = vec![
            row(role, &format!("{}   {kind}", corpus.name)),
            row("documents", &{
                let mut text = number(self.documents);
                if corpus.stream.packed.is_some() {
                    text = format!(
                        "{text}   cut {} ({:.1} %)   teach nothing {} ({:.1} %)",
                        number(self.cut),
                        percent(self.cut, self.documents),
                        number(self.empty),
                        percent(self.empty, self.documents)
                    );
                }
                text
            }),
            row("tokens", &{
                let trained = format!(
                    "{}   trained {} ({:.1} %)",
                    number(self.tokens),
                    number(self.supervised),
                    percent(self.supervised, self.tokens)
                );
                match self.filled {
                    0 => trained,
                    filled => format!("{trained}   filling {:.1} %", percent(filled, self.tokens)),
                }
            }),
            row("windows", &{
                let stored = corpus.stream.tokens.len() / corpus.length.max(1);
                let text = format!("{} of {} tokens", number(stored), corpus.length);
                if self.windows == stored {
                    text
                } else {
                    format!("{text}   {} visited in an epoch", number(self.windows))
                }
            }),
        ];
        let [least, median, p90, p99, most] = self.lengths.map(|length| number(length as usize));
        lines.push(row(
            "length",
            &format!("least {least}   median {median}   90 % {p90}   99 % {p99}   most {most}"),
        ));
        let visits: usize = corpus.stream.sources.iter().map(|source| source.visits).sum();
        for source in &corpus.stream.sources {
            lines.push(row(
                "source",
                &format!(
                    "{}   {} documents   {:.1} % of windows   {:.2} times",
                    source.name,
                    number(source.documents),
                    percent(source.visits, visits),
                    source.visits as f64 / source.windows as f64
                ),
            ));
        }
        lines.join("\n")
    }

    fn json(&self, role: &str, corpus: &Corpus, samples: &[Sample]) -> Value {
        let [least, median, p90, p99, most] = self.lengths;
        let mut set = json!({
            "set": role,
            "name": corpus.name,
            "data_sha256": corpus.sha256,
            "documents": self.documents,
            "tokens": self.tokens,
            "trained": self.supervised,
            "windows": self.windows,
            "length": corpus.length,
            "cut": self.cut,
            "teach_nothing": self.empty,
            "filling": self.filled,
            "lengths": {"least": least, "median": median, "p90": p90, "p99": p99, "most": most},
            "sources": corpus.stream.sources,
            "samples": samples.iter().map(Sample::json).collect::<Vec<_>>(),
        });
        if let (Some(set), Ok(Value::Object(reading))) =
            (set.as_object_mut(), serde_json::to_value(&corpus.reading))
        {
            set.extend(reading);
        }
        set
    }
}

/// Tokens that only fill up windows.
fn filled(stream: &TokenStream, length: usize) -> usize {
    let Some(starts) = &stream.starts else { return 0 };
    let documents = runs(starts, length);
    let supervised = stream.supervised.as_deref().unwrap_or_default();
    // The last run of a window is filling where nothing of it counts and it reaches the end.
    let filling = |(from, to): &(usize, usize)| {
        to % length == 0 && from % length > 0 && !supervised[*from..*to].contains(&true)
    };
    documents.iter().filter(|run| filling(run)).map(|(from, to)| to - from).sum()
}

/// A named line; what does not fit stands below, broken where three spaces part two facts.
fn row(name: &str, text: &str) -> String {
    const MARGIN: usize = 17;
    let (mut out, mut columns) = (format!("{name:<MARGIN$}"), MARGIN);
    for (index, fact) in text.split("   ").enumerate() {
        let width = fact.width();
        if index > 0 && columns + 3 + width > WIDTH {
            out = format!("{out}\n{:MARGIN$}", "");
            columns = MARGIN;
        } else if index > 0 {
            out += "   ";
            columns += 3;
        }
        out += fact;
        columns += width;
    }
    out
}

/// A count with its thousands apart.
fn number(count: usize) -> String {
    let digits = count.to_string();
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(' ');
        }
        out.push(digit);
    }
    out
}
