//! From data files to one token stream: the keys that say how, and the walk through the files.
//!
//! Documents are read and tokenized a batch at a time, so that of a large file only its tokens are held.

use std::fmt;
use std::path::Path;

use rayon::prelude::*;
use serde::{Deserialize, Deserializer, Serialize, de};
use serde_json::{Map, Value};

use super::chat::{Chat, ChatTemplate, Clock, Part, TrainOn, parts};
use super::documents;
use super::examples::{self, DataFormat, Document};
use super::packing::{Marks, Packer};
use super::tokenizer::Tokenizer;
use super::windows::TokenStream;
use crate::error::{Error, Result};
use crate::schema::schema_of;

/// Documents of a batch.
const BATCH: usize = 1024;
/// Bytes of text after which a batch is full too.
const BATCH_BYTES: usize = 8 << 20;

/// Which chat template a data set goes through.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
#[serde(untagged)]
pub enum TemplateChoice {
    /// `true`: the model's; `false`: none.
    Model(bool),
    /// That of a file.
    File(String),
}

schema_of!(
    TemplateChoice,
    "Whether a data set goes through the model's chat template, or the path of another.",
    { "type": ["boolean", "string"] }
);

impl<'de> Deserialize<'de> for TemplateChoice {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Choice;
        impl de::Visitor<'_> for Choice {
            type Value = TemplateChoice;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("true, false or the path of a template")
            }

            fn visit_bool<E: de::Error>(self, whether: bool) -> Result<TemplateChoice, E> {
                Ok(TemplateChoice::Model(whether))
            }

            fn visit_str<E: de::Error>(self, path: &str) -> Result<TemplateChoice, E> {
                Ok(TemplateChoice::File(path.to_owned()))
            }
        }
        from.deserialize_any(Choice)
    }
}

/// How the documents of a data set become tokens, and which of these count.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(default)]
pub struct Reading {
    /// What a document is.
    pub format: DataFormat,
    /// What of a conversation is learned.
    #[serde(skip_serializing_if = "is_default")]
    pub train_on: TrainOn,
    /// The chat template that conversations go through.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chat_template: Option<TemplateChoice>,
    /// Values for further names in the template.
    #[serde(skip_serializing_if = "Map::is_empty")]
    pub chat_template_kwargs: Map<String, Value>,
    /// What a template that asks is told of today's date.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub date: Option<String>,
}

/// Whether a value is what it is where nothing is said.
pub(crate) fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl From<DataFormat> for Reading {
    fn from(format: DataFormat) -> Self {
        Self { format, ..Self::default() }
    }
}

impl Reading {
    /// The same with the format that the files are found to have.
    ///
    /// # Errors
    /// As [`DataFormat::of`], and when files differ; and when a key does not fit the format.
    pub fn resolved<P: AsRef<Path>>(&self, paths: &[P]) -> Result<Self> {
        let mut format = None;
        for path in paths {
            let path = path.as_ref();
            let own = self.format.of(path)?;
            if *format.get_or_insert(own) != own {
                let what =
                    format!("this file has another format, {}, than those before it", own.name());
                return Err(Error::preflight(what)
                    .at(path.display())
                    .fix("a mix = [{ path, weight, format }, …], or files of one format"));
            }
        }
        let reading = Self { format: format.unwrap_or(self.format), ..self.clone() };
        reading.check()?;
        Ok(reading)
    }

    /// Whether documents go through a chat template.
    pub fn is_chat(&self) -> bool {
        match self.format {
            DataFormat::Messages => true,
            DataFormat::Instruction | DataFormat::Completion => {
                !matches!(self.chat_template, None | Some(TemplateChoice::Model(false)))
            }
            DataFormat::Text | DataFormat::Tokens | DataFormat::Auto => false,
        }
    }

    fn check(&self) -> Result<()> {
        if self.format == DataFormat::Messages
            && self.chat_template == Some(TemplateChoice::Model(false))
        {
            return Err(Error::usage("conversations become text through a chat template only")
                .at("chat_template = false")
                .fix("chat_template = true, or the path of one"));
        }
        if self.is_chat() || self.format == DataFormat::Auto {
            return self.clock().map(drop);
        }
        let needless = [
            ("train_on", self.train_on != TrainOn::default()),
            (
                "chat_template",
                matches!(self.chat_template, Some(TemplateChoice::File(_)))
                    || self.chat_template == Some(TemplateChoice::Model(true)),
            ),
            ("chat_template_kwargs", !self.chat_template_kwargs.is_empty()),
            ("date", self.date.is_some()),
        ];
        match needless.iter().find(|(_, said)| *said) {
            None => Ok(()),
            Some((key, _)) => {
                let format = self.format.name();
                let fix = match self.format {
                    DataFormat::Instruction | DataFormat::Completion => {
                        "chat_template = true too, or leave it out"
                    }
                    _ => "format = \"messages\", or leave it out",
                };
                Err(Error::usage(format!(
                    "{key} says nothing of data of format \"{format}\", which goes \
                     through no chat template"
                ))
                .at(*key)
                .fix(fix))
            }
        }
    }

