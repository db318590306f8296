//! Upstream resolvers that fail, forge and are asked by many, on loopback.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{Name, RData, Record, RecordType};
use spore_wire::egress::{Grant, GrantTarget};
use tokio::net::UdpSocket;

use super::{Outcome, Resolver};
use crate::egress::Shared;
use crate::egress::policy::Policy;
use crate::egress::tally::Event;

const NAME: &str = "api.example.com";
const RIGHT: Ipv4Addr = Ipv4Addr::new(8, 8, 4, 4);
const FORGED: Ipv4Addr = Ipv4Addr::new(6, 6, 6, 6);

fn shared() -> Arc<Shared> {
    let to = GrantTarget::Name {
        name: NAME.to_owned(),
    };
    Arc::new(Shared::new(Policy::new(&[Grant { to, port: 443 }], &[])))
}

fn answer(to: &Message, address: Ipv4Addr) -> Message {
    let mut answer = Message::new(to.metadata.id, MessageType::Response, OpCode::Query);
    let query = to.queries[0].clone();
    let data = RData::A(A(address));
    answer.add_answer(Record::from_rdata(query.name().clone(), 60, data));
    answer.add_query(query);
    answer
}

/// A resolver of the host that sends what `replies` makes of each question.
async fn upstream(
    replies: impl Fn(&Message) -> Vec<Message> + Send + 'static,
) -> (SocketAddr, Arc<std::sync::Mutex<Vec<SocketAddr>>>) {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    let askers = Arc::new(std::sync::Mutex::new(Vec::new()));
    let seen = Arc::clone(&askers);
    tokio::spawn(async move {
        let mut packet = [0; 1500];
        loop {
            let (length, from) = socket.recv_from(&mut packet).await.unwrap();
            seen.lock().unwrap().push(from);
            let question = Message::from_vec(&packet[..length]).unwrap();
            for reply in replies(&question) {
                socket
                    .send_to(&reply.to_vec().unwrap(), from)
                    .await
                    .unwrap();
            }
        }
    });
    (address, askers)
}

async fn addresses(resolver: &Resolver) -> Vec<Ipv4Addr> {
    let index = resolver.shared.policy.indices().next().unwrap();
    match resolver.look_up(index).await.unwrap().outcome {
        Outcome::Addresses(addresses) => addresses,
        Outcome::Nothing(_code) => Vec::new(),
    }
}

#[tokio::test]
async fn a_resolver_that_fails_or_is_silent_is_passed_over() {
    let (silent, _) = upstream(|_| Vec::new()).await;
    let failing = |question: &Message| {
        let mut failed = answer(question, FORGED);
        failed.metadata.response_code = ResponseCode::ServFail;
        vec![failed]
    };
    let (failing, _) = upstream(failing).await;
    let (good, _) = upstream(|question| vec![answer(question, RIGHT)]).await;
    let resolver = Resolver::new(shared(), vec![silent, failing, good]);
    assert_eq!(addresses(&resolver).await, [RIGHT]);
}

#[tokio::test]
async fn forged_packets_are_skipped_and_the_answer_is_still_taken() {
    let forger = |question: &Message| {
        let mut wrong_id = answer(question, FORGED);
        wrong_id.metadata.id ^= 1;
        let mut wrong_name = answer(question, FORGED);
        let evil = Name::from_ascii("evil.test.").unwrap();
        wrong_name.queries = vec![Query::query(evil, RecordType::A)];
        vec![wrong_id, wrong_name, answer(question, RIGHT)]
    };
    let (address, _) = upstream(forger).await;
    let resolver = Resolver::new(shared(), vec![address]);
    assert_eq!(addresses(&resolver).await, [RIGHT]);
}

#[tokio::test]
async fn many_questions_at_once_are_one_lookup() {
    let (address, askers) = upstream(|question| vec![answer(question, RIGHT)]).await;
    let resolver = Arc::new(Resolver::new(shared(), vec![address]));
    let asking = (0..50).map(|_| {
        let resolver = Arc::clone(&resolver);
        tokio::spawn(async move { addresses(&resolver).await })
    });
    for asked in asking.collect::<Vec<_>>() {
        assert_eq!(asked.await.unwrap(), [RIGHT]);
    }
    assert_eq!(askers.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn a_failure_is_remembered_for_a_moment_and_every_try_has_its_own_port() {
    let failing = |question: &Message| {
        let mut failed = answer(question, FORGED);
        failed.metadata.response_code = ResponseCode::Refused;
        vec![failed]
    };
    let (address, askers) = upstream(failing).await;
    let resolver = Resolver::new(shared(), vec![address]);
    for _again in 0..5 {
        assert!(addresses(&resolver).await.is_empty());
    }
    let mut ports = askers.lock().unwrap().clone();
    assert_eq!(ports.len(), super::TRIES.len());
    ports.dedup();
    assert_eq!(ports.len(), super::TRIES.len());
    assert_eq!(resolver.shared.tally.of(Event::ResolveFailed), 1);
}
