//! Requests to the hub: its own redirects, what a refusal means, and when to try again.

use std::cell::Cell;
use std::fmt::Write;
use std::time::Duration;

use ureq::http::header::{AUTHORIZATION, LOCATION, RANGE, RETRY_AFTER};
use ureq::http::{Response, Uri};
use ureq::tls::{RootCerts, TlsConfig};
use ureq::{Agent, Body};

use super::Id;
use super::cache::{token, variable};
use crate::error::{Error, Result};

const DEFAULT_ENDPOINT: &str = "https://huggingface.co";
/// As browsers allow.
const REDIRECTS: usize = 10;
/// Failures in a row, without a byte between them, before giving up.
const TRIES: u32 = 6;
/// Doubled at each failure: half a minute in all.
const FIRST_WAIT: Duration = Duration::from_secs(1);
/// The hub counts requests in windows of five minutes.
const LONGEST_WAIT: Duration = Duration::from_mins(5);
/// A connection on which nothing comes for this long is cut.
const SILENCE: Duration = Duration::from_mins(1);

/// A hub, and the right to ask it.
pub(super) struct Hub {
    agent: Agent,
    endpoint: String,
    token: Option<String>,
    /// Whether it has answered: a hub that never did is not waited for.
    answered: Cell<bool>,
}

/// Why a request came to nothing.
pub(super) enum Fault {
    /// May go better next time, after this long where the server says so.
    Passing { what: String, after: Option<Duration>, came: u64 },
    /// Nobody answers.
    Unreachable(String),
    /// Stays.
    Lasting(Error),
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Self::Lasting(error)
    }
}

impl Hub {
    pub(super) fn from_environment() -> Self {
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| DEFAULT_ENDPOINT.to_owned());
        let tls = TlsConfig::builder().root_certs(RootCerts::PlatformVerifier).build();
        let config = Agent::config_builder()
            .tls_config(tls)
            .http_status_as_error(false)
            // Followed here: the token must stay behind.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_connect(Some(SILENCE))
            .timeout_recv_response(Some(SILENCE))
            .timeout_per_read(Some(SILENCE))
            .user_agent(concat!("fewbit/", env!("CARGO_PKG_VERSION")))
            .build();
        let endpoint = endpoint.trim().trim_end_matches('/').to_owned();
        Self { agent: config.new_agent(), endpoint, token: token(), answered: Cell::new(false) }
    }

    /// The hub's address for a message: without what may be secret in it.
    pub(super) fn address(&self) -> String {
        origin(&self.endpoint).unwrap_or_else(|| "HF_ENDPOINT".to_owned())
    }

    /// Asks for `path`, its parts encoded, from byte `from` on; an answer is 200, 206 or 416.
    pub(super) fn get(&self, id: &Id<'_>, path: &str, from: u64) -> Result<Response<Body>, Fault> {
        let mut url = format!("{}{path}", self.endpoint);
        for _ in 0..REDIRECTS {
            let reply = self.send(&url, from)?;
            self.answered.set(true);
            let status = reply.status();
            if !status.is_redirection() {
                return if status.is_success() || status.as_u16() == 416 {
                    Ok(reply)
                } else {
                    Err(self.refusal(id, &reply))
                };
            }
            let to = reply.headers().get(LOCATION).and_then(|to| to.to_str().ok());
            let Some(to) = to.and_then(|to| join(&url, to)) else {
                return Err(self.odd(id, "a redirect that leads nowhere"));
            };
            url = to;
        }
        Err(self.odd(id, "one redirect after another"))
    }

    fn send(&self, url: &str, from: u64) -> Result<Response<Body>, Fault> {
        let mut request = self.agent.get(url);
        if from > 0 {
            request = request.header(RANGE, format!("bytes={from}-"));
        }
        // To the hub itself, not to where it keeps files.
        if let Some(token) = self.token.as_ref().filter(|_| origin(url) == origin(&self.endpoint)) {
            request = request.header(AUTHORIZATION, format!("Bearer {token}"));
        }
        request.call().map_err(|error| {
            let what = match &error {
                ureq::Error::Io(error) => error.to_string(),
                ureq::Error::HostNotFound => "no address is known for its name".to_owned(),
                ureq::Error::Timeout(_) => "no answer came in time".to_owned(),
                // The text of these would hold the request.
                ureq::Error::BadUri(_) | ureq::Error::Http(_) => {
                    let what = "HF_ENDPOINT or HF_TOKEN has a character that cannot be sent";
                    return Error::usage(what).at(self.address()).fix("set it anew").into();
                }
                other => other.to_string(),
            };
            if self.answered.get() {
                Fault::Passing { what, after: None, came: 0 }
            } else {
                Fault::Unreachable(what)
            }
        })
    }

    /// Tries until it works, is refused, or has failed too often in a row.
    pub(super) fn persist<T>(
        &self,
        place: &str,
        mut attempt: impl FnMut() -> Result<T, Fault>,
    ) -> Result<T, Fault> {
        let mut failures = 0;
        loop {
            let (what, after) = match attempt() {
                Err(Fault::Passing { what, after, came }) => {
                    failures = if came > 0 { 1 } else { failures + 1 };
                    (what, after)
                }
                other => return other,
            };
            if failures == TRIES {
                let error = Error::failed(format!("the hub fails again and again: {what}"));
                let fix = "the same command later: it goes on from what has come";
                return Err(error.at(place).at(self.address()).fix(fix).into());
            }
            let wait = after.unwrap_or(FIRST_WAIT * 2_u32.pow(failures - 1)).min(LONGEST_WAIT);
            tracing::warn!("{place}: {what}; asking again in {} s", wait.as_secs());
            std::thread::sleep(wait);
        }
    }

    /// What a status other than success means.
    fn refusal(&self, id: &Id<'_>, reply: &Response<Body>) -> Fault {
        let header = |name: &str| reply.headers().get(name)?.to_str().ok();
        let status = reply.status().as_u16();
        if matches!(status, 408 | 429 | 500 | 502 | 503 | 504) {
            let after = header(RETRY_AFTER.as_str()).and_then(|text| text.trim().parse().ok());
            let what = match status {
                429 => "the hub asks to wait".to_owned(),
                _ => format!("the hub answers {}", reply.status()),
            };
            return Fault::Passing { what, after: after.map(Duration::from_secs), came: 0 };
        }
        let code = header("x-error-code").unwrap_or_default();
        let login = "HF_TOKEN or `hf auth login`";
        let [_, prefix] = id.kind();
        let page = format!("{}/{prefix}{}/{}", self.address(), id.owner, id.name);
        let (noun, absent) = (id.noun(), id.absent());
        let (error, fix) = match status {
            401 | 403 if code == "GatedRepo" || status == 403 => (
                Error::failed(format!("the hub lets only accounts with access have this {noun}")),
                format!("ask for access on {page}, then {login}"),
            ),
            401 if self.token.is_some() => (
                Error::usage(format!("{absent}, and the hub has none for this token")),
                id.instead(&format!("check the id; for a private {noun} {login} anew")),
            ),
            401 => (
                Error::usage(format!("{absent}, and the hub shows none without a token")),
                id.instead(&format!("check the id; for a gated or private {noun} {login}")),
            ),
            404 if code == "RevisionNotFound" => (
                Error::usage(format!("the {noun} has no revision `{}`", id.revision)),
                format!("a branch, tag or commit of {page}"),
            ),
            404 if code == "EntryNotFound" => (
                Error::failed("the hub lists a file that it does not have"),
                "the same command again, or another revision".to_owned(),
            ),
            404 => (
                Error::usage(format!("{absent}, and the hub has none")),
                id.instead("check the id"),
            ),
            _ => (
                Error::failed(format!("the hub answers {}", reply.status())),
                "check HF_ENDPOINT and what stands between, or give a local folder".to_owned(),
            ),
        };
        Fault::Lasting(error.at(id).at(self.address()).fix(fix))
    }

    /// An answer that no hub gives.
    pub(super) fn odd(&self, id: &Id<'_>, what: &str) -> Fault {
        let error = Error::failed(format!("the hub sends {what}")).at(id).at(self.address());
        Fault::Lasting(
            error.fix("check HF_ENDPOINT and what stands between, or give a local folder"),
        )
    }

    /// Nobody answers.
    pub(super) fn unreachable(&self, id: &Id<'_>, what: &str) -> Error {
        Error::failed(format!("{}, and the hub cannot be reached: {what}", id.absent()))
            .at(id)
            .at(self.address())
            .fix(id.instead("check the network, or give a local folder"))
    }
}