    /// What `strftime_now` says.
    fn clock(&self) -> Result<Clock> {
        let Some(date) = &self.date else { return Ok(Clock::Unset) };
        let time = date.parse().or_else(|_| {
            date.parse::<jiff::civil::Date>()
                .map(|date| date.to_datetime(jiff::civil::Time::midnight()))
        });
        time.map(Clock::At).map_err(|_| {
            Error::usage(format!("`{date}` is no date")).at("date").fix("date = \"2024-07-26\"")
        })
    }

    /// The template that documents go through, with its settings; `model` gives the model's, `tokenizer` the
    /// special tokens of another's.
    ///
    /// # Errors
    /// When there is none, or it cannot be read.
    pub fn template(
        &self,
        model: &dyn Fn() -> Result<Option<ChatTemplate>>,
        tokenizer: &Tokenizer,
    ) -> Result<Option<ChatTemplate>> {
        if !self.is_chat() {
            return Ok(None);
        }
        let template = match &self.chat_template {
            Some(TemplateChoice::File(path)) => {
                if !Path::new(path).is_file() {
                    let error = Error::usage("there is no such chat template").at(path);
                    return Err(
                        error.fix("check the path, or chat_template = true for the model's")
                    );
                }
                let text = std::fs::read_to_string(path)
                    .map_err(|source| Error::io("read", Path::new(path), &source))?;
                ChatTemplate::new(&text, tokenizer.special_texts().clone(), path)?
            }
            _ => model()?.ok_or_else(|| {
                let format = self.format.name();
                let what = format!(
                    "the model has no chat template, and format \"{format}\" goes through one"
                );
                Error::preflight(what)
                    .fix("chat_template = \"FILE.jinja\" (--chat-template FILE), or a model that has one")
            })?,
        };
        Ok(Some(template.with_clock(self.clock()?).with_kwargs(self.chat_template_kwargs.clone())?))
    }
}

/// What data is read with.
pub struct Reader<'a> {
    /// The model's tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// The model's chat template; asked for only where data goes through one.
    pub template: &'a dyn Fn() -> Result<Option<ChatTemplate>>,
    /// The special tokens around documents.
    pub marks: Marks,
    /// Tokens of a window.
    pub length: usize,
    /// Rows of the model's embedding.
    pub vocab: usize,
}

impl Reader<'_> {
    /// Reads and tokenizes the data files `paths`, joined in order. Examples are packed into windows; plain
    /// text has no windows yet. The format is known, see [`Reading::resolved`].
    ///
    /// # Errors
    /// If a file cannot be read or is of another format, a conversation is refused by its template, or
    /// nothing in it is supervised.
    pub fn read<P: AsRef<Path>>(&self, paths: &[P], reading: &Reading) -> Result<TokenStream> {
        reading.check()?;
        let template = reading.template(self.template, self.tokenizer)?;
        let mut walk = Walk {
            reader: self,
            reading,
            template: template.as_ref(),
            added: if template.is_some() { self.tokenizer.added_texts() } else { Vec::new() },
            ends: self.tokenizer.special_ids().into_iter().chain(self.marks.eos).collect(),
            packer: reading
                .format
                .is_packed()
                .then(|| Packer::new(self.length, self.marks))
                .transpose()?,
            stream: TokenStream::default(),
            batch: Vec::new(),
            bytes: 0,
        };
        for path in paths {
            let path = path.as_ref();
            if reading.format == DataFormat::Text {
                documents::each(path, &mut |text| walk.take(Document::Text(text), path, ""))?;
            } else {
                let chat = reading.is_chat();
                // Places are added there.
                examples::each(path, reading.format, chat, &mut |document, place| {
                    walk.take(document, path, place)
                })?;
            }
            walk.flush()?;
        }
        let stream = walk.finish();
        let names =
            || paths.iter().map(|path| path.as_ref().display().to_string()).collect::<Vec<_>>();
        stream.that_teaches(reading.format, self.length).map_err(|e| e.at(names().join(", ")))
    }
}

/// A document that waits for its batch.
struct Waiting {
    document: Document,
    /// Its file and its place there.
    at: [String; 2],
}

/// Files on their way into a stream.
struct Walk<'a> {
    reader: &'a Reader<'a>,
    reading: &'a Reading,
    template: Option<&'a ChatTemplate>,
    added: Vec<String>,
    /// Tokens that end a turn.
    ends: std::collections::BTreeSet<u32>,
    packer: Option<Packer>,
    stream: TokenStream,
    batch: Vec<Waiting>,
    bytes: usize,
}

