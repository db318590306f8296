//! A client that says exactly what it is told and reads one answer at a time.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

pub(crate) struct Client {
    pub(crate) stream: TcpStream,
    buffer: Vec<u8>,
}

#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    /// The values of a header, joined.
    pub(crate) fn header(&self, name: &str) -> Option<String> {
        let values: Vec<_> = self
            .head
            .lines()
            .filter_map(|line| line.split_once(':'))
            .filter(|(key, _)| key.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.trim())
            .collect();
        (!values.is_empty()).then(|| values.join("\n"))
    }

    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }
}

impl Client {
    pub(crate) async fn connect(address: SocketAddr) -> Self {
        Self {
            stream: TcpStream::connect(address).await.unwrap(),
            buffer: Vec::new(),
        }
    }

    pub(crate) async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).await.unwrap();
    }

    /// A GET and its answer.
    pub(crate) async fn get(&mut self, name: &str, path: &str) -> Answer {
        self.send(request("GET", name, path)).await;
        self.answer().await
    }

    /// The next answer, whole.
    pub(crate) async fn answer(&mut self) -> Answer {
        self.answer_to("GET").await
    }

    pub(crate) async fn answer_to(&mut self, method: &str) -> Answer {
        let head = self.head().await;
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let mut answer = Answer {
            status,
            head,
            body: Vec::new(),
        };
        if method == "HEAD" || matches!(status, 100..=199 | 204 | 304) {
            return answer;
        }
        if let Some(length) = answer.header("content-length") {
            answer.body = self.bytes(length.parse().unwrap()).await;
        } else if answer.header("transfer-encoding").is_some() {
            loop {
                let line = self.line().await;
                let size = usize::from_str_radix(line.trim(), 16).unwrap();
                if size == 0 {
                    break;
                }
                answer.body.extend(self.bytes(size).await);
                self.line().await;
            }
            // Trailers are kept with the head, where `header` finds them.
            loop {
                let line = self.line().await;
                if line == "\r\n" {
                    break;
                }
                answer.head.push_str(&line);
            }
        } else {
            answer.body = self.rest().await;
        }
        answer
    }

    pub(crate) async fn head(&mut self) -> String {
        let mut head = String::new();
        loop {
            let line = self.line().await;
            if line == "\r\n" {
                return head;
            }
            head.push_str(&line);
        }
    }

    pub(crate) async fn line(&mut self) -> String {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                return String::from_utf8(line).unwrap();
            }
            assert!(self.fill().await > 0, "the connection ended inside a line");
        }
    }

    pub(crate) async fn bytes(&mut self, count: usize) -> Vec<u8> {
        while self.buffer.len() < count {
            assert!(self.fill().await > 0, "the connection ended inside a body");
        }
        self.buffer.drain(..count).collect()
    }

    /// Everything until the end, which may be an error.
    pub(crate) async fn rest(&mut self) -> Vec<u8> {
        while self.fill().await > 0 {}
        std::mem::take(&mut self.buffer)
    }

    async fn fill(&mut self) -> usize {
        let mut piece = vec![0; 16 * 1024];
        let count = self.stream.read(&mut piece).await.unwrap_or(0);
        self.buffer.extend_from_slice(&piece[..count]);
        count
    }
}

pub(crate) fn request(method: &str, name: &str, path: &str) -> String {
    format!("{method} {path} HTTP/1.1\r\nHost: {name}.localhost:8080\r\n\r\n")
}
