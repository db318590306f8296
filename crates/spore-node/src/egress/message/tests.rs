//! What guests ask and resolvers say, well-formed, forged and mangled.

use std::net::Ipv4Addr;

use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, CNAME};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use proptest::prelude::{any, proptest};
use proptest::{collection, prop_assert, prop_assert_eq, sample};
use spore_wire::egress::{Grant, GrantTarget};

use super::{ADDRESSES_MAX, Answer, AnswerError, Plan, Question, ask, read_answer};
use crate::egress::policy::Policy;

const NAME: &str = "api.example.com";

fn name(text: &str) -> Name {
    let mut name = Name::from_ascii(text).unwrap();
    name.set_fqdn(true);
    name
}

fn policy() -> Policy {
    let to = GrantTarget::Name {
        name: NAME.to_owned(),
    };
    Policy::new(&[Grant { to, port: 443 }], &[])
}

fn query(text: &str, kind: RecordType) -> Message {
    let mut message = Message::new(7, MessageType::Query, OpCode::Query);
    message.add_query(Query::query(name(text), kind));
    message
}

fn plan_of(message: &Message) -> Option<Plan> {
    Question::read(&message.to_vec().unwrap()).map(|question| question.plan(&policy()))
}

fn address(owner: &str, ttl: u32, address: [u8; 4]) -> Record {
    Record::from_rdata(name(owner), ttl, RData::A(A(Ipv4Addr::from(address))))
}

fn alias(owner: &str, ttl: u32, target: &str) -> Record {
    Record::from_rdata(name(owner), ttl, RData::CNAME(CNAME(name(target))))
}

fn answer(id: u16, records: Vec<Record>) -> Message {
    let mut message = Message::new(id, MessageType::Response, OpCode::Query);
    message.add_query(Query::query(name(NAME), RecordType::A));
    message.insert_answers(records);
    message
}

fn read(message: &Message) -> Result<Answer, AnswerError> {
    read_answer(&message.to_vec().unwrap(), 9, NAME)
}

fn addresses(list: &[[u8; 4]], ttl: u32) -> Answer {
    let addresses = list.iter().map(|octets| Ipv4Addr::from(*octets)).collect();
    Answer::Addresses { addresses, ttl }
}

#[test]
fn only_a_granted_name_is_looked_up_in_whatever_case() {
    let index = policy().indices().next().unwrap();
    for text in [NAME, "API.Example.COM", "aPi.eXaMpLe.cOm."] {
        assert_eq!(
            plan_of(&query(text, RecordType::A)),
            Some(Plan::LookUp(index)),
            "{text}"
        );
    }
    for text in [
        "www.example.com",
        "x.api.example.com",
        "evil.test",
        "api.example.com.evil.test",
    ] {
        let plan = plan_of(&query(text, RecordType::A));
        assert_eq!(plan, Some(Plan::Refuse(ResponseCode::NXDomain)), "{text}");
    }
}

#[test]
fn other_types_and_names_above_exist_without_data() {
    for kind in [
        RecordType::AAAA,
        RecordType::HTTPS,
        RecordType::TXT,
        RecordType::ANY,
    ] {
        assert_eq!(
            plan_of(&query(NAME, kind)),
            Some(Plan::Reply(ResponseCode::NoError))
        );
    }
    let above = plan_of(&query("example.com", RecordType::A));
    assert_eq!(above, Some(Plan::Reply(ResponseCode::NoError)));
}

#[test]
fn a_dot_inside_a_label_separates_nothing() {
    let mut message = Message::new(7, MessageType::Query, OpCode::Query);
    let odd = Name::from_labels([&b"api.example"[..], b"com"]).unwrap();
    message.add_query(Query::query(odd, RecordType::A));
    assert_eq!(
        plan_of(&message),
        Some(Plan::Refuse(ResponseCode::NXDomain))
    );
}

#[test]
fn other_classes_and_operations_are_turned_down() {
    let mut chaos = Message::new(7, MessageType::Query, OpCode::Query);
    let mut question = Query::query(name(NAME), RecordType::A);
    question.set_query_class(DNSClass::CH);
    chaos.add_query(question);
    assert_eq!(plan_of(&chaos), Some(Plan::Refuse(ResponseCode::Refused)));
    let mut status = Message::new(7, MessageType::Query, OpCode::Status);
    status.add_query(Query::query(name(NAME), RecordType::A));
    assert_eq!(plan_of(&status), Some(Plan::Reply(ResponseCode::NotImp)));
}

#[test]
fn what_is_not_one_plain_question_gets_no_answer() {
    assert_eq!(plan_of(&answer(7, vec![])), None);
    assert_eq!(
        plan_of(&Message::new(7, MessageType::Query, OpCode::Query)),
        None
    );
    let mut two = query(NAME, RecordType::A);
    two.add_query(Query::query(name("evil.test"), RecordType::A));
    assert_eq!(plan_of(&two), None);
    let mut loaded = query(NAME, RecordType::A);
    loaded.add_answer(address(NAME, 1, [8, 8, 8, 8]));
    assert_eq!(plan_of(&loaded), None);
    assert!(Question::read(&[]).is_none());
    assert!(Question::read(&[0; 12]).is_none());
    assert!(Question::read(&[0xff; 2000]).is_none());
}

