//! The relay: from the guest's address to an app that listens only on the loopback.
//!
//! Started by [`crate::runner`] as a process of its own, without rights, so that nothing a visitor
//! sends runs in PID 1; `main` calls [`run`] in it. It ends when the agent kills it, which gives
//! the port back.
//!
//! One loop moves bytes both ways for every connection, one small buffer per direction; a side that
//! does not read stops the other from being read.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd, RawFd};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, Shutdown, SocketFlags, SocketType, accept_with, connect, shutdown, socket_with,
    sockopt,
};
use rustix::process::Pid;

use crate::exec::nonblocking;
use crate::sys;

/// The first argument of the relay's process.
pub const VERB: &str = "relay";

/// The most connections at once; more wait in the kernel's backlog.
const CONNECTIONS_MAX: usize = 512;

const BUFFER_BYTES: usize = 16 * 1024;

/// Who owns nothing, on every Linux.
const NOBODY: u32 = 65_534;

/// Starts a relay from `outside:port` to `inside:port`.
///
/// # Errors
/// When the port is taken or no process can be spawned.
pub fn start(program: &Path, outside: Ipv4Addr, inside: SocketAddrV4) -> io::Result<Pid> {
    let listener = TcpListener::bind((outside, inside.port()))?;
    nonblocking(&listener)?;
    let mut command = Command::new(program);
    command
        .arg(VERB)
        .arg(listener.as_raw_fd().to_string())
        .arg(inside.to_string());
    command.env_clear().current_dir("/");
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    if rustix::process::geteuid().is_root() {
        command.uid(NOBODY).gid(NOBODY);
    }
    sys::inherit(&mut command, &[listener.as_fd()]);
    let child = command.spawn()?;
    i32::try_from(child.id())
        .ok()
        .and_then(Pid::from_raw)
        .ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))
}

/// The relay's process. Gives its exit code.
#[must_use]
pub fn run(listener: RawFd, inside: SocketAddrV4) -> u8 {
    let Ok(listener) = sys::take_inherited(listener) else {
        return 126;
    };
    let mut relay = Relay {
        listener,
        inside,
        connections: Vec::new(),
    };
    loop {
        if relay.turn().is_err() {
            return 1;
        }
    }
}

#[derive(Debug)]
struct Relay {
    listener: OwnedFd,
    inside: SocketAddrV4,
    connections: Vec<Connection>,
}

#[derive(Debug)]
struct Connection {
    visitor: OwnedFd,
    app: OwnedFd,
    to_app: Pipe,
    to_visitor: Pipe,
}

/// One direction.
#[derive(Debug)]
struct Pipe {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    state: PipeState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PipeState {
    Open,
    SourceEnded,
    Over,
}

impl Relay {
    fn turn(&mut self) -> rustix::io::Result<()> {
        self.wait()?;
        while self.connections.len() < CONNECTIONS_MAX {
            match accept_with(&self.listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
                Ok(visitor) => self
                    .connections
                    .extend(Connection::open(visitor, self.inside)),
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(errno) => return Err(errno),
            }
        }
        self.connections.retain_mut(Connection::pump);
        Ok(())
    }

    fn wait(&self) -> rustix::io::Result<()> {
        let mut fds = Vec::with_capacity(1 + self.connections.len() * 2);
        if self.connections.len() < CONNECTIONS_MAX {
            fds.push(PollFd::new(&self.listener, PollFlags::IN));
        }
        for connection in &self.connections {
            let (visitor, app) = connection.wants();
            // One that waits for nothing is left out: its hang-up would be reported for ever.
            if !visitor.is_empty() {
                fds.push(PollFd::new(&connection.visitor, visitor));
            }
            if !app.is_empty() {
                fds.push(PollFd::new(&connection.app, app));
            }
        }
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(errno) => Err(errno),
        }
    }
}

