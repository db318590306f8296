//! DNS messages: what a guest asked, what it is told, what the host's resolvers are asked and what
//! they say.
//!
//! Used by `resolver`. Pure: bytes in, bytes out. A query that goes out is made from a granted
//! name alone, so no byte of the guest's ever leaves through DNS. Never believes a record that the
//! question and its chain of aliases do not lead to.

use std::net::Ipv4Addr;

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use thiserror::Error;

use crate::egress::policy::{NameIndex, Policy, Standing};

/// The most bytes of a guest's query; longer ones are dropped.
pub const QUERY_BYTES_MAX: usize = 1232;

/// The most bytes of an upstream answer, which is also announced upstream: what passes every path
/// unfragmented.
pub const ANSWER_BYTES_MAX: u16 = 1232;

/// The most addresses handed out in one answer. With the longest name an answer of so many is
/// still below the 512 bytes that every client takes.
pub const ADDRESSES_MAX: usize = 12;

/// The longest chain of aliases that is followed.
const ALIASES_MAX: usize = 16;

/// The most records that an upstream answer is decoded with.
const RECORDS_MAX: u16 = 256;

/// Bytes of the fixed header.
const HEADER_BYTES: usize = 12;

/// One question of a guest.
#[derive(Debug)]
pub struct Question {
    id: u16,
    op_code: OpCode,
    recursion_desired: bool,
    query: Query,
}

/// What is done about a question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plan {
    /// Answered at once, without an address.
    Reply(ResponseCode),
    /// Not granted: answered at once, and counted.
    Refuse(ResponseCode),
    /// The addresses of this granted name are looked up.
    LookUp(NameIndex),
}

/// What an upstream answer says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// These addresses, for so many seconds. May be empty.
    Addresses {
        /// In the order of the answer, without repetition.
        addresses: Vec<Ipv4Addr>,
        /// The shortest lifetime along the chain; 0 when there is no address.
        ttl: u32,
    },
    /// There is no such name.
    NoSuchName,
}

/// Why an upstream packet is not an answer.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum AnswerError {
    /// Another id or question, or no response: perhaps forged; the right one may still come.
    #[error("not the answer to this question")]
    Foreign,
    /// The resolver answered that it will not or cannot.
    #[error("the resolver answered {0}")]
    Failed(ResponseCode),
    /// Cut off before the first address.
    #[error("the answer was cut off")]
    Truncated,
    /// The aliases form a loop or a chain without an end.
    #[error("the aliases do not end")]
    Aliases,
}

impl Question {
    /// Reads a guest's packet; `None` is a packet that deserves no answer: malformed, itself an
    /// answer, or with records that a query does not have.
    #[must_use]
    pub fn read(packet: &[u8]) -> Option<Self> {
        let [questions, answers, authorities, additionals] = counts(packet)?;
        let is_plain = (questions, answers, authorities) == (1, 0, 0) && additionals <= 1;
        if packet.len() > QUERY_BYTES_MAX || !is_plain {
            return None;
        }
        let message = Message::from_vec(packet).ok()?;
        if message.metadata.message_type != MessageType::Query {
            return None;
        }
        Some(Self {
            id: message.metadata.id,
            op_code: message.metadata.op_code,
            recursion_desired: message.metadata.recursion_desired,
            query: message.queries.into_iter().next()?,
        })
    }

    /// What to do about it.
    ///
    /// A name that is not granted does not exist (`NXDOMAIN`): programs then say so at once,
    /// while they would try again for many seconds after `REFUSED`. A name above a granted one
    /// exists without addresses, since a caching resolver in the guest takes `NXDOMAIN` for the
    /// whole tree below (RFC 8020).
    #[must_use]
    pub fn plan(&self, policy: &Policy) -> Plan {
        if self.op_code != OpCode::Query {
            return Plan::Reply(ResponseCode::NotImp);
        }
        if self.query.query_class() != DNSClass::IN {
            return Plan::Refuse(ResponseCode::Refused);
        }
        let name = self.name();
        match (policy.standing(&name), self.query.query_type()) {
            (Standing::Granted(index), RecordType::A) => Plan::LookUp(index),
            (Standing::Granted(_) | Standing::Ancestor, _) => Plan::Reply(ResponseCode::NoError),
            (Standing::Unknown, _) => Plan::Refuse(ResponseCode::NXDomain),
        }
    }

    /// The name asked for, lower case, without the trailing dot. Bytes that no host name has are
    /// escaped, so that a dot inside a label is not taken for a separator.
    #[must_use]
    pub fn name(&self) -> String {
        let mut name = self.query.name().to_lowercase().to_ascii();
        if name.ends_with('.') {
            name.pop();
        }
        name
    }

