//! A visitor of apps: speaks HTTP/1.1 to a gateway at a given address, whatever the host's name
//! resolves to.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::header::HOST;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// Longer than any wake in software emulation may take.
const PATIENCE: Duration = Duration::from_secs(600);

/// In an answer to a request that waited as long as one may, while its app goes on waking.
const WAKE_DEADLINE: &str = "\"code\":\"wake_deadline\"";

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

    /// Whether it is to be asked again: the app goes on waking.
    fn says_it_wakes(&self) -> bool {
        self.status == 503 && self.body.contains(WAKE_DEADLINE)
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

    /// `GET` of a path on a host. An answer that the app takes longer to wake than a request may
    /// wait is done as it says: on a machine that others keep busy it does.
    ///
    /// # Errors
    /// When no whole answer came.
    pub async fn get(&self, host: &str, path: &str) -> Result<Answer> {
        let begun = Instant::now();
        loop {
            let answer = self.send(Method::GET, host, path, Bytes::new()).await?;
            if !answer.says_it_wakes() || begun.elapsed() > PATIENCE {
                return Ok(answer);
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
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
        self.open().await?.exchange(request).await
    }

    /// A connection that is kept for one request after another.
    ///
    /// # Errors
    /// When the gateway takes none.
    pub async fn open(&self) -> Result<Connection> {
        let stream = TcpStream::connect(self.gateway)
            .await
            .context("connect to the gateway")?;
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        let driver = tokio::spawn(connection);
        Ok(Connection { sender, driver })
    }
}

/// Sends these bytes as they are to an address and reads one answer until the connection ends,
/// so they should ask for that.
///
/// # Errors
/// When what comes is no answer.
pub async fn raw(address: SocketAddr, request: &str) -> Result<Answer> {
    let exchange = async {
        let mut stream = TcpStream::connect(address).await?;
        stream.write_all(request.as_bytes()).await?;
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).await?;
        Ok::<_, std::io::Error>(bytes)
    };
    let bytes = tokio::time::timeout(PATIENCE, exchange).await;
    let bytes = bytes.with_context(|| format!("no answer to {request}"))??;
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let (head, body) = text
        .split_once("\r\n\r\n")
        .with_context(|| format!("no answer to {request}: {text}"))?;
    let mut lines = head.lines();
    let status = lines.next().and_then(|line| line.split(' ').nth(1));
    let status = status.with_context(|| format!("no status: {head}"))?;
    let headers = lines.filter_map(|line| line.split_once(": "));
    Ok(Answer {
        status: status.parse()?,
        headers: headers
            .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
            .collect(),
        body: body.to_owned(),
    })
}

/// A visitor's connection.
#[derive(Debug)]
pub struct Connection {
    sender: http1::SendRequest<Full<Bytes>>,
    driver: JoinHandle<hyper::Result<()>>,
}

impl Connection {
    /// `GET` of a path on a host, as [`Visitor::get`]; whole answers leave the connection open for
    /// the next one.
    ///
    /// # Errors
    /// When no whole answer came.
    pub async fn get(&mut self, host: &str, path: &str) -> Result<Answer> {
        let begun = Instant::now();
        loop {
            let request = Request::builder()
                .uri(path)
                .header(HOST, host)
                .body(Full::default())?;
            let answered = tokio::time::timeout(PATIENCE, self.exchange(request)).await;
            let answer = answered
                .with_context(|| format!("no answer from {host}{path} within {PATIENCE:?}"))??;
            if !answer.says_it_wakes() || begun.elapsed() > PATIENCE {
                return Ok(answer);
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }

    /// Sends a request and gives the answer as soon as its head is there.
    ///
    /// # Errors
    /// When none came.
    pub async fn begin(&mut self, request: Request<Full<Bytes>>) -> Result<Response<Incoming>> {
        let begun = tokio::time::timeout(PATIENCE, self.sender.send_request(request)).await;
        Ok(begun.context("no answer")??)
    }

    async fn exchange(&mut self, request: Request<Full<Bytes>>) -> Result<Answer> {
        self.sender
            .ready()
            .await
            .context("the connection was closed")?;
        let response = self
            .sender
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
        let body = String::from_utf8_lossy(&body).into_owned();
        Ok(Answer {
            status,
            headers,
            body,
        })
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.driver.abort();
    }
}
