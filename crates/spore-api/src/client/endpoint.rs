//! Where a daemon listens, and how a stream to it is opened.
//!
//! Called by the client before every call. It never looks up `localhost` or `*.localhost`: these
//! are loopback by definition (RFC 6761), and many resolvers do not know them.

use core::fmt;
use core::str::FromStr;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream, lookup_host};

/// How long opening a stream may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// The port of the daemon's interface when nobody says.
const PORT_DEFAULT: u16 = 8889;

/// Where a daemon listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// A socket in the file system; the kernel tells the daemon who calls.
    Unix(PathBuf),
    /// A host name or address with a port; every call needs a token.
    Tcp {
        /// As given, without brackets.
        host: String,
        /// 1 to 65535.
        port: u16,
    },
}

/// Why a text names no endpoint.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum EndpointError {
    /// The daemon speaks plain HTTP.
    #[error(
        "`{value}` is not supported: the interface speaks plain HTTP. Use `HOST:PORT`, through an \
         SSH tunnel where the way is not private: `ssh -L 8889:127.0.0.1:8889 HOST`"
    )]
    Tls {
        /// What was given.
        value: String,
    },
    /// It has another form.
    #[error(
        "`{value}` is not an address of a daemon. Use `unix:/run/spore/api.sock`, \
         `127.0.0.1:8889` or `http://127.0.0.1:8889`"
    )]
    Form {
        /// What was given.
        value: String,
    },
}

impl Endpoint {
    /// Whether what is sent stays on this host.
    #[must_use]
    pub fn is_local(&self) -> bool {
        match self {
            Self::Unix(_) => true,
            Self::Tcp { host, .. } => {
                is_localhost(host) || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
            }
        }
    }

    /// The value of the Host header.
    pub(super) fn authority(&self) -> String {
        match self {
            Self::Unix(_) => "localhost".to_owned(),
            Self::Tcp { host, port } if host.contains(':') => format!("[{host}]:{port}"),
            Self::Tcp { host, port } => format!("{host}:{port}"),
        }
    }

    /// Opens a stream.
    pub(super) async fn connect(&self) -> io::Result<Box<dyn Transport>> {
        let opened = tokio::time::timeout(CONNECT_TIMEOUT, self.open()).await;
        opened.unwrap_or_else(|_elapsed| {
            let text = format!("no connection within {} s", CONNECT_TIMEOUT.as_secs());
            Err(io::Error::new(io::ErrorKind::TimedOut, text))
        })
    }

    async fn open(&self) -> io::Result<Box<dyn Transport>> {
        let (host, port) = match self {
            Self::Unix(path) => return Ok(Box::new(UnixStream::connect(path).await?)),
            Self::Tcp { host, port } => (host.as_str(), *port),
        };
        let addresses: Vec<SocketAddr> = if is_localhost(host) {
            let v4 = (IpAddr::V4(Ipv4Addr::LOCALHOST), port);
            vec![v4.into(), (IpAddr::V6(Ipv6Addr::LOCALHOST), port).into()]
        } else {
            lookup_host((host, port)).await?.collect()
        };
        let mut failure = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for (index, address) in addresses.into_iter().enumerate() {
            match TcpStream::connect(address).await {
                Ok(stream) => {
                    stream.set_nodelay(true)?;
                    return Ok(Box::new(stream));
                }
                // The first address is the preferred one: its failure says the most.
                Err(error) if index == 0 => failure = error,
                Err(_later) => {}
            }
        }
        Err(failure)
    }
}

fn is_localhost(host: &str) -> bool {
    let host = host.trim_end_matches('.').to_ascii_lowercase();
    host == "localhost" || host.ends_with(".localhost")
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        let form = || EndpointError::Form {
            value: text.to_owned(),
        };
        if text.starts_with("https://") {
            return Err(EndpointError::Tls {
                value: text.to_owned(),
            });
        }
        let path = text
            .strip_prefix("unix://")
            .or_else(|| text.strip_prefix("unix:"));
        if let Some(path) = path.or_else(|| text.starts_with('/').then_some(text)) {
            if !path.starts_with('/') {
                return Err(form());
            }
            return Ok(Self::Unix(PathBuf::from(path)));
        }
        let rest = text
            .strip_prefix("http://")
            .unwrap_or(text)
            .trim_end_matches('/');
        if let Ok(address) = rest.parse::<SocketAddr>() {
            return Ok(Self::Tcp {
                host: address.ip().to_string(),
                port: address.port(),
            });
        }
        let (host, port) = match rest.rsplit_once(':') {
            Some((host, port)) => (host, port.parse().map_err(|_number| form())?),
            None => (rest, PORT_DEFAULT),
        };
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
        if host.is_empty() || port == 0 || !host.bytes().all(allowed) {
            return Err(form());
        }
        Ok(Self::Tcp {
            host: host.to_owned(),
            port,
        })
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp { .. } => write!(f, "http://{}", self.authority()),
        }
    }
}

/// A stream to the daemon, whatever it is made of.
pub(super) trait Transport: AsyncRead + AsyncWrite + Send + Unpin + fmt::Debug {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin + fmt::Debug> Transport for T {}

#[cfg(test)]
mod tests {
    use super::Endpoint;

    #[test]
    fn every_usual_spelling_of_an_address_is_understood() {
        for (text, shown) in [
            ("/run/spore/api.sock", "unix:/run/spore/api.sock"),
            ("unix:/run/spore/api.sock", "unix:/run/spore/api.sock"),
            ("unix:///run/spore/api.sock", "unix:/run/spore/api.sock"),
            ("127.0.0.1:8889", "http://127.0.0.1:8889"),
            ("http://127.0.0.1:8889/", "http://127.0.0.1:8889"),
            ("[::1]:8889", "http://[::1]:8889"),
            ("build-host", "http://build-host:8889"),
            ("api.localhost:9", "http://api.localhost:9"),
        ] {
            assert_eq!(
                text.parse::<Endpoint>().unwrap().to_string(),
                shown,
                "{text}"
            );
        }
    }

    #[test]
    fn what_is_no_address_is_refused_with_one_that_is() {
        for text in [
            "",
            ":8889",
            "host:0",
            "host:70000",
            "unix:api.sock",
            "a/b:1",
            "a b",
            "x:",
        ] {
            let error = text.parse::<Endpoint>().unwrap_err().to_string();
            assert!(error.contains("127.0.0.1:8889"), "{text}: {error}");
        }
        let error = "https://host".parse::<Endpoint>().unwrap_err().to_string();
        assert!(error.contains("ssh -L"), "{error}");
    }

    #[test]
    fn only_loopback_and_sockets_are_local() {
        for (text, local) in [
            ("/s", true),
            ("127.0.0.1:1", true),
            ("[::1]:1", true),
            ("x.localhost:1", true),
            ("10.0.0.1:1", false),
            ("host:1", false),
        ] {
            assert_eq!(
                text.parse::<Endpoint>().unwrap().is_local(),
                local,
                "{text}"
            );
        }
    }
}