    /// The reply: the question as it was written, and `addresses` to be used for `ttl` seconds.
    /// `None` if it cannot be encoded.
    #[must_use]
    pub fn reply(&self, code: ResponseCode, addresses: &[Ipv4Addr], ttl: u32) -> Option<Vec<u8>> {
        let mut message = Message::new(self.id, MessageType::Response, self.op_code);
        message.metadata.recursion_desired = self.recursion_desired;
        message.metadata.recursion_available = true;
        message.metadata.response_code = code;
        message.add_query(self.query.clone());
        for address in addresses.iter().take(ADDRESSES_MAX) {
            let data = RData::A(A(*address));
            message.add_answer(Record::from_rdata(self.query.name().clone(), ttl, data));
        }
        message.to_vec().ok()
    }
}

/// The query for the addresses of `name` that a resolver is sent. `None` if it cannot be encoded.
#[must_use]
pub fn ask(id: u16, name: &str) -> Option<Vec<u8>> {
    let mut message = Message::new(id, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(absolute(name)?, RecordType::A));
    let mut edns = Edns::new();
    edns.set_max_payload(ANSWER_BYTES_MAX);
    message.set_edns(edns);
    message.to_vec().ok()
}

/// Reads a resolver's packet as the answer to `ask(id, name)`.
///
/// # Errors
/// [`AnswerError`].
pub fn read_answer(packet: &[u8], id: u16, name: &str) -> Result<Answer, AnswerError> {
    let asked = absolute(name).ok_or(AnswerError::Foreign)?;
    let within = counts(packet).is_some_and(|counts| counts.iter().all(|n| *n <= RECORDS_MAX));
    if !within {
        return Err(AnswerError::Foreign);
    }
    let message = Message::from_vec(packet).map_err(|_e| AnswerError::Foreign)?;
    let is_same = |query: &Query| {
        *query.name() == asked
            && query.query_type() == RecordType::A
            && query.query_class() == DNSClass::IN
    };
    let metadata = &message.metadata;
    if metadata.id != id
        || metadata.message_type != MessageType::Response
        || metadata.op_code != OpCode::Query
        || message.queries.len() != 1
        || !message.queries.iter().all(is_same)
    {
        return Err(AnswerError::Foreign);
    }
    match metadata.response_code {
        ResponseCode::NoError => {}
        ResponseCode::NXDomain => return Ok(Answer::NoSuchName),
        other => return Err(AnswerError::Failed(other)),
    }
    let (addresses, ttl) = follow(&message.answers, asked)?;
    if addresses.is_empty() && metadata.truncation {
        return Err(AnswerError::Truncated);
    }
    Ok(Answer::Addresses { addresses, ttl })
}

/// Follows the aliases from `asked` through `records` to its addresses.
fn follow(records: &[Record], asked: Name) -> Result<(Vec<Ipv4Addr>, u32), AnswerError> {
    let mut current = asked;
    let mut ttl = u32::MAX;
    for _hop in 0..ALIASES_MAX {
        let mut addresses = Vec::new();
        let mut alias = None;
        let of_current =
            |record: &&Record| record.name == current && record.dns_class == DNSClass::IN;
        for record in records.iter().filter(of_current) {
            match &record.data {
                RData::A(A(address)) if !addresses.contains(address) => {
                    addresses.push(*address);
                    ttl = ttl.min(record.ttl);
                }
                RData::CNAME(target) if alias.is_none() => {
                    alias = Some((target.0.clone(), record.ttl));
                }
                _ => {}
            }
        }
        match alias {
            _ if !addresses.is_empty() => return Ok((addresses, ttl)),
            Some((target, alias_ttl)) => {
                ttl = ttl.min(alias_ttl);
                current = target;
            }
            None => return Ok((Vec::new(), 0)),
        }
    }
    Err(AnswerError::Aliases)
}

fn absolute(name: &str) -> Option<Name> {
    let mut name = Name::from_ascii(name).ok()?;
    name.set_fqdn(true);
    Some(name)
}

/// The four counts of the header, read before anything is allocated for them.
fn counts(packet: &[u8]) -> Option<[u16; 4]> {
    let header = packet.get(..HEADER_BYTES)?;
    let mut counts = [0; 4];
    for (count, bytes) in counts.iter_mut().zip(header.get(4..)?.as_chunks::<2>().0) {
        *count = u16::from_be_bytes(*bytes);
    }
    Some(counts)
}

#[cfg(test)]
mod tests;