/// Scheme, host and port of an address.
fn origin(url: &str) -> Option<String> {
    let uri: Uri = url.parse().ok()?;
    let scheme = uri.scheme_str()?;
    let port = uri.port_u16().unwrap_or(if scheme == "http" { 80 } else { 443 });
    let host = uri.host()?;
    Some(match (scheme, port) {
        ("http", 80) | ("https", 443) => format!("{scheme}://{host}"),
        _ => format!("{scheme}://{host}:{port}"),
    })
}

/// Where a redirect from `url` leads: an address or a path, nothing else.
fn join(url: &str, to: &str) -> Option<String> {
    if to.starts_with("http://") || to.starts_with("https://") {
        return Some(to.to_owned());
    }
    if let Some(rest) = to.strip_prefix("//") {
        return Some(format!("{}://{rest}", url.split_once("://")?.0));
    }
    to.starts_with('/').then(|| Some(format!("{}{to}", origin(url)?)))?
}

/// A path for an address, its folders kept apart.
pub(super) fn encoded_path(path: &str) -> String {
    path.split('/').map(encoded).collect::<Vec<_>>().join("/")
}

/// One part of a path, encoded.
pub(super) fn encoded(part: &str) -> String {
    let mut text = String::new();
    for byte in part.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) {
            text.push(char::from(byte));
        } else {
            let _ = write!(text, "%{byte:02X}"); // nothing fails to be written to a string
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_origin_has_neither_account_nor_path() {
        let of = |url| origin(url).unwrap();
        assert_eq!(of("https://me:secret@hub.example/a?b=c"), "https://hub.example");
        assert_eq!(of("http://127.0.0.1:8080/x"), "http://127.0.0.1:8080");
        assert_eq!(of("https://hub.example:443"), of("https://hub.example"));
        assert_ne!(of("http://hub.example"), of("https://hub.example"));
        assert_eq!(origin("no address"), None);
    }

    #[test]
    fn redirects_are_joined() {
        let from = "https://hub.example/a/b?c";
        assert_eq!(join(from, "/x").as_deref(), Some("https://hub.example/x"));
        assert_eq!(join(from, "//cdn.example/x").as_deref(), Some("https://cdn.example/x"));
        assert_eq!(join(from, "http://cdn.example").as_deref(), Some("http://cdn.example"));
        assert_eq!(join(from, "file:///etc/passwd"), None);
    }

    #[test]
    fn parts_are_encoded() {
        assert_eq!(encoded("refs/pr 1"), "refs%2Fpr%201");
        assert_eq!(encoded("model-00001.safetensors"), "model-00001.safetensors");
    }
}
