//! Answers the guest's DNS questions about granted names, and remembers what it answered.
//!
//! Run by `serve` beside the TCP proxy. Asks only the host's resolvers, over UDP, with a fresh
//! socket (hence source port) and id for every try. Never forwards a guest's packet, never hands
//! out an address that the policy would not let a name lead to (DNS rebinding), and never holds
//! more than [`QUESTIONS_MAX`] questions at once: what is too much is dropped, and asked again by
//! the client.
//!
//! Per name there is one lookup at a time and its result is kept for its lifetime, so a guest that
//! asks in a loop costs the host's resolvers nothing.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use hickory_proto::op::ResponseCode;
use tokio::net::UdpSocket;
use tokio::sync::{Mutex, Semaphore};
use tokio::time::{Instant, timeout_at};

use crate::egress::Shared;
use crate::egress::message::{
    ADDRESSES_MAX, ANSWER_BYTES_MAX, Answer, Plan, QUERY_BYTES_MAX, Question, ask, read_answer,
};
use crate::egress::policy::NameIndex;
use crate::egress::tally::Event;

/// The most questions that wait for a lookup at once.
pub const QUESTIONS_MAX: usize = 32;

/// The longest lifetime handed out, in seconds: how long a guest may use an address unasked.
const TTL_MAX: u32 = 300;

/// The shortest time a result is kept, in seconds.
const TTL_MIN: u32 = 1;

/// How long it is remembered that a name does not exist or has no address, in seconds.
const TTL_NOTHING: u32 = 10;

/// How long a failure of the resolvers is remembered, in seconds.
const TTL_FAILED: u32 = 2;

/// How long each try waits. Together less than the five seconds that guests wait.
const TRIES: [Duration; 3] = [
    Duration::from_millis(1000),
    Duration::from_millis(1500),
    Duration::from_millis(2000),
];

/// The most packets read while waiting for one answer; the rest is a flood of forgeries.
const PACKETS_PER_TRY_MAX: usize = 16;

/// The resolver of one proxy.
#[derive(Debug)]
pub struct Resolver {
    shared: Arc<Shared>,
    upstream: Vec<SocketAddr>,
    /// One per granted name; the lock is held while the name is looked up.
    kept: Vec<Mutex<Option<Kept>>>,
}

#[derive(Clone, Debug)]
struct Kept {
    until: Instant,
    outcome: Outcome,
}

#[derive(Clone, Debug)]
enum Outcome {
    Addresses(Vec<Ipv4Addr>),
    Nothing(ResponseCode),
}

impl Resolver {
    /// A resolver that asks `upstream`, first address first.
    #[must_use]
    pub fn new(shared: Arc<Shared>, upstream: Vec<SocketAddr>) -> Self {
        let kept = shared
            .policy
            .indices()
            .map(|_index| Mutex::new(None))
            .collect();
        Self {
            shared,
            upstream,
            kept,
        }
    }

