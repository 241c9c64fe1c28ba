//! What a request asks for: the fields of OpenAI's two endpoints that write text, and a few of our own.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value};

use super::Language;
use super::refusal::Refusal;
use crate::data::Chat;
use crate::model::Sampler;

/// Tokens of a completion, where a request does not say.
const COMPLETION: usize = 16;
/// The most texts that may end one.
const STOPS: usize = 16;
/// The most tokens that are told beside the one that was chosen.
const TOP_LOGPROBS: usize = 20;
/// Fields that change what is written, and what of them may be asked for: nothing.
const UNKNOWN_HERE: [&str; 10] = [
    "audio",
    "best_of",
    "echo",
    "function_call",
    "functions",
    "logit_bias",
    "suffix",
    "tool_choice",
    "tools",
    "web_search_options",
];

/// A request for text.
#[derive(Debug)]
pub(super) struct Ask {
    /// What the model was called.
    pub(super) name: String,
    /// Whose: 0 for the model's own scales, then the adapters in order, then narrower widths.
    pub(super) model: usize,
    pub(super) prompts: Vec<Vec<u32>>,
    /// Texts for each prompt.
    pub(super) copies: usize,
    pub(super) sampler: Sampler,
    /// How many of the likeliest tokens are told with each that is written, where that is asked for.
    pub(super) logprobs: Option<usize>,
    /// Tokens of a text, where the request says.
    pub(super) max_new: Option<usize>,
    pub(super) stops: Vec<String>,
    /// Whether it comes in pieces.
    pub(super) stream: bool,
    /// Whether the last piece counts tokens.
    pub(super) include_usage: bool,
    pub(super) kind: Kind,
}

/// Which endpoint.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Kind {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Completion,
}

impl Ask {
    /// Reads the body of a request.
    pub(super) fn read(
        body: &[u8],
        kind: Kind,
        language: &Language,
        models: &[String],
    ) -> Result<Self, Refusal> {
        let json: Value = serde_json::from_slice(body)
            .map_err(|e| Refusal::bad(format!("the body is not valid JSON: {e}")))?;
        let Value::Object(fields) = json else {
            return Err(Refusal::bad("the body is no JSON object"));
        };
        let fields = Fields(&fields);
        let name = fields.text("model")?.ok_or_else(|| missing("model"))?.to_owned();
        let model = models.iter().position(|known| *known == name);
        let model = model.ok_or_else(|| no_model(&name))?;
        fields.refuse_what_is_not_done()?;
        let limits = ["max_completion_tokens", "max_tokens"].map(|key| fields.whole(key, 1));
        let [newer, older] = limits;
        let asked = newer?.or(older?);
        let max_new = match kind {
            Kind::Chat => asked,
            Kind::Completion => asked.or(Some(COMPLETION)),
        };
        let options = match fields.get("stream_options") {
            None => None,
            Some(Value::Object(options)) => Some(options),
            Some(_) => return Err(fields.wrong("stream_options", "an object")),
        };
        let ask = Self {
            model,
            name,
            copies: fields.whole("n", 1)?.unwrap_or(1),
            sampler: sampler(fields, language.sampler)?,
            logprobs: logprobs(fields, kind)?,
            max_new,
            stops: stops(fields)?,
            stream: fields.flag("stream")?,
            include_usage: options
                .map_or(Ok(false), |options| Fields(options).flag("include_usage"))?,
            prompts: match kind {
                Kind::Chat => vec![conversation(fields, language)?],
                Kind::Completion => prompts(fields, language)?,
            },
            kind,
        };
        for prompt in &ask.prompts {
            fitting(prompt, language, if kind == Kind::Chat { "messages" } else { "prompt" })?;
        }
        Ok(ask)
    }
}

/// There is no such model.
pub(super) fn no_model(name: &str) -> Refusal {
    let status = axum::http::StatusCode::NOT_FOUND;
    let what = format!("there is no model `{name}` here; GET /v1/models lists them");
    Refusal::with(status, what).param("model").code("model_not_found")
}

fn missing(key: &str) -> Refusal {
    Refusal::bad(format!("`{key}` is missing")).param(key)
}

/// The fields of an object; null is as good as absent.
#[derive(Clone, Copy)]
struct Fields<'a>(&'a Map<String, Value>);

impl<'a> Fields<'a> {
    fn get(self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    fn wrong(self, key: &str, expected: &str) -> Refusal {
        let found = self.get(key).map(Value::to_string).unwrap_or_default();
        let found: String = found.chars().take(80).collect();
        Refusal::bad(format!("`{key}` is {found}, expected {expected}")).param(key)
    }

    fn text(self, key: &str) -> Result<Option<&'a str>, Refusal> {
        let text = self.get(key).map(Value::as_str);
        text.map(|text| text.ok_or_else(|| self.wrong(key, "a string"))).transpose()
    }

