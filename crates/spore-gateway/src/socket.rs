//! A TCP stream that others may watch and cut while one task reads and writes it.
//!
//! Used by `listen.rs` for clients and by `pool.rs` for apps. A [`SocketHandle`] outlives no
//! descriptor by itself and never reads or writes.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use rustix::net::sockopt;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::Duration;

/// The stream itself, for the one task that reads and writes.
#[derive(Debug)]
pub(crate) struct Socket {
    read: OwnedReadHalf,
    handle: SocketHandle,
}

/// What others may know of a stream, and the end of it.
#[derive(Clone, Debug)]
pub(crate) struct SocketHandle(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    write: OwnedWriteHalf,
    read_bytes: AtomicU64,
    written_bytes: AtomicU64,
    write_blocked: AtomicBool,
}

impl Socket {
    pub(crate) fn new(stream: TcpStream) -> Self {
        let (read, write) = stream.into_split();
        let shared = Shared {
            write,
            read_bytes: AtomicU64::new(0),
            written_bytes: AtomicU64::new(0),
            write_blocked: AtomicBool::new(false),
        };
        Self {
            read,
            handle: SocketHandle(Arc::new(shared)),
        }
    }

    pub(crate) fn handle(&self) -> SocketHandle {
        self.handle.clone()
    }
}

/// Prepares a stream on either side. A peer may vanish without a word, behind a router that
/// forgets it or with a host that dies: the kernel asks after half of `dead_peer_timeout`, and ends
/// the stream when nothing was heard for all of it, whether bytes wait for the peer or not.
pub(crate) fn tune(stream: &TcpStream, dead_peer_timeout: Duration) -> io::Result<()> {
    let timeout_ms = u32::try_from(dead_peer_timeout.as_millis()).unwrap_or(u32::MAX);
    let second = Duration::from_secs(1);
    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, (dead_peer_timeout / 2).max(second))?;
    sockopt::set_tcp_keepintvl(stream, (dead_peer_timeout / 8).max(second))?;
    sockopt::set_tcp_user_timeout(stream, timeout_ms)?;
    Ok(())
}

impl SocketHandle {
    /// Bytes received so far.
    pub(crate) fn read_bytes(&self) -> u64 {
        self.0.read_bytes.load(Ordering::Relaxed)
    }

    /// Bytes handed to the kernel so far.
    pub(crate) fn written_bytes(&self) -> u64 {
        self.0.written_bytes.load(Ordering::Relaxed)
    }

    /// Whether the last write found the kernel's buffer full.
    pub(crate) fn is_write_blocked(&self) -> bool {
        self.0.write_blocked.load(Ordering::Relaxed)
    }

    /// Whether the peer has closed its sending side, seen even behind bytes that nobody read.
    pub(crate) async fn is_peer_gone(&self) -> bool {
        let stream = self.0.write.as_ref();
        // Ready at once when bytes or the end are there, and never later than one poll otherwise:
        // the only question is what is known now.
        let ready = std::pin::pin!(stream.ready(Interest::READABLE));
        let mut ready = Some(ready);
        std::future::poll_fn(move |cx| {
            let Some(future) = ready.as_mut() else {
                return Poll::Ready(false);
            };
            match future.as_mut().poll(cx) {
                Poll::Ready(Ok(state)) => Poll::Ready(state.is_read_closed()),
                Poll::Ready(Err(_)) => Poll::Ready(true),
                Poll::Pending => {
                    ready = None;
                    Poll::Ready(false)
                }
            }
        })
        .await
    }

    /// Reads until the peer has closed its side, and keeps nothing. Legal once nobody else reads.
    pub(crate) async fn swallow(&self) {
        let stream = self.0.write.as_ref();
        let mut waste = [0; 4096];
        while stream.readable().await.is_ok() {
            match stream.try_read(&mut waste) {
                Ok(0) => return,
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => return,
                Ok(_) | Err(_) => {}
            }
        }
    }

    /// Ends both directions now: whoever reads sees the end, whoever writes an error. Needed
    /// because a VM that is killed never says goodbye on its connections.
    pub(crate) fn cut(&self) {
        let write = self.0.write.as_ref();
        if let Err(error) = rustix::net::shutdown(write, rustix::net::Shutdown::Both) {
            tracing::trace!(%error, "a connection to be cut was over already");
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let result = ready!(Pin::new(&mut self.read).poll_read(cx, buffer));
        let received = buffer.filled().len() - before;
        self.handle
            .0
            .read_bytes
            .fetch_add(received as u64, Ordering::Relaxed);
        Poll::Ready(result)
    }
}

impl Socket {
    fn poll_write_with(
        &self,
        cx: &mut Context<'_>,
        write: impl Fn(&TcpStream) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        let shared = &*self.handle.0;
        let stream = shared.write.as_ref();
        loop {
            match stream.poll_write_ready(cx) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => {
                    shared.write_blocked.store(true, Ordering::Relaxed);
                    return Poll::Pending;
                }
            }
            match write(stream) {
                Ok(written) => {
                    shared
                        .written_bytes
                        .fetch_add(written as u64, Ordering::Relaxed);
                    shared.write_blocked.store(false, Ordering::Relaxed);
                    return Poll::Ready(Ok(written));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_with(cx, |stream| stream.try_write(bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_with(cx, |stream| stream.try_write_vectored(slices))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match rustix::net::shutdown(self.handle.0.write.as_ref(), rustix::net::Shutdown::Write) {
            Ok(()) | Err(rustix::io::Errno::NOTCONN) => Poll::Ready(Ok(())),
            Err(error) => Poll::Ready(Err(error.into())),
        }
    }
}