impl Walk<'_> {
    fn take(&mut self, document: Document, path: &Path, place: &str) -> Result<()> {
        self.bytes += match &document {
            Document::Text(text) => text.len(),
            Document::Example(example) => example.prompt.len() + example.completion.len(),
            Document::Chat(chat) => chat.bytes(),
            Document::Tokens(ids, _) => ids.len(),
        };
        let at = [path.display().to_string(), place.to_owned()];
        self.batch.push(Waiting { document, at });
        if self.batch.len() < BATCH && self.bytes < BATCH_BYTES {
            return Ok(());
        }
        self.flush()
    }

    /// Tokenizes what waits.
    fn flush(&mut self) -> Result<()> {
        self.bytes = 0;
        let (mut texts, mut examples, mut chats) = (Vec::new(), Vec::new(), Vec::new());
        for Waiting { document, at } in std::mem::take(&mut self.batch) {
            match document {
                Document::Text(text) => texts.push(text),
                Document::Example(example) => examples.push(example),
                Document::Chat(chat) => chats.push((chat, at)),
                Document::Tokens(ids, counts) => self.tokens(ids, counts, at)?,
            }
        }
        self.texts(&texts)?;
        if let Some(packer) = &mut self.packer {
            packer.push_examples(examples, self.reader.tokenizer)?;
        }
        self.chats(&chats)
    }

    fn texts(&mut self, texts: &[String]) -> Result<()> {
        let bos = self.reader.marks.bos;
        for ids in self.reader.tokenizer.encode_all(texts)? {
            self.stream.documents += 1;
            self.stream.lengths.push((ids.len() + usize::from(bos.is_some())) as u32);
            self.stream.tokens.extend(bos);
            self.stream.tokens.extend(ids);
        }
        Ok(())
    }

    fn tokens(&mut self, ids: Vec<u32>, counts: Vec<bool>, at: [String; 2]) -> Result<()> {
        let vocab = self.reader.vocab;
        if let Some(id) = ids.iter().find(|id| **id as usize >= vocab) {
            let what = format!("token {id} is beyond the model's vocabulary of {vocab}");
            let [file, place] = at;
            return Err(Error::preflight(what)
                .at(file)
                .at(place)
                .fix("data tokenized for this model"));
        }
        if let Some(packer) = &mut self.packer {
            packer.push(ids, counts, false);
        }
        Ok(())
    }

    fn chats(&mut self, chats: &[(Chat, [String; 2])]) -> Result<()> {
        let Some(template) = self.template else { return Ok(()) };
        let (train_on, added) = (self.reading.train_on, &self.added);
        let rendered: Vec<Result<Vec<Vec<Part>>>> =
            chats.par_iter().map(|(chat, _)| parts(template, chat, train_on, added)).collect();
        let mut all = Vec::new();
        for (rendered, (_, at)) in rendered.into_iter().zip(chats) {
            let [file, place] = at;
            let examples = rendered.map_err(|error| error.at(file).at(place))?;
            if examples.is_empty() {
                self.stream.documents += 1;
                self.stream.empty += 1;
            }
            all.extend(examples);
        }
        self.encode(all)
    }

    /// Tokenizes parts, so that each begins and ends with a token, and packs them.
    fn encode(&mut self, examples: Vec<Vec<Part>>) -> Result<()> {
        let Some(packer) = &mut self.packer else { return Ok(()) };
        let tokenizer = self.reader.tokenizer;
        let first = examples.iter().filter_map(|parts| Some(parts.first()?.text.clone()));
        let rest = examples.iter().flat_map(|parts| parts.iter().skip(1).map(|p| p.text.clone()));
        let (first, rest): (Vec<String>, Vec<String>) = (first.collect(), rest.collect());
        let mut first = tokenizer.encode_all(&first)?.into_iter();
        let mut rest = tokenizer.encode_continuations(&rest)?.into_iter();
        for parts in examples {
            let (mut ids, mut counts) = (Vec::new(), Vec::new());
            for (index, part) in parts.iter().enumerate() {
                let own = if index == 0 { first.next() } else { rest.next() }.unwrap_or_default();
                let learned = match (part.learned, self.reading.train_on) {
                    (false, _) => 0,
                    (true, TrainOn::All) => own.len(),
                    (true, _) => through_the_end(&own, &self.ends, tokenizer)?,
                };
                counts.extend((0..own.len()).map(|at| at < learned));
                ids.extend(own);
            }
            packer.push(ids, counts, false);
        }
        Ok(())
    }

    fn finish(self) -> TokenStream {
        match self.packer {
            None => self.stream,
            Some(packer) => {
                let mut stream = packer.finish();
                stream.documents += self.stream.documents;
                stream.empty += self.stream.empty;
                stream
            }
        }
    }
}

/// How many tokens of a turn are learned: up to the one that ends it. White space behind that is the
/// template's, and never asked of the model.
fn through_the_end(
    ids: &[u32],
    ends: &std::collections::BTreeSet<u32>,
    tokenizer: &Tokenizer,
) -> Result<usize> {
    let Some(last) = ids.iter().rposition(|id| ends.contains(id)) else { return Ok(ids.len()) };
    let rest = &ids[last + 1..];
    if rest.is_empty() || !tokenizer.decode(rest, false)?.trim().is_empty() {
        return Ok(ids.len());
    }
    Ok(last + 1)
}
