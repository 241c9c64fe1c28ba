//! `fewbit serve`: the model behind an endpoint that speaks OpenAI's language.

use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::path::Path;
use std::time::Duration;

use clap::Args;
use serde_json::{Map, Value};

use super::chat::{check_names, named};
use super::{ModelArgs, output};
use crate::error::{Error, Result};
use crate::export::{Adapter, Adapters};
use crate::model::CausalLm;
use crate::quant::Bits;
use crate::serve::{self, Language, Limits, Served};
use crate::stop::StopFlag;

/// Where the key may be besides the command line, which other users of a machine can read.
const KEY: &str = "FEWBIT_API_KEY";

/// Arguments of `serve`.
#[derive(Args, Debug)]
pub(super) struct ServeArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// A scale adapter for the model, which is then the packed base it was trained on; may be given
    /// several times. Requests name it NAME in place of the model [default: the name in the file]
    #[arg(long, value_name = "[NAME=]FILE")]
    adapter: Vec<String>,
    /// What requests call the model [default: the last part of --model, of a hub id all of it]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// The address to listen at; 0.0.0.0 lets other machines in
    #[arg(long, default_value = "127.0.0.1")]
    host: String,
    /// The port to listen at; 0 takes a free one
    #[arg(long, value_name = "N", default_value_t = 8080)]
    port: u16,
    /// What requests have to bring as a bearer token [default: FEWBIT_API_KEY, or nothing]
    #[arg(long, value_name = "KEY")]
    api_key: Option<String>,
    /// Texts that are continued together
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = at_least_one)]
    parallel: usize,
    /// Texts that wait besides; a request beyond them is answered 429
    #[arg(long, value_name = "N", default_value_t = 256)]
    queue: usize,
    /// Tokens of prompts that are remembered for prompts that begin alike; 0 for none
    #[arg(long, value_name = "N", default_value_t = 4096)]
    prefix_cache: usize,
    /// Tokens of prompts computed between two tokens of running texts; a longer prompt comes in pieces
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = at_least_one)]
    prompt_piece: usize,
    /// Tokens of an answer at most [default: what the model's context has room for]
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    max_tokens: Option<usize>,
    /// Size of a request at most
    #[arg(long, value_name = "KIB", default_value_t = 4096, value_parser = at_least_one)]
    max_body: usize,
    /// Time from a request to the end of its answer; a text is cut there
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    timeout: u64,
    /// Time that running answers get after Ctrl-C or SIGTERM
    #[arg(long, value_name = "SECONDS", default_value_t = 5, value_parser = clap::value_parser!(u64).range(0..=1_000_000))]
    grace: u64,
    /// Values for names in the chat template, as JSON: {"enable_thinking": false}
    #[arg(long, value_name = "JSON", value_parser = super::dialogue::kwargs)]
    chat_template_kwargs: Option<Map<String, Value>>,
}

pub(super) fn run(args: &ServeArgs, stop: &StopFlag) -> Result<()> {
    let key = key(args)?;
    let adapters: Vec<(String, Adapter)> =
        args.adapter.iter().map(|text| named(text)).collect::<Result<_>>()?;
    check_names(&adapters)?;
    let name = args.name.clone().unwrap_or_else(|| name_of(&args.model.model));
    if adapters.iter().any(|(adapter, _)| *adapter == name) {
        return Err(Error::usage(format!("the model and an adapter are both named {name}"))
            .at("--adapter")
            .fix("--name with another name, or --adapter NAME=FILE"));
    }
    // Taken first: a port that somebody else has is found before the model is read.
    let listener = serve::bind(&args.host, args.port)?;
    let session = args.model.open()?;
    let (opened, tokenizer) = (&session.opened, session.tokenizer()?);
    let generation = opened.generation()?;
    let template = opened.chat_template()?.map(|template| {
        let kwargs = args.chat_template_kwargs.clone().unwrap_or_default();
        template.with_kwargs(kwargs).map_err(|e| e.at("--chat-template-kwargs"))
    });
    let template = template.transpose()?;
    let adapters = Adapters::new(opened, &adapters)?;
    let model = session.load()?;
    let widths = match args.model.bits {
        None => session.narrower(&model)?,
        Some(_) => Vec::new(),
    };
    let at = |(bits, model): (Bits, CausalLm)| (format!("{name}@{bits}bit"), model);
    let widths: Vec<(String, CausalLm)> = widths.into_iter().map(at).collect();
    stop.check()?;
    let has_template = template.is_some();
    let language = Language {
        bos: session.bos(&tokenizer)?,
        sampler: generation.sampler()?,
        ends: generation.ends,
        context: opened.config.max_positions,
        vocab: opened.config.vocab,
        tokenizer,
        template,
    };
    let limits = Limits {
        parallel: args.parallel,
        queue: args.queue,
        prefix_tokens: args.prefix_cache,
        prompt_piece: args.prompt_piece,
        max_tokens: args.max_tokens,
        body: args.max_body.saturating_mul(1024),
        time: Duration::from_secs(args.timeout),
        grace: Duration::from_secs(args.grace),
        key,
    };
    tell(args, &session.device.name, &listener, &limits, has_template)?;
    let device = session.device.device.clone();
    let served = Served { model, device, adapters, widths, name, language };
    serve::serve(served, limits, listener, stop)
}

/// Says where it listens, on stdout, and what there is to know, on stderr.
fn tell(
    args: &ServeArgs,
    device: &str,
    listener: &TcpListener,
    limits: &Limits,
    has_template: bool,
) -> Result<()> {
    let address = listener.local_addr();
    let address = address.map_err(|e| Error::failed(format!("cannot listen there: {e}")))?;
    if !has_template {
        output::aside("the model has no chat template: only /v1/completions has an answer\n");
    }
    if limits.key.is_none() && !address.ip().is_loopback() {
        output::aside("anybody who reaches this machine may ask: --api-key KEY asks for a key\n");
    }
    let shown = match address.ip() {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) => format!("0.0.0.0:{}", address.port()),
        _ => address.to_string(),
    };
    let model = &args.model.model;
    output::line(&format!("{model} on {device}, listening at http://{shown}/v1"))
}

/// The key of the command line or of the environment.
fn key(args: &ServeArgs) -> Result<Option<String>> {
    let (given, place) = match (&args.api_key, std::env::var(KEY)) {
        (Some(key), _) => (Some(key.clone()), "--api-key"),
        (None, Ok(key)) => (Some(key), KEY),
        (None, Err(_)) => (None, KEY),
    };
    match &given {
        Some(key) if key.trim() != key || key.is_empty() || !key.is_ascii() => {
            Err(Error::usage("the API key is empty, or holds what no HTTP header can carry")
                .at(place)
                .fix("a key of letters and digits"))
        }
        _ => Ok(given),
    }
}

/// What a model is called: the last part of its path, but a hub id as it is.
fn name_of(model: &str) -> String {
    let path = Path::new(model);
    let canonical = path.canonicalize().ok().filter(|_| path.exists());
    let last = canonical.as_deref().and_then(Path::file_name).map(|name| name.to_string_lossy());
    last.map_or_else(|| model.to_owned(), std::borrow::Cow::into_owned)
}

fn at_least_one(text: &str) -> Result<usize, String> {
    let number = text.parse().ok().filter(|number: &usize| *number > 0);
    number.ok_or_else(|| "a whole number from 1 up".to_owned())
}
