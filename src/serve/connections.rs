//! Connections: so many at once, each with a limit on how long a request's head may take, and an end.

use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::sync::Semaphore;

/// The most connections; more of them wait to be accepted.
const MOST: usize = 1024;
/// How long the head of a request may take, and how long a connection stays open between two of them.
const HEAD: Duration = Duration::from_secs(30);
/// How long it is waited after an error of the system, mostly that there are too many open files.
const BREATH: Duration = Duration::from_millis(50);

/// Serves connections until `end`; gives those that are still open.
pub(super) async fn accept(
    listener: TcpListener,
    router: Router,
    end: impl Future<Output = ()>,
) -> std::io::Result<GracefulShutdown> {
    listener.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let (open, room) = (GracefulShutdown::new(), Arc::new(Semaphore::new(MOST)));
    let mut end = std::pin::pin!(end);
    loop {
        let next = async {
            // It is never closed.
            let permit = Arc::clone(&room).acquire_owned().await.ok();
            (permit, listener.accept().await)
        };
        let (permit, accepted) = tokio::select! {
            next = next => next,
            () = &mut end => return Ok(open),
        };
        let Ok((stream, _)) = accepted else {
            tokio::time::sleep(BREATH).await;
            continue;
        };
        // Tokens are small, and wait for nothing.
        let _ = stream.set_nodelay(true);
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD)
            .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router.clone()));
        let connection = open.watch(connection);
        tokio::spawn(async move {
            // What is wrong with a connection is its client's affair.
            let _ = connection.await;
            drop(permit);
        });
    }
}