    fn flag(self, key: &str) -> Result<bool, Refusal> {
        let flag = self.get(key).map(Value::as_bool);
        let flag = flag.map(|flag| flag.ok_or_else(|| self.wrong(key, "true or false")));
        Ok(flag.transpose()?.unwrap_or(false))
    }

    fn whole(self, key: &str, least: usize) -> Result<Option<usize>, Refusal> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = value.as_u64().and_then(|number| usize::try_from(number).ok());
        match number.filter(|number| *number >= least) {
            Some(number) => Ok(Some(number)),
            None => Err(self.wrong(key, &format!("a whole number from {least} up"))),
        }
    }

    fn number(self, key: &str, [least, most]: [f64; 2]) -> Result<Option<f32>, Refusal> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_f64().filter(|number| (least..=most).contains(number)) {
            Some(number) => Ok(Some(number as f32)),
            None if most < f64::from(f32::MAX) => {
                Err(self.wrong(key, &format!("a number from {least} to {most}")))
            }
            None => Err(self.wrong(key, &format!("a number from {least} up"))),
        }
    }

    /// What would change the text and is not there is refused, unless it asks for nothing.
    fn refuse_what_is_not_done(self) -> Result<(), Refusal> {
        for key in UNKNOWN_HERE {
            let Some(value) = self.get(key) else { continue };
            let nothing = match value {
                Value::Bool(truth) => !truth,
                Value::Number(number) => {
                    // One best of one.
                    let nothing = f64::from(u8::from(key == "best_of"));
                    number.as_f64() == Some(nothing)
                }
                Value::String(text) => text.is_empty() || text == "none",
                Value::Array(list) => list.is_empty(),
                Value::Object(map) => map.is_empty(),
                Value::Null => true,
            };
            if !nothing {
                let what = format!("`{key}` is not supported here");
                return Err(Refusal::bad(what).param(key).code("unsupported_parameter"));
            }
        }
        let format = self.get("response_format");
        match format.map(|format| format.get("type").and_then(Value::as_str)) {
            None | Some(Some("text")) => Ok(()),
            Some(_) => {
                Err(Refusal::bad("only a `response_format` of type `text` is supported here")
                    .param("response_format")
                    .code("unsupported_parameter"))
            }
        }
    }
}

fn sampler(fields: Fields<'_>, otherwise: Sampler) -> Result<Sampler, Refusal> {
    let least = f64::from(f32::MIN_POSITIVE);
    let top_k = match fields.get("top_k") {
        // As vLLM says it.
        Some(value) if value.as_i64() == Some(-1) => Some(0),
        _ => fields.whole("top_k", 0)?,
    };
    let seed = match fields.get("seed") {
        None => drawn(),
        Some(value) => {
            let signed = value.as_i64().map(i64::cast_unsigned);
            signed.or(value.as_u64()).ok_or_else(|| fields.wrong("seed", "a whole number"))?
        }
    };
    Ok(Sampler {
        temperature: fields.number("temperature", [0.0, 2.0])?.unwrap_or(otherwise.temperature),
        top_k: top_k.unwrap_or(otherwise.top_k),
        top_p: fields.number("top_p", [0.0, 1.0])?.unwrap_or(otherwise.top_p),
        min_p: fields.number("min_p", [0.0, 1.0])?.unwrap_or(otherwise.min_p),
        repetition_penalty: fields
            .number("repetition_penalty", [least, f64::from(f32::MAX)])?
            .unwrap_or(otherwise.repetition_penalty),
        frequency_penalty: fields
            .number("frequency_penalty", [-2.0, 2.0])?
            .unwrap_or(otherwise.frequency_penalty),
        presence_penalty: fields
            .number("presence_penalty", [-2.0, 2.0])?
            .unwrap_or(otherwise.presence_penalty),
        seed,
    })
}

/// How many of the likeliest tokens are told with each: by two fields of a chat, and by one of a completion.
fn logprobs(fields: Fields<'_>, kind: Kind) -> Result<Option<usize>, Refusal> {
    let number = |key: &str| match fields.whole(key, 0)? {
        Some(number) if number > TOP_LOGPROBS => {
            Err(fields.wrong(key, &format!("at most {TOP_LOGPROBS}")))
        }
        number => Ok(number),
    };
    match kind {
        Kind::Completion if fields.get("logprobs").is_some_and(Value::is_boolean) => {
            // As a chat says it; without, nothing is asked for.
            if fields.flag("logprobs")? {
                Err(fields.wrong("logprobs", "a number"))
            } else {
                Ok(None)
            }
        }
        Kind::Completion => number("logprobs"),
        Kind::Chat => match (fields.flag("logprobs")?, number("top_logprobs")?) {
            (true, top) => Ok(Some(top.unwrap_or(0))),
            (false, None | Some(0)) => Ok(None),
            (false, Some(_)) => {
                Err(Refusal::bad("`top_logprobs` needs `logprobs`: true").param("top_logprobs"))
            }
        },
    }
}

