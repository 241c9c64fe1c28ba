//! Paths, and what is done before a request is read.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Path, Request, State};
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use futures_util::{StreamExt, stream};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;

use super::ask::{Ask, Kind, no_model};
use super::line::{Line, Text};
use super::metrics::Metrics;
use super::refusal::Refusal;
use super::reply::{Reply, now};
use super::{Language, Limits};

/// How long the body of a request may take.
const BODY: Duration = Duration::from_secs(30);
/// How much of a body that is too large is read, in limits, before it is refused: a client that still sends
/// does not read.
const READ_ON: usize = 8;
/// Pieces that wait for a client to read them.
const PIECES: usize = 64;

/// What every request needs.
pub(super) struct Shared {
    language: Language,
    /// Names, the model's own first.
    models: Vec<String>,
    limits: Limits,
    line: Arc<Line>,
    metrics: Arc<Metrics>,
    /// Of the key.
    key: Option<[u8; 32]>,
    started: u64,
    count: AtomicU64,
}

type Here = State<Arc<Shared>>;

impl Shared {
    pub(super) fn new(
        language: Language,
        models: Vec<String>,
        limits: Limits,
        line: Arc<Line>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let key = limits.key.as_ref().map(|key| Sha256::digest(key).into());
        let (started, count) = (now(), AtomicU64::default());
        Self { language, models, limits, line, metrics, key, started, count }
    }

    fn object_of(&self, index: usize, name: &str) -> Value {
        let mut object = json!({
            "id": name,
            "object": "model",
            "created": self.started,
            "owned_by": "fewbit",
            "max_model_len": self.language.context,
        });
        if index > 0 {
            object["parent"] = self.models[0].clone().into();
        }
        object
    }
}

pub(super) fn router(shared: Arc<Shared>) -> Router {
    let guarded = Router::new()
        .route("/v1/models", get(models))
        .route("/v1/models/{*name}", get(model))
        .route("/v1/chat/completions", post(chat))
        .route("/v1/completions", post(completion))
        .layer(from_fn_with_state(Arc::clone(&shared), guard));
    Router::new()
        .route("/health", get(health))
        .route("/metrics", get(metrics))
        .merge(guarded)
        .fallback(nowhere)
        .method_not_allowed_fallback(otherwise)
        .layer(from_fn_with_state(Arc::clone(&shared), counted))
        .with_state(shared)
}

/// Counts requests.
async fn counted(State(shared): Here, request: Request, next: Next) -> Response {
    let path = match request.uri().path() {
        "/v1/models" => "/v1/models",
        "/v1/chat/completions" => "/v1/chat/completions",
        "/v1/completions" => "/v1/completions",
        "/health" => "/health",
        "/metrics" => "/metrics",
        path if path.starts_with("/v1/models/") => "/v1/models/{name}",
        _ => "other",
    };
    let response = next.run(request).await;
    shared.metrics.request(path, response.status().as_u16());
    response
}

/// Lets in who has the key.
async fn guard(State(shared): Here, request: Request, next: Next) -> Response {
    if let Some(key) = shared.key {
        let given = request.headers().get(header::AUTHORIZATION).map(HeaderValue::as_bytes);
        let given = given.and_then(|value| {
            let (scheme, rest) = value.split_at_checked("Bearer ".len())?;
            scheme.eq_ignore_ascii_case(b"Bearer ").then_some(rest)
        });
        // Of hashes nobody learns anything by the time that a comparison takes.
        if given.is_none_or(|given| <[u8; 32]>::from(Sha256::digest(given)) != key) {
            return Refusal::key().into_response();
        }
    }
    next.run(request).await
}

async fn nowhere(request: Request) -> Refusal {
    let (method, path) = (request.method(), request.uri().path());
    Refusal::with(StatusCode::NOT_FOUND, format!("there is no {method} {path} here"))
}

async fn otherwise(request: Request) -> Refusal {
    let (method, path) = (request.method(), request.uri().path());
    let other = if *method == Method::POST { Method::GET } else { Method::POST };
    let what = format!("{path} takes {other}, not {method}");
    Refusal::with(StatusCode::METHOD_NOT_ALLOWED, what)
}

async fn health() -> Response {
    json_of(&json!({ "status": "ok" }))
}

async fn metrics(State(shared): Here) -> Response {
    let text = shared.metrics.text_of(shared.line.lengths());
    typed(Body::from(text), "text/plain; version=0.0.4; charset=utf-8")
}

async fn models(State(shared): Here) -> Response {
    let names = shared.models.iter().enumerate();
    let data: Vec<Value> = names.map(|(index, name)| shared.object_of(index, name)).collect();
    json_of(&json!({ "object": "list", "data": data }))
}

async fn model(State(shared): Here, Path(name): Path<String>) -> Result<Response, Refusal> {
    let index = shared.models.iter().position(|known| *known == name);
    index.map(|index| json_of(&shared.object_of(index, &name))).ok_or_else(|| no_model(&name))
}

