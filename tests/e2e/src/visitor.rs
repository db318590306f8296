//! A visitor of apps: speaks HTTP/1.1 to a gateway at a given address, whatever the host's name
//! resolves to.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1;
use hyper::header::HOST;
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// Longer than any wake in software emulation may take.
const PATIENCE: Duration = Duration::from_secs(90);

/// Somebody who visits apps through a gateway.
#[derive(Clone, Debug)]
pub struct Visitor {
    gateway: SocketAddr,
}

/// What came back.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    /// The whole body.
    pub body: String,
}

impl Answer {
    /// The first header of that name.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(header, _value)| header == name);
        found.map(|(_name, value)| value.as_str())
    }
}

impl Visitor {
    /// A visitor of the gateway at this address.
    #[must_use]
    pub const fn new(gateway: SocketAddr) -> Self {
        Self { gateway }
    }

    /// The gateway's address.
    #[must_use]
    pub const fn gateway(&self) -> SocketAddr {
        self.gateway
    }

    /// `GET` of a path on a host.
    ///
    /// # Errors
    /// When no whole answer came.
    pub async fn get(&self, host: &str, path: &str) -> Result<Answer> {
        self.send(Method::GET, host, path, Bytes::new()).await
    }

    /// Any request with a whole body, on a connection of its own.
    ///
    /// # Errors
    /// When no whole answer came.
    pub async fn send(
        &self,
        method: Method,
        host: &str,
        path: &str,
        body: Bytes,
    ) -> Result<Answer> {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, host)
            .body(Full::new(body))?;
        let answered = tokio::time::timeout(PATIENCE, self.exchange(request)).await;
        let Ok(answer) = answered else {
            bail!("no answer from {host}{path} within {PATIENCE:?}");
        };
        answer.with_context(|| format!("{host}{path}"))
    }

    async fn exchange(&self, request: Request<Full<Bytes>>) -> Result<Answer> {
        let stream = TcpStream::connect(self.gateway)
            .await
            .context("connect to the gateway")?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        let driver = tokio::spawn(connection);
        let response = sender
            .send_request(request)
            .await
            .context("send the request")?;
        let status = response.status().as_u16();
        let headers = response.headers().iter().map(|(name, value)| {
            (
                name.as_str().to_owned(),
                String::from_utf8_lossy(value.as_bytes()).into_owned(),
            )
        });
        let headers = headers.collect();
        let body = response
            .into_body()
            .collect()
            .await
            .context("read the answer")?
            .to_bytes();
        driver.abort();
        let body = String::from_utf8_lossy(&body).into_owned();
        Ok(Answer {
            status,
            headers,
            body,
        })
    }
}
