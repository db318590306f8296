//! What a simulated app answers: its VM's id, to whoever connects.
//!
//! Started by the guest at the first connection; ends with it. A killed VM says goodbye to nobody:
//! what is connected in memory then stays open and silent.

use core::net::{Ipv4Addr, SocketAddr};
use std::io;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, DuplexStream};
use tokio::net::TcpListener;

use super::guest::Guest;

/// The most bytes of a request's head.
const HEAD_BYTES_MAX: usize = 16 * 1024;

pub(super) async fn listen(guest: &Arc<Guest>) -> io::Result<SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let address = listener.local_addr()?;
    let serving = Arc::clone(guest);
    guest.spawn(async move {
        while let Ok((stream, _from)) = listener.accept().await {
            let tag = serving.vm.to_string();
            serving.spawn(async move {
                // A visitor that goes away is no news.
                drop(answer(stream, &tag).await);
            });
        }
    });
    Ok(address)
}

/// The app's end of a connection that passes no socket is served; the other is given back.
pub(super) fn dial(guest: &Arc<Guest>) -> DuplexStream {
    let (mut ours, theirs) = tokio::io::duplex(HEAD_BYTES_MAX);
    let tag = guest.vm.to_string();
    let over = guest.over.clone();
    drop(tokio::spawn(async move {
        let answered = over.run_until_cancelled(answer(&mut ours, &tag)).await;
        if answered.is_none() {
            drop(tokio::io::copy(&mut ours, &mut tokio::io::sink()).await);
        }
    }));
    theirs
}

async fn answer(mut stream: impl AsyncRead + AsyncWrite + Unpin, tag: &str) -> io::Result<()> {
    let mut held = Vec::new();
    loop {
        let Some(end) = held.windows(4).position(|four| four == b"\r\n\r\n") else {
            let mut buffer = [0; 4096];
            let got = stream.read(&mut buffer).await?;
            if got == 0 || held.len() > HEAD_BYTES_MAX {
                return Ok(());
            }
            held.extend_from_slice(&buffer[..got]);
            continue;
        };
        let head = String::from_utf8_lossy(&held[..end]).to_ascii_lowercase();
        let mut body = head
            .lines()
            .filter_map(|line| line.strip_prefix("content-length:"))
            .find_map(|length| length.trim().parse::<usize>().ok())
            .unwrap_or(0);
        held.drain(..end + 4);
        while body > 0 {
            let have = body.min(held.len());
            held.drain(..have);
            body -= have;
            if body > 0 {
                let mut buffer = [0; 4096];
                let got = stream.read(&mut buffer).await?;
                if got == 0 {
                    return Ok(());
                }
                held.extend_from_slice(&buffer[..got]);
            }
        }
        let text = format!(
            "HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: {}\r\n\
             x-spore-vm: {tag}\r\n\r\n{tag}",
            tag.len()
        );
        stream.write_all(text.as_bytes()).await?;
    }
}
