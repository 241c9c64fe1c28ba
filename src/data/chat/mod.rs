//! Chat templates: a conversation as the text that a model was trained to read.
//!
//! Templates are Jinja, rendered by minijinja with what `transformers` gives them
//! (`apply_chat_template`): `messages`, `tools`, `documents`, `add_generation_prompt`, the special tokens by
//! name, `raise_exception`, `strftime_now`, `tojson`, blocks trimmed and stripped. A template is the text of a
//! stranger: it reads no file, includes nothing, and is stopped when it takes too much work or memory.

mod generation;
mod mask;
mod messages;
mod python;

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use jiff::civil::DateTime;
use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, ErrorKind, State, Value};
use serde_json::{Map, Value as Json};

pub use self::mask::{Part, TrainOn, parts};
pub use self::messages::{Chat, Role};
use crate::error::{Error, Result};

/// The template of its name that is taken where there are tools.
const TOOL_USE: &str = "tool_use";
/// The one that is taken else.
const DEFAULT: &str = "default";
/// The most bytes of one template.
const LONGEST: usize = 1 << 20;
/// Work that any rendering may take: an instruction each, or 64 bytes.
const FUEL: u64 = 1 << 21;
/// And more of it for each byte of the conversation.
const FUEL_PER_BYTE: u64 = 4;
/// Special tokens that templates know by name.
const SPECIAL: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];
/// Names that a rendering gives itself.
pub const RESERVED: [&str; 4] = ["messages", "tools", "documents", "add_generation_prompt"];

/// What `strftime_now` says the time is.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Clock {
    /// The time of this machine and its zone.
    #[default]
    Now,
    /// A time that stays.
    At(DateTime),
    /// Nothing: a template that asks is refused. For data sets, which have to be the same tomorrow.
    Unset,
}

/// The chat template of a model, or several under names.
#[derive(Clone)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    names: Vec<String>,
    /// The file it came from, for messages.
    place: String,
    special: BTreeMap<String, String>,
    /// What further names in the template stand for.
    kwargs: Map<String, Json>,
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ChatTemplate({}: {})", self.place, self.names.join(", "))
    }
}

impl ChatTemplate {
    /// The template of a model folder: `chat_template.jinja` with `additional_chat_templates/*.jinja`, else the
    /// `chat_template` of `tokenizer_config.json`; `None` where there is none.
    ///
    /// # Errors
    /// When a file cannot be read, or a template is no Jinja.
    pub fn of_folder(dir: &Path) -> Result<Option<Self>> {
        let config = json_of(&dir.join("tokenizer_config.json"))?;
        let map = json_of(&dir.join("special_tokens_map.json"))?;
        let special = special_tokens(&config, &map);
        let mut sources = of_config(&config).map_err(|e| e.at(dir.join(CONFIG).display()))?;
        let mut place = dir.join(CONFIG);
        let main = dir.join("chat_template.jinja");
        if main.is_file() {
            sources = BTreeMap::from([(DEFAULT.to_owned(), text_of(&main)?)]);
            place.clone_from(&main);
        }
        let more = dir.join("additional_chat_templates");
        if more.is_dir() {
            for path in crate::store::folder::entries(&more)? {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                if let Some(name) = name.strip_suffix(".jinja") {
                    sources.insert(name.to_owned(), text_of(&path)?);
                    if !main.is_file() && sources.len() == 1 {
                        place.clone_from(&more);
                    }
                }
            }
        }
        let place = place.display().to_string();
        (!sources.is_empty()).then(|| Self::of_sources(sources, special, place)).transpose()
    }

    /// The template in the text of a `tokenizer_config.json`, which came from `place`.
    ///
    /// # Errors
    /// When the text is not JSON, or the template no Jinja.
    pub fn of_config(config: &str, place: &Path) -> Result<Option<Self>> {
        let config: Json = serde_json::from_str(config).map_err(|error| {
            Error::damaged(format!("the tokenizer's settings are not valid JSON: {error}"), ITS_OWN)
                .at(place.display())
        })?;
        let sources = of_config(&config).map_err(|e| e.at(place.display()))?;
        let special = special_tokens(&config, &Json::Null);
        let place = place.display().to_string();
        (!sources.is_empty()).then(|| Self::of_sources(sources, special, place)).transpose()
    }

    /// A template from its text, with the special tokens that it knows by name; `place` says where it came
    /// from.
    ///
    /// # Errors
    /// When it is no Jinja.
    pub fn new(source: &str, special: BTreeMap<String, String>, place: &str) -> Result<Self> {
        let sources = BTreeMap::from([(DEFAULT.to_owned(), source.to_owned())]);
        Self::of_sources(sources, special, place.to_owned())
    }

