//! The second face: what a tenant's process may ask of the agent, and the program that asks it.
//!
//! [`Face`] is served by [`crate::agent`] on `/run/spore/agent.sock`; [`ask`] is `main` of
//! `spore-guest keep-awake 10m` and `spore-guest ready`. One line of JSON each way.
//!
//! Whoever asks is a tenant: a connection may hold little memory for a short time, and nothing it
//! says can do more than keep its own VM awake, hurry its own readiness check or, of a fork, have
//! the host wait some seconds for it. Only one that wants to hear of forks stays, in
//! [`crate::hook`].

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::hook::{HOOKS_MAX, Hooks};
use crate::interest::Interest;

/// Where a tenant finds the socket.
pub const SOCKET_PATH: &str = "/run/spore/agent.sock";

/// The longest lease; [`spore_wire::guest::Event::KeepAwake`] promises it.
pub const KEEP_AWAKE_MS_MAX: u64 = 24 * 60 * 60 * 1000;

const CONNECTIONS_MAX: usize = 16;
const LINE_BYTES_MAX: usize = 256;
const LINE_MS_MAX: u64 = 2_000;

/// What may be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "snake_case")]
pub enum Wish {
    /// That the VM is not reaped for so long from now; 0 takes it back.
    KeepAwake {
        /// At most [`KEEP_AWAKE_MS_MAX`].
        for_ms: u64,
    },
    /// That the app counts as ready as soon as its port accepts, whatever its health path says.
    Ready,
    /// That the connection stays, and says when this VM has become a fork; see [`crate::hook`].
    AfterFork,
}

#[derive(Debug, Serialize, Deserialize)]
struct Answer {
    ok: bool,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    error: String,
}

impl Answer {
    fn refused(error: impl Into<String>) -> Self {
        let error = error.into();
        Self { ok: false, error }
    }
}

/// The listening side.
#[derive(Debug)]
pub struct Face {
    listener: UnixListener,
    connections: Vec<Connection>,
    hooks: Hooks,
}

#[derive(Debug)]
struct Connection {
    socket: OwnedFd,
    line: Vec<u8>,
    deadline_ms: u64,
}

impl Face {
    /// Listens at `path`, where every user of the guest may connect.
    ///
    /// # Errors
    /// Whatever the kernel answers.
    pub fn listen(path: &Path) -> io::Result<Self> {
        let listener = UnixListener::bind(path)?;
        listener.set_nonblocking(true)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o666))?;
        Ok(Self {
            listener,
            connections: Vec::new(),
            hooks: Hooks::default(),
        })
    }

    /// What it waits for.
    pub fn interest<'a>(&'a self, interest: &mut Interest<'a>) {
        if self.connections.len() < CONNECTIONS_MAX {
            interest.read(&self.listener);
        }
        for connection in &self.connections {
            interest.read(&connection.socket);
            interest.at(connection.deadline_ms);
        }
        self.hooks.interest(interest);
    }

    /// Those that want to hear of forks.
    pub const fn hooks(&mut self) -> &mut Hooks {
        &mut self.hooks
    }

    /// Goes on as far as it can and gives what was asked; each wish is answered with `ok`.
    pub fn pump(&mut self, now_ms: u64) -> Vec<Wish> {
        while self.connections.len() < CONNECTIONS_MAX
            && let Ok((socket, _peer)) = self.listener.accept()
        {
            if socket.set_nonblocking(true).is_ok() {
                self.connections.push(Connection {
                    socket: OwnedFd::from(socket),
                    line: Vec::new(),
                    deadline_ms: now_ms + LINE_MS_MAX,
                });
            }
        }
        let mut wishes = Vec::new();
        for mut connection in std::mem::take(&mut self.connections) {
            match connection.pump(now_ms, self.hooks.has_room()) {
                Next::Wait => self.connections.push(connection),
                Next::Over => {}
                Next::Wish(wish) => wishes.push(wish),
                Next::Hook => self.hooks.add(connection.socket),
            }
        }
        self.hooks.pump();
        wishes
    }
}

/// What becomes of a connection.
enum Next {
    Wait,
    Over,
    Wish(Wish),
    Hook,
}

impl Connection {
    fn pump(&mut self, now_ms: u64, may_hook: bool) -> Next {
        let unless_late = |waits: bool| match waits && now_ms < self.deadline_ms {
            true => Next::Wait,
            false => Next::Over,
        };
        let mut buffer = [0; LINE_BYTES_MAX];
        match rustix::io::read(&self.socket, &mut buffer) {
            Ok(0) => return Next::Over,
            Ok(bytes) => self.line.extend_from_slice(&buffer[..bytes]),
            Err(Errno::AGAIN | Errno::INTR) => return unless_late(true),
            Err(_) => return Next::Over,
        }
        let Some(end) = self.line.iter().position(|byte| *byte == b'\n') else {
            return unless_late(self.line.len() < LINE_BYTES_MAX);
        };
        let asked = match serde_json::from_slice(&self.line[..end]) {
            Ok(Wish::KeepAwake { for_ms }) if for_ms > KEEP_AWAKE_MS_MAX => {
                Err("at most 24h can be asked for at once".to_owned())
            }
            Ok(Wish::AfterFork) if !may_hook => {
                Err(format!("{HOOKS_MAX} processes wait for forks already"))
            }
            Ok(Wish::AfterFork) => Ok(Next::Hook),
            Ok(wish) => Ok(Next::Wish(wish)),
            Err(error) => Err(format!("not a question of this agent: {error}")),
        };
        let (answer, next) = match asked {
            Ok(next) => {
                let (ok, error) = (true, String::new());
                (Answer { ok, error }, next)
            }
            Err(error) => (Answer::refused(error), Next::Over),
        };
        let mut text = serde_json::to_vec(&answer).unwrap_or_default();
        text.push(b'\n');
        // Fits the socket's buffer; one who does not read it has lost only an answer.
        let _unheard = rustix::io::write(&self.socket, &text);
        next
    }
}