/// A seed that nobody asked for.
fn drawn() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    RandomState::new().hash_one(now)
}

fn stops(fields: Fields<'_>) -> Result<Vec<String>, Refusal> {
    let expected = format!("a string or a list of at most {STOPS}, none of them empty");
    let wrong = || fields.wrong("stop", &expected);
    let list = match fields.get("stop") {
        None => return Ok(Vec::new()),
        Some(Value::Array(list)) => list.as_slice(),
        Some(one) => std::slice::from_ref(one),
    };
    let text = |value: &Value| value.as_str().filter(|text| !text.is_empty()).map(str::to_owned);
    let texts: Option<Vec<String>> = list.iter().map(text).collect();
    texts.filter(|texts| texts.len() <= STOPS).ok_or_else(wrong)
}

/// The conversation in the words of the chat template.
fn conversation(fields: Fields<'_>, language: &Language) -> Result<Vec<u32>, Refusal> {
    let messages = fields.get("messages").ok_or_else(|| missing("messages"))?;
    let wrong = |what: String| Refusal::bad(what).param("messages");
    let mut chat = Chat::of_messages(messages).map_err(wrong)?;
    for message in &mut chat.messages {
        // The newer word for it, which templates do not know.
        if message.get("role").and_then(Value::as_str) == Some("developer") {
            message["role"] = Value::from("system");
        }
    }
    let Some(template) = &language.template else {
        let what = "the model has no chat template; /v1/completions continues plain text";
        return Err(Refusal::bad(what).code("no_chat_template"));
    };
    let of_request;
    let template = match fields.get("chat_template_kwargs") {
        None => template,
        Some(Value::Object(kwargs)) => {
            let all = template.kwargs().iter().chain(kwargs);
            let all = all.map(|(key, value)| (key.clone(), value.clone())).collect();
            let of_kwargs = template.clone().with_kwargs(all);
            of_request = of_kwargs.map_err(|e| Refusal::from(e).param("chat_template_kwargs"))?;
            &of_request
        }
        Some(_) => return Err(fields.wrong("chat_template_kwargs", "an object")),
    };
    let text = template.render(&chat, true).map_err(|e| Refusal::from(e).param("messages"))?;
    Ok(language.tokenizer.encode(&text)?)
}

/// The prompts of a completion: one or several, as text or as tokens.
fn prompts(fields: Fields<'_>, language: &Language) -> Result<Vec<Vec<u32>>, Refusal> {
    let prompt = fields.get("prompt").ok_or_else(|| missing("prompt"))?;
    let wrong = || fields.wrong("prompt", "a string, a list of strings, tokens or lists of tokens");
    let one = |prompt: &Value| match prompt {
        Value::String(text) => {
            let mut tokens: Vec<u32> = language.bos.into_iter().collect();
            tokens.extend(language.tokenizer.encode(text)?);
            Ok(tokens)
        }
        Value::Array(tokens) => {
            let token = |value: &Value| {
                let token = value.as_u64().and_then(|token| u32::try_from(token).ok());
                let token = token.ok_or_else(wrong)?;
                let known = (token as usize) < language.vocab;
                known.then_some(token).ok_or_else(|| {
                    let what = format!("token {token} is none of the model's {}", language.vocab);
                    Refusal::bad(what).param("prompt")
                })
            };
            tokens.iter().map(token).collect()
        }
        _ => Err(wrong()),
    };
    match prompt {
        Value::Array(list) if list.first().is_some_and(|first| !first.is_number()) => {
            list.iter().map(one).collect()
        }
        prompt => Ok(vec![one(prompt)?]),
    }
}

/// Refuses a prompt that the context has no room behind.
fn fitting(prompt: &[u32], language: &Language, param: &str) -> Result<(), Refusal> {
    let (count, limit) = (prompt.len(), language.context);
    if count == 0 {
        return Err(Refusal::bad("the prompt is empty").param(param));
    }
    if count >= limit {
        let what = format!("the prompt has {count} tokens, and the model's context {limit}");
        return Err(Refusal::bad(what).param(param).code("context_length_exceeded"));
    }
    Ok(())
}
