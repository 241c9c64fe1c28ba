//! A model behind an endpoint that speaks OpenAI's language.
//!
//! A request becomes texts to continue (`ask`), which wait in one bounded line (`line`). One thread owns the
//! model and continues them together, token by token (`scheduler`); what it says goes back as one object or as
//! events (`reply`), over connections that nobody can hold for ever (`connections`).

mod ask;
mod beginnings;
mod connections;
mod line;
mod metrics;
mod refusal;
mod reply;
mod routes;
mod scheduler;

use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::sync::Arc;
use std::time::Duration;

use burn::tensor::Device;

use self::line::Line;
use self::metrics::Metrics;
use self::routes::Shared;
use self::scheduler::Scheduler;
use crate::data::{ChatTemplate, Tokenizer};
use crate::error::{Error, Kind, Result};
use crate::export::Adapters;
use crate::model::{CausalLm, Sampler};
use crate::stop::StopFlag;

/// How long a connection may still take to say that it is cut.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// How the model reads and writes text.
#[derive(Debug)]
pub struct Language {
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Its chat template, where it has one.
    pub template: Option<ChatTemplate>,
    /// The token that opens a text.
    pub bos: Option<u32>,
    /// Tokens that end one.
    pub ends: Vec<u32>,
    /// How tokens are chosen where a request does not say.
    pub sampler: Sampler,
    /// Positions of its context.
    pub context: usize,
    /// Tokens that it knows.
    pub vocab: usize,
}

/// The model, and the names that it is known by.
#[derive(Debug)]
pub struct Served {
    /// Loaded from the base of the adapters.
    pub model: CausalLm,
    /// Where it lives.
    pub device: Device,
    /// None of them on.
    pub adapters: Adapters,
    /// The model read at narrower widths, and what it is called then.
    pub widths: Vec<(String, CausalLm)>,
    /// What the model with its own scales is called.
    pub name: String,
    /// How it reads and writes.
    pub language: Language,
}

/// What is refused, and when.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Texts that are continued together.
    pub parallel: usize,
    /// Texts that wait besides.
    pub queue: usize,
    /// Tokens of prompts whose keys and values are kept for prompts that begin alike.
    pub prefix_tokens: usize,
    /// Tokens of prompts that are computed between two tokens of those who have begun; a longer prompt comes in
    /// pieces.
    pub prompt_piece: usize,
    /// Tokens of an answer.
    pub max_tokens: Option<usize>,
    /// Bytes of a request.
    pub body: usize,
    /// From a request to the end of its answer.
    pub time: Duration,
    /// From a signal to the end of what runs.
    pub grace: Duration,
    /// What a request has to bring.
    pub key: Option<String>,
}

/// Takes the address before a model is read.
///
/// # Errors
/// When it is no address of this machine, or taken.
pub fn bind(host: &str, port: u16) -> Result<TcpListener> {
    let refused = |what: String, fix: &str| {
        Err(Error::usage(what).at(format!("{host}:{port}")).fix(fix.to_owned()))
    };
    let addresses: Vec<SocketAddr> = match (host, port).to_socket_addrs() {
        Ok(addresses) => addresses.collect(),
        Err(e) => {
            return refused(format!("the host is no address: {e}"), "--host 127.0.0.1");
        }
    };
    match TcpListener::bind(&addresses[..]) {
        Ok(listener) => Ok(listener),
        Err(e) if e.kind() == std::io::ErrorKind::AddrInUse => {
            Err(Error::failed("the port is taken: another program listens there")
                .at(format!("{host}:{port}"))
                .fix("--port with another number; 0 takes a free one"))
        }
        Err(e) => Err(Error::failed(format!("cannot listen there: {e}"))
            .at(format!("{host}:{port}"))
            .fix("--host 127.0.0.1, and a --port from 1024 up")),
    }
}

/// Answers requests until `stop` is set: an error of kind [`Kind::Stopped`] once everything has ended.
///
/// # Errors
/// That one, and when the thread that owns the model ends by itself.
pub fn serve(served: Served, limits: Limits, listener: TcpListener, stop: &StopFlag) -> Result<()> {
    let Served { model, device, adapters, widths, name, language } = served;
    let (of_widths, widths): (Vec<String>, Vec<CausalLm>) = widths.into_iter().unzip();
    let of_adapters = adapters.names().map(str::to_owned);
    let models: Vec<String> = std::iter::once(name).chain(of_adapters).chain(of_widths).collect();
    let metrics = Arc::new(Metrics::default());
    let line = Arc::new(Line::new(limits.parallel, limits.queue));
    let prompts = (limits.prefix_tokens, limits.prompt_piece);
    let models_of = (model, adapters, widths);
    let scheduler = Scheduler::new(models_of, device, &language, prompts, &line, &metrics);
    let failed = |e: std::io::Error| Error::failed(format!("cannot serve: {e}")).fix("try again");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(2)
        .build()
        .map_err(failed)?;
    let thread = std::thread::Builder::new().name("model".to_owned());
    let thread = thread.spawn(move || scheduler.run()).map_err(failed)?;
    let grace = limits.grace;
    let shared = Arc::new(Shared::new(language, models, limits, Arc::clone(&line), metrics));
    let ended = runtime.block_on(async {
        let watch = async {
            while stop.check().is_ok() && !thread.is_finished() {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        let router = routes::router(shared);
        let open = connections::accept(listener, router, watch).await?;
        line.close();
        let mut rest = std::pin::pin!(open.shutdown());
        if tokio::time::timeout(grace, &mut rest).await.is_err() {
            line.cut();
            let _ = tokio::time::timeout(LAST_WORDS, &mut rest).await;
        }
        Ok(())
    });
    line.cut();
    runtime.shutdown_background();
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
    ended.map_err(failed)?;
    stop.check().map_err(|e| match e.kind() {
        Kind::Stopped(_) => e.fix("the same command to serve again"),
        _ => e,
    })
}