    fn of_sources(
        sources: BTreeMap<String, String>,
        special: BTreeMap<String, String>,
        place: String,
    ) -> Result<Self> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| Error::failed(e.to_string()))?);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_debug(true);
        environment.set_fuel(Some(FUEL));
        python::install(&mut environment);
        environment.add_function("raise_exception", raise);
        let names = sources.keys().cloned().collect();
        for (name, source) in sources {
            if source.len() > LONGEST {
                let what = format!("the chat template `{name}` has {} bytes", source.len());
                return Err(Error::damaged(what, ITS_OWN).at(place));
            }
            let source = source.replace("\r\n", "\n").replace('\r', "\n");
            let added = environment.add_template_owned(name.clone(), generation::replaced(&source));
            added.map_err(|error| {
                let what = format!("the chat template is no Jinja: {}", told(&error));
                Error::damaged(what, ITS_OWN).at(&place).at(lined(&name, &error))
            })?;
        }
        let template = Self { environment, names, place, special, kwargs: Map::new() };
        Ok(template.with_clock(Clock::Now))
    }

    /// The same with another clock.
    #[must_use]
    pub fn with_clock(mut self, clock: Clock) -> Self {
        self.environment.add_function("strftime_now", move |format: &str| now(clock, format));
        self
    }

    /// The same with values for further names, such as `enable_thinking`.
    ///
    /// # Errors
    /// When a name is one that every rendering sets.
    pub fn with_kwargs(mut self, kwargs: Map<String, Json>) -> Result<Self> {
        if let Some(name) = RESERVED.iter().find(|name| kwargs.contains_key(**name)) {
            let what = format!("`{name}` of a chat template comes from the conversation");
            return Err(Error::usage(what).fix("other names, such as enable_thinking"));
        }
        self.kwargs = kwargs;
        Ok(self)
    }

    /// What further names stand for.
    pub fn kwargs(&self) -> &Map<String, Json> {
        &self.kwargs
    }

    /// Where it came from: a file, or the model's `tokenizer_config.json`.
    pub fn place(&self) -> &str {
        &self.place
    }

    /// The text of a conversation; `prompt` asks for the opening of the answer behind it.
    ///
    /// # Errors
    /// What the template raises, with its name; also when it does not end, or says too much.
    pub fn render(&self, chat: &Chat, prompt: bool) -> Result<String> {
        self.render_first(chat, chat.messages.len(), prompt)
    }

    /// The text of the first `count` messages of a conversation.
    ///
    /// # Errors
    /// As [`render`](Self::render).
    pub fn render_first(&self, chat: &Chat, count: usize, prompt: bool) -> Result<String> {
        if count == 0 {
            return Err(
                Error::preflight("the conversation has no message").fix("at least one message")
            );
        }
        let name = self.choose(chat.tools.is_some())?;
        let mut context = BTreeMap::new();
        let mut put = |name: &str, value: Value| _ = context.insert(name.to_owned(), value);
        for (name, token) in &self.special {
            put(name, Value::from(token.as_str()));
        }
        for (name, value) in &self.kwargs {
            put(name, value_of(value));
        }
        put("messages", chat.messages[..count].iter().map(value_of).collect());
        put("tools", chat.tools.as_deref().map_or(Value::from(()), list_of));
        put("documents", chat.documents.as_deref().map_or(Value::from(()), list_of));
        put("add_generation_prompt", Value::from(prompt));
        let context = Value::from_pairs(context);
        let fuel = FUEL_PER_BYTE.saturating_mul(chat.bytes() as u64);
        let rendered = if fuel > FUEL / 4 {
            let mut environment = self.environment.clone();
            environment.set_fuel(Some(FUEL + fuel));
            environment.get_template(name).and_then(|template| template.render(context))
        } else {
            self.environment.get_template(name).and_then(|template| template.render(context))
        };
        rendered.map_err(|error| self.failure(name, &error))
    }

    /// The template for a conversation with tools or without.
    fn choose(&self, tools: bool) -> Result<&str> {
        let has = |name: &str| self.names.iter().any(|own| own == name);
        let wanted = if tools && has(TOOL_USE) { TOOL_USE } else { DEFAULT };
        match (has(wanted), &self.names[..]) {
            (true, _) => Ok(wanted),
            (false, [one]) => Ok(one),
            (false, several) => {
                let what =
                    format!("the model has chat templates {}, and no default", several.join(", "));
                Err(Error::preflight(what).at(&self.place).fix("one of them in a file of its own"))
            }
        }
    }

    fn failure(&self, name: &str, error: &minijinja::Error) -> Error {
        if let Some(refusal) = cause::<Raised>(error) {
            return Error::preflight(format!("the chat template refuses it: {}", refusal.0))
                .at(format!("{}, template `{name}`", self.place))
                .fix("a conversation as the model's template wants it, or another template");
        }
        let at = format!("{}, {}", self.place, lined(name, error));
        if cause::<NoClock>(error).is_some() {
            return Error::preflight(
                "the chat template asks for today's date, and data must not change",
            )
            .at(at)
            .fix("date = \"2024-07-26\" beside the data's path, or any other");
        }
        if is_exhausted(error) {
            return Error::preflight(
                "the chat template does not come to an end, or its text does not: it was stopped",
            )
            .at(at)
            .fix("the chat template that belongs to this model");
        }
        Error::preflight(format!("the chat template fails: {}", told(error)))
            .at(at)
            .fix("a conversation as the model's template wants it, or another template")
    }
}

