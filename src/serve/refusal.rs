//! What a request is refused with: OpenAI's error object, and a status that clients know what to do about.

use axum::body::Body;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::error::{Error, Kind};

/// Why a request gets no answer.
#[derive(Clone, Debug)]
pub(super) struct Refusal {
    pub(super) status: StatusCode,
    kind: &'static str,
    message: String,
    param: Option<String>,
    code: Option<&'static str>,
    /// Seconds after which it may be asked again.
    retry: Option<u32>,
}

impl Refusal {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self { status, kind, message: message.into(), param: None, code: None, retry: None }
    }

    /// The request is wrong.
    pub(super) fn bad(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// The request is wrong, in a way that has a status of its own.
    pub(super) fn with(status: StatusCode, message: impl Into<String>) -> Self {
        Self::new(status, "invalid_request_error", message)
    }

    /// The server failed.
    pub(super) fn failed(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
    }

    /// Too many texts wait.
    pub(super) fn full(waiting: usize) -> Self {
        let what = format!("the server is busy: {waiting} texts are before this request");
        Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", what)
            .code("queue_full")
            .retry(1)
    }

    /// The server ends.
    pub(super) fn stopping() -> Self {
        let what = "the server is stopping";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", what).code("stopping").retry(5)
    }

    /// Its time ran out before it was its turn.
    pub(super) fn late() -> Self {
        let what = "the request waited for its turn as long as a request may take";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", what).code("timeout").retry(5)
    }

    /// The key is missing or another one.
    pub(super) fn key() -> Self {
        let what = "the API key is missing or wrong: Authorization: Bearer KEY";
        Self::with(StatusCode::UNAUTHORIZED, what).code("invalid_api_key")
    }

    /// Which field of the request it is about.
    pub(super) fn param(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }

    /// What programs know it by.
    pub(super) fn code(mut self, code: &'static str) -> Self {
        self.code = Some(code);
        self
    }

    fn retry(mut self, seconds: u32) -> Self {
        self.retry = Some(seconds);
        self
    }

    /// The error object.
    pub(super) fn json(&self) -> Value {
        json!({ "error": {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        } })
    }
}

impl From<Error> for Refusal {
    /// Paths of this machine stay here.
    fn from(error: Error) -> Self {
        match error.kind() {
            Kind::Usage | Kind::Preflight => Self::bad(error.what()),
            _ => Self::failed(error.what()),
        }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let mut response = Response::new(Body::from(self.json().to_string()));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(seconds) = self.retry {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