impl Connection {
    /// Connects to the app; a visitor for whom that fails is hung up on.
    fn open(visitor: OwnedFd, inside: SocketAddrV4) -> Option<Self> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let app = socket_with(AddressFamily::INET, SocketType::STREAM, flags, None).ok()?;
        match connect(&app, &inside) {
            Ok(()) | Err(Errno::INPROGRESS) => {}
            Err(_) => return None,
        }
        for socket in [&visitor, &app] {
            sockopt::set_tcp_nodelay(socket, true).ok()?;
        }
        Some(Self {
            visitor,
            app,
            to_app: Pipe::new(),
            to_visitor: Pipe::new(),
        })
    }

    fn wants(&self) -> (PollFlags, PollFlags) {
        let (visitor_in, app_out) = self.to_app.wants();
        let (app_in, visitor_out) = self.to_visitor.wants();
        (visitor_in | visitor_out, app_in | app_out)
    }

    /// Moves bytes. False when the connection is over.
    fn pump(&mut self) -> bool {
        let moved = self
            .to_app
            .pump(&self.visitor, &self.app)
            .and_then(|()| self.to_visitor.pump(&self.app, &self.visitor));
        let over = [&self.to_app, &self.to_visitor]
            .iter()
            .all(|pipe| pipe.state == PipeState::Over);
        moved.is_ok() && !over
    }
}

impl Pipe {
    fn new() -> Self {
        Self {
            buffer: vec![0; BUFFER_BYTES].into_boxed_slice(),
            start: 0,
            end: 0,
            state: PipeState::Open,
        }
    }

    /// What is asked of the source and of the sink.
    fn wants(&self) -> (PollFlags, PollFlags) {
        match self.state {
            _ if self.start < self.end => (PollFlags::empty(), PollFlags::OUT),
            PipeState::Open => (PollFlags::IN, PollFlags::empty()),
            PipeState::SourceEnded => (PollFlags::empty(), PollFlags::OUT),
            PipeState::Over => (PollFlags::empty(), PollFlags::empty()),
        }
    }

    fn pump(&mut self, source: &OwnedFd, sink: &OwnedFd) -> rustix::io::Result<()> {
        match self.go_on(source, sink) {
            Err(Errno::AGAIN | Errno::INTR) => Ok(()),
            result => result,
        }
    }

    fn go_on(&mut self, source: &OwnedFd, sink: &OwnedFd) -> rustix::io::Result<()> {
        loop {
            while self.start < self.end {
                self.start += rustix::io::write(sink, &self.buffer[self.start..self.end])?;
            }
            match self.state {
                PipeState::Open => {
                    (self.start, self.end) = (0, 0);
                    self.end = rustix::io::read(source, &mut self.buffer[..])?;
                    if self.end == 0 {
                        self.state = PipeState::SourceEnded;
                    }
                }
                PipeState::SourceEnded => {
                    shutdown(sink, Shutdown::Write)?;
                    self.state = PipeState::Over;
                }
                PipeState::Over => return Ok(()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
    use std::os::fd::OwnedFd;

    use super::{Relay, nonblocking};

    /// A relay on a thread; it lives until the test process ends.
    fn relayed(app: &TcpListener) -> SocketAddr {
        let SocketAddr::V4(inside) = app.local_addr().unwrap() else {
            panic!("not an IPv4 address");
        };
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let outside = listener.local_addr().unwrap();
        nonblocking(&listener).unwrap();
        let mut relay = Relay {
            listener: OwnedFd::from(listener),
            inside,
            connections: Vec::new(),
        };
        std::thread::spawn(move || while relay.turn().is_ok() {});
        outside
    }

    #[test]
    fn bytes_go_both_ways_and_a_half_close_is_passed_on() {
        let app = TcpListener::bind("127.0.0.1:0").unwrap();
        let outside = relayed(&app);
        let server = std::thread::spawn(move || {
            let (mut socket, _peer) = app.accept().unwrap();
            let mut all = Vec::new();
            socket.read_to_end(&mut all).unwrap();
            all.reverse();
            socket.write_all(&all).unwrap();
        });
        let sent: Vec<u8> = (0..300_000_u32).map(|at| at.to_le_bytes()[0]).collect();
        let mut visitor = TcpStream::connect(outside).unwrap();
        visitor.write_all(&sent).unwrap();
        visitor.shutdown(Shutdown::Write).unwrap();
        let mut back = Vec::new();
        visitor.read_to_end(&mut back).unwrap();
        back.reverse();
        assert_eq!(back, sent);
        server.join().unwrap();
    }

    #[test]
    fn a_visitor_of_an_app_that_is_gone_is_hung_up_on() {
        let app = TcpListener::bind("127.0.0.1:0").unwrap();
        let outside = relayed(&app);
        drop(app);
        let mut visitor = TcpStream::connect(outside).unwrap();
        let mut back = Vec::new();
        assert!(matches!(visitor.read_to_end(&mut back), Ok(0) | Err(_)));
    }
}