    /// Answers on `socket` until the process ends.
    pub async fn serve(self, socket: UdpSocket) {
        let (resolver, socket) = (Arc::new(self), Arc::new(socket));
        let places = Arc::new(Semaphore::new(QUESTIONS_MAX));
        let mut packet = [0; QUERY_BYTES_MAX + 1];
        loop {
            let Ok((length, from)) = socket.recv_from(&mut packet).await else {
                // An ICMP error of an earlier answer; the socket itself cannot fail.
                tokio::task::yield_now().await;
                continue;
            };
            let Some(question) = packet.get(..length).and_then(Question::read) else {
                resolver.shared.tally.count(Event::PacketDropped);
                continue;
            };
            match question.plan(&resolver.shared.policy) {
                Plan::Reply(code) => send(&socket, from, question.reply(code, &[], 0)),
                Plan::Refuse(code) => {
                    resolver.shared.tally.count(Event::NameRefused);
                    send(&socket, from, question.reply(code, &[], 0));
                }
                Plan::LookUp(name) => {
                    let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
                        resolver.shared.tally.count(Event::PacketDropped);
                        continue;
                    };
                    let (resolver, socket) = (Arc::clone(&resolver), Arc::clone(&socket));
                    tokio::spawn(async move {
                        send(&socket, from, resolver.answer(&question, name).await);
                        drop(place);
                    });
                }
            }
        }
    }

    async fn answer(&self, question: &Question, name: NameIndex) -> Option<Vec<u8>> {
        let kept = self.look_up(name).await?;
        match kept.outcome {
            Outcome::Nothing(code) => question.reply(code, &[], 0),
            Outcome::Addresses(addresses) => {
                let left = kept.until.saturating_duration_since(Instant::now());
                // Admitted before the guest can know the address.
                self.shared.admit(name, &addresses, left);
                self.shared.tally.count(Event::Resolved);
                let ttl = u32::try_from(left.as_secs()).unwrap_or(TTL_MAX);
                question.reply(ResponseCode::NoError, &addresses, ttl)
            }
        }
    }

    /// The result for a name, kept or looked up now.
    async fn look_up(&self, name: NameIndex) -> Option<Kept> {
        let place = self
            .shared
            .policy
            .indices()
            .position(|index| index == name)?;
        let mut kept = self.kept.get(place)?.lock().await;
        if let Some(kept) = kept.as_ref().filter(|kept| kept.until > Instant::now()) {
            return Some(kept.clone());
        }
        let (outcome, ttl) = match self.ask_upstream(self.shared.policy.name(name)?).await {
            Some(Answer::Addresses { addresses, ttl }) => self.keep_public(&addresses, ttl),
            Some(Answer::NoSuchName) => (Outcome::Nothing(ResponseCode::NXDomain), TTL_NOTHING),
            None => {
                self.shared.tally.count(Event::ResolveFailed);
                (Outcome::Nothing(ResponseCode::ServFail), TTL_FAILED)
            }
        };
        let until = Instant::now() + Duration::from_secs(u64::from(ttl));
        *kept = Some(Kept { until, outcome });
        kept.clone()
    }

    fn keep_public(&self, addresses: &[Ipv4Addr], ttl: u32) -> (Outcome, u32) {
        let mut public = Vec::new();
        for address in addresses {
            if !self.shared.policy.is_reachable_by_name(*address) {
                self.shared.tally.count(Event::AddressStripped);
            } else if public.len() < ADDRESSES_MAX {
                public.push(*address);
            }
        }
        if public.is_empty() {
            (Outcome::Nothing(ResponseCode::NoError), TTL_NOTHING)
        } else {
            (Outcome::Addresses(public), ttl.clamp(TTL_MIN, TTL_MAX))
        }
    }

    /// Asks one resolver after the other; `None` when none of them gave an answer.
    async fn ask_upstream(&self, name: &str) -> Option<Answer> {
        let resolvers = self.upstream.iter().cycle();
        for (resolver, patience) in resolvers.zip(TRIES) {
            if let Some(answer) = ask_one(*resolver, name, patience).await {
                return Some(answer);
            }
        }
        None
    }
}

/// Sends without waiting: an answer that does not fit the socket's buffer is asked for again.
fn send(socket: &UdpSocket, to: SocketAddr, reply: Option<Vec<u8>>) {
    if let Some(reply) = reply {
        let _lost = socket.try_send_to(&reply, to);
    }
}

async fn ask_one(resolver: SocketAddr, name: &str, patience: Duration) -> Option<Answer> {
    let deadline = Instant::now() + patience;
    let any: IpAddr = match resolver {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let mut id = [0; 2];
    getrandom::fill(&mut id).ok()?;
    let id = u16::from_ne_bytes(id);
    // The kernel picks a random port, and a connected socket takes packets of its peer only.
    let socket = UdpSocket::bind((any, 0)).await.ok()?;
    socket.connect(resolver).await.ok()?;
    socket.send(&ask(id, name)?).await.ok()?;
    let mut packet = [0; ANSWER_BYTES_MAX as usize];
    for _packet in 0..PACKETS_PER_TRY_MAX {
        let length = timeout_at(deadline, socket.recv(&mut packet))
            .await
            .ok()?
            .ok()?;
        match read_answer(packet.get(..length)?, id, name) {
            Ok(answer) => return Some(answer),
            Err(crate::egress::message::AnswerError::Foreign) => {}
            Err(_failed) => return None,
        }
    }
    None
}

#[cfg(test)]
mod tests;