/// Runs `spore-guest VERB …`. Gives the exit code: 0 done, 1 refused, 2 misused.
#[must_use]
pub fn ask(arguments: &[String]) -> u8 {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let wish = match words[..] {
        ["ready"] => Ok(Wish::Ready),
        ["keep-awake", text] => duration_ms(text).map(|for_ms| Wish::KeepAwake { for_ms }),
        _ => Err(
            "usage: spore-guest keep-awake DURATION (10m, 1h30m; 0 takes it back)\n       \
             spore-guest ready"
                .to_owned(),
        ),
    };
    let (code, message) = match wish.map(|wish| put(Path::new(SOCKET_PATH), wish)) {
        Ok(Ok(())) => return 0,
        Ok(Err(message)) => (1, message),
        Err(message) => (2, message),
    };
    // Without a standard error there is nobody to tell; the code still says it.
    drop(writeln!(io::stderr(), "{message}"));
    code
}

fn put(path: &Path, wish: Wish) -> Result<(), String> {
    let unreachable = |error: io::Error| {
        format!("cannot reach the agent at {SOCKET_PATH}: {error}; this works only inside a VM")
    };
    let mut socket = UnixStream::connect(path).map_err(unreachable)?;
    let mut line = serde_json::to_vec(&wish).map_err(|error| error.to_string())?;
    line.push(b'\n');
    socket.write_all(&line).map_err(unreachable)?;
    let mut text = String::new();
    BufReader::new(socket.take(4096))
        .read_line(&mut text)
        .map_err(unreachable)?;
    match serde_json::from_str(&text) {
        Ok(Answer { ok: true, .. }) => Ok(()),
        Ok(Answer { error, .. }) => Err(error),
        Err(_) => Err("the agent gave no answer: it serves 16 at a time, try again".to_owned()),
    }
}

/// Milliseconds of a text such as `90s`, `1h30m`, `500ms` or `0`.
fn duration_ms(text: &str) -> Result<u64, String> {
    let wrong = || format!("`{text}` is not a duration: write 500ms, 90s, 10m, 1h30m or 0");
    let mut rest = text;
    let mut total: u64 = 0;
    if rest == "0" {
        return Ok(0);
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
        let count: u64 = rest[..digits].parse().map_err(|_e| wrong())?;
        rest = &rest[digits..];
        let units = [("ms", 1), ("s", 1000), ("m", 60_000), ("h", 3_600_000)];
        let (unit, ms) = units
            .iter()
            .find(|(unit, _ms)| rest.starts_with(unit))
            .ok_or_else(wrong)?;
        rest = &rest[unit.len()..];
        total = count
            .checked_mul(*ms)
            .and_then(|ms| total.checked_add(ms))
            .ok_or_else(wrong)?;
    }
    if total > KEEP_AWAKE_MS_MAX || text.is_empty() {
        return Err(format!("`{text}`: between 0 and 24h can be asked for"));
    }
    Ok(total)
}

#[cfg(test)]
mod tests {
    use super::{Face, KEEP_AWAKE_MS_MAX, Wish, duration_ms, put};
    use crate::clock;
    use crate::interest::Interest;

    #[test]
    fn durations_are_read_as_people_write_them() {
        assert_eq!(duration_ms("10m"), Ok(600_000));
        assert_eq!(duration_ms("1h30m"), Ok(5_400_000));
        assert_eq!(duration_ms("250ms"), Ok(250));
        assert_eq!(duration_ms("0"), Ok(0));
        for wrong in ["", "10", "m", "25h", "-1s", "1d", "99999999999999999999h"] {
            assert!(duration_ms(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_wish_is_heard_and_one_for_too_long_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("agent.sock");
        let mut face = Face::listen(&path).unwrap();
        let asker = std::thread::spawn(move || {
            let long = Wish::KeepAwake {
                for_ms: KEEP_AWAKE_MS_MAX + 1,
            };
            let wish = Wish::KeepAwake { for_ms: 5 };
            (put(&path, long), put(&path, wish), put(&path, Wish::Ready))
        });
        let mut wishes = Vec::new();
        while wishes.len() < 2 {
            let now = clock::monotonic_ms();
            let mut interest = Interest::default();
            face.interest(&mut interest);
            drop(interest.wait(now));
            wishes.extend(face.pump(now));
        }
        let (long, wish, ready) = asker.join().unwrap();
        assert!(long.unwrap_err().contains("24h"));
        assert_eq!((wish, ready), (Ok(()), Ok(())));
        assert_eq!(wishes, [Wish::KeepAwake { for_ms: 5 }, Wish::Ready]);
    }
}