/// Files that say more than one thing about a tokenizer.
const CONFIG: &str = "tokenizer_config.json";
/// What to do about a template that is none.
const ITS_OWN: &str = "the chat template that belongs to this model";

/// What a template raised.
#[derive(Debug)]
struct Raised(String);

/// There is no clock.
#[derive(Debug)]
struct NoClock;

impl fmt::Display for Raised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for NoClock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("there is no clock")
    }
}

impl std::error::Error for Raised {}
impl std::error::Error for NoClock {}

fn raise(state: &State, message: &Value) -> Result<Value, minijinja::Error> {
    // One line, and not a book.
    let text = python::shown(state, message)?;
    let text: String = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let raised = Raised(text.chars().take(400).collect());
    let error = minijinja::Error::new(ErrorKind::InvalidOperation, raised.0.clone());
    Err(error.with_source(raised))
}

fn now(clock: Clock, format: &str) -> Result<String, minijinja::Error> {
    let failed = |what: String| minijinja::Error::new(ErrorKind::InvalidOperation, what);
    let time = match clock {
        Clock::Now => jiff::ZonedDateTime::now().datetime(),
        Clock::At(time) => time,
        Clock::Unset => {
            return Err(failed("there is no clock".to_owned()).with_source(NoClock));
        }
    };
    // Python's time here has no zone, and its fractions six digits.
    let format = format.replace("%z", "").replace("%Z", "").replace("%f", "%6f");
    jiff::fmt::strtime::format(&format, time).map_err(|error| failed(error.to_string()))
}

/// An error behind an error.
fn cause<T: std::error::Error + 'static>(error: &minijinja::Error) -> Option<&T> {
    let mut next = std::error::Error::source(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<T>() {
            return Some(found);
        }
        next = error.source();
    }
    None
}

/// Whether work or depth ran out.
fn is_exhausted(error: &minijinja::Error) -> bool {
    let mut next: Option<&dyn std::error::Error> = Some(error);
    while let Some(error) = next {
        if error
            .downcast_ref::<minijinja::Error>()
            .is_some_and(|e| e.kind() == ErrorKind::OutOfFuel)
        {
            return true;
        }
        next = error.source();
    }
    error.detail().is_some_and(|detail| detail.contains("recursion"))
}

/// What an error says, without the place.
fn told(error: &minijinja::Error) -> String {
    let text = match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    };
    text.split_whitespace().collect::<Vec<_>>().join(" ").chars().take(300).collect()
}

fn lined(name: &str, error: &minijinja::Error) -> String {
    match error.line() {
        Some(line) => format!("template `{name}`, line {line}"),
        None => format!("template `{name}`"),
    }
}

fn text_of(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).map_err(|source| Error::io("read", path, &source))
}

/// The parsed file, or null where there is none.
fn json_of(path: &Path) -> Result<Json> {
    if !path.is_file() {
        return Ok(Json::Null);
    }
    serde_json::from_str(&text_of(path)?).map_err(|error| {
        Error::damaged(
            format!("the file is not valid JSON: {error}"),
            "the file that belongs to this model",
        )
        .at(path.display())
    })
}

/// The templates of a tokenizer's settings, by name.
fn of_config(config: &Json) -> Result<BTreeMap<String, String>> {
    let odd =
        || Error::damaged("`chat_template` is neither a template nor a list of them", ITS_OWN);
    match config.get("chat_template") {
        None | Some(Json::Null) => Ok(BTreeMap::new()),
        Some(Json::String(text)) => Ok(BTreeMap::from([(DEFAULT.to_owned(), text.clone())])),
        Some(Json::Array(list)) => {
            let named = |entry: &Json| {
                let text = |key: &str| entry.get(key).and_then(Json::as_str).map(str::to_owned);
                text("name").zip(text("template"))
            };
            list.iter().map(|entry| named(entry).ok_or_else(odd)).collect()
        }
        Some(_) => Err(odd()),
    }
}

/// The special tokens of a tokenizer's settings, or of the older file beside them.
pub(super) fn special_tokens(config: &Json, map: &Json) -> BTreeMap<String, String> {
    let token = |name: &str| {
        let of = |file: &Json| {
            let token = file.get(name)?;
            token.as_str().or_else(|| token.get("content")?.as_str()).map(str::to_owned)
        };
        if config.get(name).is_some() { of(config) } else { of(map) }
    };
    SPECIAL.iter().filter_map(|name| Some(((*name).to_owned(), token(name)?))).collect()
}

fn list_of(list: &[Json]) -> Value {
    list.iter().map(value_of).collect()
}

/// JSON as a template sees it.
fn value_of(json: &Json) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(truth) => Value::from(*truth),
        Json::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(whole), _) => Value::from(whole),
            (None, Some(whole)) => Value::from(whole),
            (None, None) => Value::from(number.as_f64().unwrap_or(f64::NAN)),
        },
        Json::String(text) => Value::from(text.as_str()),
        Json::Array(list) => list_of(list),
        Json::Object(map) => {
            Value::from_pairs(map.iter().map(|(key, value)| (key.as_str(), value_of(value))))
        }
    }
}