#[test]
fn the_reply_repeats_the_question_as_written_and_fits_512_bytes() {
    let longest = format!("{0}.{0}.{0}.{1}", "A".repeat(63), "b".repeat(61));
    let packet = query(&longest, RecordType::A).to_vec().unwrap();
    let question = Question::read(&packet).unwrap();
    let many = (0..40)
        .map(|n| Ipv4Addr::new(8, 8, 8, n))
        .collect::<Vec<_>>();
    let reply = question.reply(ResponseCode::NoError, &many, 60).unwrap();
    assert!(reply.len() <= 512, "{}", reply.len());
    let reply = Message::from_vec(&reply).unwrap();
    assert_eq!(reply.metadata.id, 7);
    assert!(reply.queries[0].name().eq_case(&name(&longest)));
    assert_eq!(reply.answers.len(), ADDRESSES_MAX);
    assert!(reply.answers.iter().all(|record| record.ttl == 60));
}

#[test]
fn what_goes_upstream_is_the_granted_name_and_nothing_else() {
    let sent = Message::from_vec(&ask(9, NAME).unwrap()).unwrap();
    assert_eq!(sent.metadata.id, 9);
    assert!(sent.metadata.recursion_desired);
    assert_eq!(sent.queries.len(), 1);
    assert_eq!(*sent.queries[0].name(), name(NAME));
    assert_eq!(sent.queries[0].query_type(), RecordType::A);
}

#[test]
fn addresses_are_found_at_the_end_of_their_aliases() {
    let chained = answer(
        9,
        vec![
            address("edge.cdn.test", 20, [8, 8, 4, 4]),
            alias(NAME, 300, "www.cdn.test"),
            alias("www.cdn.test", 7, "EDGE.cdn.test"),
            address("edge.cdn.test", 20, [8, 8, 8, 8]),
            address("edge.cdn.test", 20, [8, 8, 8, 8]),
        ],
    );
    assert_eq!(
        read(&chained),
        Ok(addresses(&[[8, 8, 4, 4], [8, 8, 8, 8]], 7))
    );
}

#[test]
fn records_that_nothing_leads_to_are_not_believed() {
    let stray = answer(9, vec![address("evil.test", 60, [6, 6, 6, 6])]);
    assert_eq!(read(&stray), Ok(addresses(&[], 0)));
    let off = answer(
        9,
        vec![
            alias(NAME, 60, "a.test"),
            address("b.test", 60, [6, 6, 6, 6]),
        ],
    );
    assert_eq!(read(&off), Ok(addresses(&[], 0)));
}

#[test]
fn aliases_in_a_circle_end() {
    let circle = answer(
        9,
        vec![alias(NAME, 60, "a.test"), alias("a.test", 60, NAME)],
    );
    assert_eq!(read(&circle), Err(AnswerError::Aliases));
}

#[test]
fn a_forged_answer_is_not_taken() {
    let good = vec![address(NAME, 60, [6, 6, 6, 6])];
    assert_eq!(read(&answer(8, good.clone())), Err(AnswerError::Foreign));
    let mut other = answer(9, good.clone());
    other.queries = vec![Query::query(name("evil.test"), RecordType::A)];
    assert_eq!(read(&other), Err(AnswerError::Foreign));
    let mut none = answer(9, good.clone());
    none.queries.clear();
    assert_eq!(read(&none), Err(AnswerError::Foreign));
    let mut echo = answer(9, good);
    echo.metadata.message_type = MessageType::Query;
    assert_eq!(read(&echo), Err(AnswerError::Foreign));
}

#[test]
fn failures_are_told_apart() {
    let mut none = answer(9, vec![]);
    none.metadata.response_code = ResponseCode::NXDomain;
    assert_eq!(read(&none), Ok(Answer::NoSuchName));
    let mut failed = answer(9, vec![]);
    failed.metadata.response_code = ResponseCode::ServFail;
    assert_eq!(
        read(&failed),
        Err(AnswerError::Failed(ResponseCode::ServFail))
    );
    let mut cut = answer(9, vec![]);
    cut.metadata.truncation = true;
    assert_eq!(read(&cut), Err(AnswerError::Truncated));
}

proptest! {
    #[test]
    fn no_bytes_crash_a_reader(packet in collection::vec(any::<u8>(), 0..1500)) {
        let _question = Question::read(&packet).map(|question| question.plan(&policy()));
        let _answer = read_answer(&packet, 9, NAME);
    }

    #[test]
    fn a_mangled_query_is_dropped_or_answered_for_what_it_then_asks(
        places in collection::vec((any::<sample::Index>(), any::<u8>()), 0..6),
        cut in any::<sample::Index>(),
    ) {
        let mut packet = query(NAME, RecordType::A).to_vec().unwrap();
        for (place, byte) in places {
            let place = place.index(packet.len());
            packet[place] = byte;
        }
        packet.truncate(cut.index(packet.len()) + 1);
        if let Some(question) = Question::read(&packet)
            && let Plan::LookUp(_index) = question.plan(&policy())
        {
            prop_assert_eq!(question.name(), NAME);
            prop_assert!(question.reply(ResponseCode::NoError, &[], 1).is_some());
        }
    }

    #[test]
    fn a_mangled_answer_gives_no_address_that_its_bytes_do_not_hold(
        places in collection::vec((any::<sample::Index>(), any::<u8>()), 0..6),
    ) {
        let records = vec![alias(NAME, 60, "a.test"), address("a.test", 60, [8, 8, 4, 4])];
        let mut packet = answer(9, records).to_vec().unwrap();
        for (place, byte) in places {
            let place = place.index(packet.len());
            packet[place] = byte;
        }
        if let Ok(Answer::Addresses { addresses, .. }) = read_answer(&packet, 9, NAME) {
            for address in addresses {
                prop_assert!(packet.windows(4).any(|bytes| bytes == address.octets()));
            }
        }
    }
}