async fn chat(State(shared): Here, request: Request) -> Result<Response, Refusal> {
    write(shared, request, Kind::Chat).await
}

async fn completion(State(shared): Here, request: Request) -> Result<Response, Refusal> {
    write(shared, request, Kind::Completion).await
}

/// A request for text, from its body to its answer or the beginning of it.
async fn write(shared: Arc<Shared>, request: Request, kind: Kind) -> Result<Response, Refusal> {
    let asked = Instant::now();
    let body = body_of(request, shared.limits.body).await?;
    let reading = Arc::clone(&shared);
    let read = move || Ask::read(&body, kind, &reading.language, &reading.models);
    let ask = tokio::task::spawn_blocking(read).await;
    let ask = ask.map_err(|_| Refusal::failed("the request could not be read"))??;
    let reply = enqueue(&shared, ask, asked)?;
    if !reply.ask.stream {
        let object = reply.whole(&shared.language.tokenizer, &shared.metrics).await?;
        shared.metrics.answered(asked.elapsed());
        return Ok(json_of(&object));
    }
    let (send, receive) = mpsc::channel(PIECES);
    tokio::spawn(async move {
        reply.pieces(&shared.language.tokenizer, &shared.metrics, send).await;
        shared.metrics.answered(asked.elapsed());
    });
    let pieces = stream::unfold(receive, |mut receive: mpsc::Receiver<String>| async move {
        receive.recv().await.map(|piece| (Ok::<_, Infallible>(piece), receive))
    });
    let mut response = typed(Body::from_stream(pieces), "text/event-stream");
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    Ok(response)
}

/// The body, which has to be JSON by its own word: no page of another site can send that unasked.
async fn body_of(request: Request, limit: usize) -> Result<Vec<u8>, Refusal> {
    let kind = request.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    let kind = kind.unwrap_or_default().split(';').next().unwrap_or_default().trim();
    if !kind.eq_ignore_ascii_case("application/json") {
        let what = "the content type is not application/json";
        return Err(Refusal::with(StatusCode::UNSUPPORTED_MEDIA_TYPE, what));
    }
    let (mut body, mut pieces) = (Vec::new(), request.into_body().into_data_stream());
    let mut length = 0usize;
    let all = async {
        while length <= limit.saturating_mul(READ_ON)
            && let Some(piece) = pieces.next().await
        {
            let piece: Bytes = piece.map_err(|e| Refusal::bad(format!("the body is cut: {e}")))?;
            length += piece.len();
            if length <= limit {
                body.extend_from_slice(&piece);
            }
        }
        Ok::<(), Refusal>(())
    };
    let Ok(all) = tokio::time::timeout(BODY, all).await else {
        let what = "the body did not come in time";
        return Err(Refusal::with(StatusCode::REQUEST_TIMEOUT, what));
    };
    all?;
    if length > limit {
        let what = format!("the body is larger than {limit} bytes");
        return Err(Refusal::with(StatusCode::PAYLOAD_TOO_LARGE, what));
    }
    Ok(body)
}

/// Puts a request's texts in the line.
fn enqueue(shared: &Shared, ask: Ask, asked: Instant) -> Result<Reply, Refusal> {
    let (count, most) = (ask.prompts.len().saturating_mul(ask.copies), shared.line.most());
    if count > most {
        let what = format!("the request asks for {count} texts, and the server takes {most}");
        return Err(Refusal::bad(what).param("n"));
    }
    let (send, events) = mpsc::unbounded_channel();
    let enough: Vec<Arc<AtomicBool>> = (0..count).map(|_| Arc::default()).collect();
    let text = |(index, enough): (usize, &Arc<AtomicBool>)| {
        let tokens = ask.prompts[index / ask.copies].clone();
        // Position by position it fits, and one token more.
        let room = shared.language.context + 1 - tokens.len();
        let most = shared.limits.max_tokens.unwrap_or(room).min(room);
        Text {
            max_new: ask.max_new.unwrap_or(most).min(most),
            tokens,
            sampler: ask.sampler,
            logprobs: ask.logprobs,
            stream: index as u64,
            model: ask.model,
            events: send.clone(),
            index,
            enough: Arc::clone(enough),
            asked,
        }
    };
    shared.line.push(enough.iter().enumerate().map(text).collect())?;
    let number = shared.count.fetch_add(1, Ordering::Relaxed);
    let prefix = if ask.kind == Kind::Chat { "chatcmpl" } else { "cmpl" };
    Ok(Reply {
        id: format!("{prefix}-{:08x}{number:08x}", shared.started),
        created: now(),
        events,
        enough,
        deadline: (asked + shared.limits.time).into(),
        ask,
    })
}

fn json_of(value: &Value) -> Response {
    typed(Body::from(value.to_string()), "application/json")
}

fn typed(body: Body, kind: &'static str) -> Response {
    let mut response = Response::new(body);
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}
