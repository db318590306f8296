//! Whether the app answers its health path: one small HTTP/1.1 request that never blocks.
//!
//! Owned by [`crate::runner`] while an app starts, one at a time. Reads the status line and nothing
//! else.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with};

use crate::interest::Interest;

/// How long one answer may take.
const ANSWER_MS_MAX: u64 = 5_000;

/// The most bytes of an answer that are looked at.
const STATUS_BYTES_MAX: usize = 64;

/// How long an answer's rest is read after its status has been seen.
const REST_MS_MAX: u64 = 2_000;

/// One request under way.
#[derive(Debug)]
pub struct HttpProbe {
    socket: OwnedFd,
    request: Vec<u8>,
    sent: usize,
    answer: Vec<u8>,
    deadline_ms: u64,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing yet.
    Waiting,
    /// It answered 2xx.
    Healthy,
    /// Anything else, for people.
    Unhealthy(String),
}

impl HttpProbe {
    /// Connects and prepares a GET of `path`.
    ///
    /// # Errors
    /// When there is no connection.
    pub fn start(to: SocketAddrV4, path: &str, now_ms: u64) -> io::Result<Self> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)?;
        match connect(&socket, &to) {
            Ok(()) | Err(Errno::INPROGRESS) => {}
            Err(errno) => return Err(errno.into()),
        }
        let request = format!(
            "GET {path} HTTP/1.1\r\nHost: {}:{}\r\nUser-Agent: spore-health\r\n\
             Accept: */*\r\nConnection: close\r\n\r\n",
            Ipv4Addr::LOCALHOST,
            to.port()
        );
        Ok(Self {
            socket,
            request: request.into_bytes(),
            sent: 0,
            answer: Vec::new(),
            deadline_ms: now_ms + ANSWER_MS_MAX,
        })
    }

    /// What it waits for.
    pub fn interest<'a>(&'a self, interest: &mut Interest<'a>) {
        if self.sent < self.request.len() {
            interest.write(&self.socket);
        } else {
            interest.read(&self.socket);
        }
        interest.at(self.deadline_ms);
    }

    /// The status was seen: the rest of the answer is read and thrown away, since an app that is
    /// hung up on in the middle of its answer logs an error.
    pub fn leave(&mut self, now_ms: u64) {
        self.deadline_ms = now_ms + REST_MS_MAX;
    }

    /// Reads on after [`HttpProbe::leave`]. True when the answer is over, or has had its time.
    pub fn has_left(&mut self, now_ms: u64) -> bool {
        let mut buffer = [0; 4096];
        for _read in 0..16 {
            match rustix::io::read(&self.socket, &mut buffer) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(Errno::AGAIN | Errno::INTR) => break,
                Err(_) => return true,
            }
        }
        now_ms >= self.deadline_ms
    }

    /// Goes on as far as it can.
    pub fn pump(&mut self, now_ms: u64) -> Verdict {
        match self.go_on() {
            Ok(Verdict::Waiting) if now_ms >= self.deadline_ms => {
                Verdict::Unhealthy("the health path gave no answer within 5 s".to_owned())
            }
            Ok(verdict) => verdict,
            Err(Errno::AGAIN | Errno::INTR) if now_ms < self.deadline_ms => Verdict::Waiting,
            Err(errno) => Verdict::Unhealthy(format!(
                "the health request failed: {}",
                io::Error::from(errno)
            )),
        }
    }

    fn go_on(&mut self) -> rustix::io::Result<Verdict> {
        while self.sent < self.request.len() {
            self.sent += rustix::io::write(&self.socket, &self.request[self.sent..])?;
        }
        let mut buffer = [0; STATUS_BYTES_MAX];
        loop {
            let bytes = rustix::io::read(&self.socket, &mut buffer)?;
            self.answer.extend_from_slice(&buffer[..bytes]);
            if bytes == 0 || self.answer.len() >= STATUS_BYTES_MAX || self.answer.contains(&b'\n') {
                return Ok(verdict(&self.answer));
            }
        }
    }
}

/// Judges the beginning of an answer.
fn verdict(answer: &[u8]) -> Verdict {
    let line = answer.split(|byte| *byte == b'\n').next().unwrap_or(b"");
    let line = String::from_utf8_lossy(line);
    let mut words = line.split_ascii_whitespace();
    let version = words.next().unwrap_or("");
    let status: Option<u16> = words.next().and_then(|word| word.parse().ok());
    match status {
        Some(200..=299) if version.starts_with("HTTP/1.") => Verdict::Healthy,
        Some(status) => Verdict::Unhealthy(format!("the health path answered {status}")),
        None => Verdict::Unhealthy("the health path gave no HTTP answer".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::{SocketAddr, TcpListener};

    use super::{HttpProbe, Verdict, verdict};
    use crate::clock;
    use crate::interest::Interest;

    fn asked(answer: &'static [u8]) -> Verdict {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let SocketAddr::V4(address) = listener.local_addr().unwrap() else {
            panic!("not an IPv4 address");
        };
        let server = std::thread::spawn(move || {
            let (mut socket, _peer) = listener.accept().unwrap();
            let mut request = [0; 512];
            let bytes = socket.read(&mut request).unwrap();
            socket.write_all(answer).unwrap();
            String::from_utf8_lossy(&request[..bytes]).into_owned()
        });
        let mut probe = HttpProbe::start(address, "/healthz", clock::monotonic_ms()).unwrap();
        let verdict = loop {
            let now = clock::monotonic_ms();
            match probe.pump(now) {
                Verdict::Waiting => {
                    let mut interest = Interest::default();
                    probe.interest(&mut interest);
                    drop(interest.wait(now));
                }
                verdict => break verdict,
            }
        };
        assert!(
            server
                .join()
                .unwrap()
                .starts_with("GET /healthz HTTP/1.1\r\n")
        );
        verdict
    }

    #[test]
    fn only_a_2xx_is_healthy() {
        assert_eq!(asked(b"HTTP/1.1 204 No Content\r\n\r\n"), Verdict::Healthy);
        let seen = asked(b"HTTP/1.0 503 Service Unavailable\r\n\r\n");
        assert_eq!(
            seen,
            Verdict::Unhealthy("the health path answered 503".to_owned())
        );
        assert!(matches!(asked(b"SSH-2.0-x\r\n"), Verdict::Unhealthy(_)));
        assert!(matches!(asked(b""), Verdict::Unhealthy(_)));
    }

    #[test]
    fn a_status_line_of_another_protocol_is_not_healthy() {
        assert!(matches!(verdict(b"ICY 200 OK\r\n"), Verdict::Unhealthy(_)));
    }
}
