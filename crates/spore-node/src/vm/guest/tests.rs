//! The session against agents that behave, and agents that do not.

use core::time::Duration;

use data_encoding::HEXLOWER;
use proptest::prelude::{Just, Strategy, any, prop, prop_assert, prop_oneof, proptest};
use spore_wire::frame::{
    Decoder, Frame, FrameKind, HEADER_BYTES, PREAMBLE_BYTES, SYNC_MARK, encode,
};
use spore_wire::generation::GENERATION;
use spore_wire::guest::{
    AgentHello, AgentMessage, AppStatus, CREDIT_BYTES, Event, HostMessage, LOG_LINE_BYTES_MAX,
    LogBatch, LogRecord, OutputKind, Reply, Request,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio::sync::mpsc;

use super::session::{Session, SessionError, SessionTimes, StreamError};
use crate::vm::tasks::Tasks;

fn message(stream: u32, message: &AgentMessage) -> Vec<u8> {
    frame(
        stream,
        FrameKind::Message,
        &serde_json::to_vec(message).unwrap(),
    )
}

fn frame(stream: u32, kind: FrameKind, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    encode(stream, kind, payload, &mut out).unwrap();
    out
}

fn hello() -> AgentHello {
    AgentHello {
        generation: GENERATION,
        version: "test".to_owned(),
        boot_id: "11111111-2222-4333-8444-555555555555".to_owned(),
        thawed: true,
        frozen: false,
        incarnation: None,
        app: AppStatus::Absent,
    }
}

/// The agent's end of a channel, driven by hand.
struct Agent {
    stream: DuplexStream,
    decoder: Decoder,
}

impl Agent {
    async fn next(&mut self) -> Frame {
        let mut buffer = vec![0; 70_000];
        loop {
            if let Some(frame) = self.decoder.next_frame().unwrap() {
                return frame;
            }
            let got = self.stream.read(&mut buffer).await.unwrap();
            assert!(got > 0, "the host hung up");
            self.decoder.feed(&buffer[..got]);
        }
    }

    async fn next_message(&mut self) -> (u32, HostMessage) {
        let frame = self.next().await;
        let message = serde_json::from_slice(&frame.payload).unwrap();
        (frame.stream, message)
    }

    async fn send(&mut self, bytes: &[u8]) {
        // A host that has hung up is what some tests wait for.
        drop(self.stream.write_all(bytes).await);
    }

    /// Reads the host's hello and answers it.
    async fn greet(&mut self, before: &[u8], hello: AgentHello) {
        let (stream, message_in) = self.next_message().await;
        let HostMessage::Hello(greeting) = message_in else {
            panic!("{message_in:?} comes first");
        };
        assert_eq!(stream, 0);
        let mut bytes = before.to_vec();
        bytes.extend_from_slice(&SYNC_MARK);
        bytes.extend(HEXLOWER.decode(greeting.nonce.as_bytes()).unwrap());
        bytes.extend(message(0, &AgentMessage::Hello(hello)));
        self.send(&bytes).await;
    }
}

struct Channel {
    session: Session,
    agent: Agent,
    news: mpsc::Receiver<Event>,
    _tasks: Tasks,
}

async fn try_open(before: &[u8], hello: AgentHello) -> Result<Channel, SessionError> {
    let (ours, theirs) = tokio::io::duplex(2 * PREAMBLE_BYTES);
    let mut agent = Agent {
        stream: theirs,
        decoder: Decoder::new(),
    };
    let tasks = Tasks::default();
    let (send_news, news) = mpsc::channel(16);
    let times = SessionTimes::default();
    let open = Session::open(Box::new(ours), times, &tasks, send_news);
    let (opened, ()) = tokio::join!(open, agent.greet(before, hello));
    let (session, _hello) = opened?;
    Ok(Channel {
        session,
        agent,
        news,
        _tasks: tasks,
    })
}

async fn open() -> Channel {
    try_open(b"", hello()).await.unwrap()
}

#[tokio::test(start_paused = true)]
async fn what_came_before_the_mark_is_nobodys() {
    let mut before = message(1, &AgentMessage::Reply { reply: Reply::Done });
    before.extend_from_slice(b"\xff\xa5half a frame");
    let mut channel = try_open(&before, hello()).await.unwrap();
    let event = Event::KeepAwake { for_ms: 7 };
    let news = message(
        0,
        &AgentMessage::Event {
            event: event.clone(),
        },
    );
    channel.agent.send(&news).await;
    assert_eq!(channel.news.recv().await, Some(event));
}

#[tokio::test(start_paused = true)]
async fn an_agent_of_another_age_or_without_a_boot_id_is_refused() {
    let old = AgentHello {
        generation: 0,
        ..hello()
    };
    assert!(matches!(
        try_open(b"", old).await.err(),
        Some(SessionError::Generation(0))
    ));
    let nameless = AgentHello {
        boot_id: "../../etc/passwd".to_owned(),
        ..hello()
    };
    assert!(matches!(
        try_open(b"", nameless).await.err(),
        Some(SessionError::Protocol(_))
    ));
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_never_answers_is_given_up() {
    let (ours, theirs) = tokio::io::duplex(1024);
    let tasks = Tasks::default();
    let (news, _told) = mpsc::channel(1);
    let opened = Session::open(Box::new(ours), SessionTimes::default(), &tasks, news).await;
    assert!(matches!(opened.err(), Some(SessionError::Silent)));
    drop(theirs);
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_falls_silent_loses_its_session() {
    let channel = open().await;
    let session = channel.session.clone();
    let stream = session.request(Request::Status).await.unwrap();
    let reason = session.over().await;
    assert!(reason.contains("silent"), "{reason}");
    assert!(matches!(stream.outcome().await, Err(StreamError::Over(_))));
    assert!(session.request(Request::Status).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn a_request_is_answered_on_its_own_stream() {
    let mut channel = open().await;
    let first = channel.session.request(Request::Status).await.unwrap();
    let second = channel.session.request(Request::Status).await.unwrap();
    let (one, _status) = channel.agent.next_message().await;
    let (three, _status) = channel.agent.next_message().await;
    assert_eq!((one, three), (1, 3));
    let done = |stream| message(stream, &AgentMessage::Reply { reply: Reply::Done });
    channel.agent.send(&done(3)).await;
    assert_eq!(second.outcome().await.unwrap(), Ok(Reply::Done));
    channel.agent.send(&done(1)).await;
    assert_eq!(first.outcome().await.unwrap(), Ok(Reply::Done));
}

#[tokio::test(start_paused = true)]
async fn a_dropped_request_is_cancelled_and_its_late_bytes_ignored() {
    let mut channel = open().await;
    let stream = channel.session.request(Request::Status).await.unwrap();
    drop(stream);
    let (_request, _status) = channel.agent.next_message().await;
    let (id, cancel) = channel.agent.next_message().await;
    assert!(id == 1 && matches!(cancel, HostMessage::Cancel));
    channel
        .agent
        .send(&frame(1, FrameKind::Data, b"too late"))
        .await;
    let next = channel.session.request(Request::Status).await.unwrap();
    let bytes = message(3, &AgentMessage::Reply { reply: Reply::Done });
    channel.agent.send(&bytes).await;
    assert!(next.outcome().await.unwrap().is_ok());
}

#[tokio::test(start_paused = true)]
async fn bytes_beyond_the_credit_end_the_session() {
    let mut channel = open().await;
    let stream = channel.session.request(Request::Status).await.unwrap();
    let most = CREDIT_BYTES as usize;
    for _chunk in 0..most / 32_768 {
        channel
            .agent
            .send(&frame(1, FrameKind::Data, &[1; 32_768]))
            .await;
    }
    channel.agent.send(&frame(1, FrameKind::Data, b"x")).await;
    let reason = channel.session.over().await;
    assert!(reason.contains("more bytes than were allowed"), "{reason}");
    drop(stream);
}

#[tokio::test(start_paused = true)]
async fn what_is_read_is_given_back_as_credit() {
    let mut channel = open().await;
    let stream = channel.session.request(Request::Status).await.unwrap();
    let (_id, _request) = channel.agent.next_message().await;
    let chunk = 60_000;
    for _chunk in 0..4 {
        channel
            .agent
            .send(&frame(1, FrameKind::Data, &vec![1; chunk]))
            .await;
    }
    let mut taken = 0;
    while taken < 4 * chunk {
        let (_of, bytes) = stream.next().await.unwrap().unwrap();
        taken += bytes.len();
    }
    let mut credit = 0;
    while credit < 3 * chunk {
        let (id, told) = channel.agent.next_message().await;
        let HostMessage::Credit { bytes } = told else {
            panic!("{told:?} instead of credit");
        };
        assert_eq!(id, 1);
        credit += bytes as usize;
    }
    assert!(credit <= taken);
}

#[tokio::test(start_paused = true)]
async fn a_sender_waits_for_credit() {
    let mut channel = open().await;
    let stream = channel.session.request(Request::Status).await.unwrap();
    let (_id, _request) = channel.agent.next_message().await;
    let bytes = vec![2; CREDIT_BYTES as usize + 10];
    let mut got = 0;
    let receive = async {
        while got < CREDIT_BYTES as usize {
            got += channel.agent.next().await.payload.len();
        }
        let credit = message(1, &AgentMessage::Credit { bytes: 10 });
        channel.agent.send(&credit).await;
        got += channel.agent.next().await.payload.len();
    };
    let (sent, ()) = tokio::join!(stream.send(&bytes), receive);
    sent.unwrap();
    assert_eq!(got, bytes.len());
}

/// A message with one log record, and how many bytes of credit it takes.
fn logged(sequence: u64, text: &str) -> (Vec<u8>, usize) {
    let record = LogRecord {
        sequence,
        at_us: 0,
        from: OutputKind::Stdout,
        text: text.to_owned(),
        continues: false,
    };
    let batch = LogBatch {
        records: vec![record],
        dropped: 0,
    };
    let bytes = message(1, &AgentMessage::Logs(batch));
    let payload = bytes.len() - HEADER_BYTES;
    (bytes, payload)
}

#[tokio::test(start_paused = true)]
async fn log_records_take_credit_and_give_it_back_when_they_are_read() {
    let mut channel = open().await;
    let asked = Request::Logs { after: 0 };
    let stream = channel.session.request(asked).await.unwrap();
    channel.agent.next_message().await;
    let text = "x".repeat(LOG_LINE_BYTES_MAX);
    let (mut sent, mut records) = (0, 0);
    loop {
        let (bytes, payload) = logged(records + 1, &text);
        if sent + payload > CREDIT_BYTES as usize {
            break;
        }
        channel.agent.send(&bytes).await;
        sent += payload;
        records += 1;
    }
    for sequence in 1..=records {
        let batch = stream.next_logs().await.unwrap().unwrap();
        assert_eq!((batch.records[0].sequence, batch.dropped), (sequence, 0));
    }
    let HostMessage::Credit { bytes } = channel.agent.next_message().await.1 else {
        panic!("no credit");
    };
    assert!(bytes >= CREDIT_BYTES / 4 && bytes as usize <= sent);
}

#[tokio::test(start_paused = true)]
async fn log_beyond_the_credit_ends_the_session() {
    let mut channel = open().await;
    let asked = Request::Logs { after: 0 };
    let _unread = channel.session.request(asked).await.unwrap();
    let (bytes, payload) = logged(1, &"x".repeat(LOG_LINE_BYTES_MAX));
    for _record in 0..=CREDIT_BYTES as usize / payload {
        channel.agent.send(&bytes).await;
    }
    let why = channel.session.over().await;
    assert!(why.contains("more log than was allowed"), "{why}");
}

#[tokio::test(start_paused = true)]
async fn messages_out_of_place_end_the_session() {
    let reply = AgentMessage::Reply { reply: Reply::Done };
    let wrong = [
        message(0, &reply),
        message(0, &AgentMessage::Hello(hello())),
        message(2, &reply),
        message(7, &reply),
        message(1, &AgentMessage::Pong { token: 1 }),
        frame(0, FrameKind::Data, b"x"),
        frame(0, FrameKind::Message, b"{\"type\":\"no such thing\"}"),
        b"\xff".to_vec(),
        vec![0xa5; 64],
    ];
    for bytes in wrong {
        let mut channel = open().await;
        let stream = channel.session.request(Request::Status).await.unwrap();
        channel.agent.send(&bytes).await;
        let reason = channel.session.over().await;
        assert!(reason.starts_with("the agent"), "{reason}");
        drop(stream);
    }
}

#[tokio::test(start_paused = true)]
async fn a_flood_of_news_costs_the_guest_time_and_not_the_host() {
    let mut channel = open().await;
    let event = message(
        0,
        &AgentMessage::Event {
            event: Event::KeepAwake { for_ms: 1 },
        },
    );
    let begun = tokio::time::Instant::now();
    let mut agent = channel.agent;
    let flood = tokio::spawn(async move {
        for _event in 0..1000 {
            agent.send(&event).await;
        }
        agent
    });
    for _event in 0..1000 {
        channel.news.recv().await.unwrap();
    }
    assert!(
        begun.elapsed() > Duration::from_secs(4),
        "{:?}",
        begun.elapsed()
    );
    drop(flood.await.unwrap());
}

/// Sends `bytes` until the session is over; gives its reason and how much was sent.
async fn flood(mut channel: Channel, bytes: Vec<u8>) -> (String, usize) {
    let session = channel.session.clone();
    let mut sent = 0;
    let sending = async {
        loop {
            channel.agent.send(&bytes).await;
            sent += bytes.len();
            // The host may read no more; then this must not spin.
            tokio::task::yield_now().await;
        }
    };
    let reason = tokio::select! {
        reason = session.over() => reason,
        () = sending => unreachable!("a flood has no end"),
    };
    (reason, sent)
}

#[tokio::test(start_paused = true)]
async fn words_without_use_end_the_session_whatever_stream_they_are_on() {
    let said = |said: &AgentMessage| message(1, said);
    let done = said(&AgentMessage::Reply { reply: Reply::Done });
    let empty_batch = said(&AgentMessage::Logs(LogBatch::default()));
    let stderr = OutputKind::Stderr;
    let late = [done.clone(), frame(1, FrameKind::Data, &[7; 60_000])].concat();
    let floods = [
        ("an ended stream", late),
        ("empty data", frame(1, FrameKind::Data, b"")),
        ("ends", frame(1, FrameKind::End, b"")),
        ("credit", said(&AgentMessage::Credit { bytes: 1 })),
        ("no credit", said(&AgentMessage::Credit { bytes: 0 })),
        ("switches", said(&AgentMessage::Output { of: stderr })),
        ("empty batches", empty_batch),
        ("zeros", vec![0; 4096]),
        ("parts", frame(1, FrameKind::Part, b"")),
    ];
    for (what, bytes) in floods {
        let channel = open().await;
        let stream = channel.session.request(Request::Logs { after: 0 }).await;
        let (reason, sent) = flood(channel, bytes).await;
        assert!(reason.contains("broke the protocol"), "{what}: {reason}");
        assert!(sent < 8 << 20, "{what}: {sent} bytes were taken");
        drop(stream);
    }
}

#[tokio::test(start_paused = true)]
async fn log_records_on_another_stream_end_the_session() {
    let channel = open().await;
    let stream = channel.session.request(Request::Status).await.unwrap();
    let batch = message(1, &AgentMessage::Logs(LogBatch::default()));
    let (reason, _sent) = flood(channel, batch).await;
    assert!(reason.contains("nobody asked for"), "{reason}");
    drop(stream);
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_says_too_much_before_its_first_word_is_given_up() {
    let before = vec![1; 8 << 20];
    let begun = tokio::time::Instant::now();
    let error = try_open(&before, hello()).await.err().unwrap();
    assert!(matches!(error, SessionError::Protocol(_)), "{error}");
    assert!(
        begun.elapsed() < Duration::from_secs(1),
        "it is not the time"
    );
}

#[tokio::test(start_paused = true)]
async fn what_is_under_way_for_cancelled_streams_ends_no_session() {
    let mut channel = open().await;
    for number in 0..40 {
        let stream = channel.session.request(Request::Status).await.unwrap();
        drop(stream);
        let late = frame(2 * number + 1, FrameKind::Data, &[7; 60_000]);
        for _frame in 0..20 {
            channel.agent.send(&late).await;
        }
    }
    let asked = channel.session.request(Request::Status).await.unwrap();
    let bytes = message(81, &AgentMessage::Reply { reply: Reply::Done });
    channel.agent.send(&bytes).await;
    assert!(asked.outcome().await.unwrap().is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_flood_of_log_is_taken_at_a_pace_and_bytes_that_were_asked_for_are_not() {
    let record = LogRecord {
        sequence: 1,
        at_us: 0,
        from: OutputKind::Stdout,
        text: "x".repeat(8192),
        continues: false,
    };
    let batch = LogBatch {
        records: vec![record; 7],
        dropped: 0,
    };
    let log = message(1, &AgentMessage::Logs(batch));
    let data = frame(3, FrameKind::Data, &[7; 32_768]);
    let channel = open().await;
    let logs = channel
        .session
        .request(Request::Logs { after: 0 })
        .await
        .unwrap();
    let file = channel.session.request(Request::Status).await.unwrap();
    let total = 64 << 20;
    let begun = tokio::time::Instant::now();
    let mut agent = channel.agent;
    for _frame in 0..total / log.len() {
        agent.send(&log).await;
        logs.next_logs().await.unwrap().unwrap();
    }
    let taken = begun.elapsed();
    assert!(
        taken > Duration::from_secs(13),
        "{taken:?} for 64 MiB of log"
    );
    let begun = tokio::time::Instant::now();
    let mut got = 0;
    let sending = async {
        for _frame in 0..total / 32_768 {
            agent.send(&data).await;
            // At the pace of the reader, whose credit is not looked at here.
            tokio::task::yield_now().await;
        }
    };
    let reading = async {
        while got < total {
            got += file.next().await.unwrap().unwrap().1.len();
        }
    };
    tokio::join!(sending, reading);
    assert!(
        begun.elapsed() < Duration::from_secs(2),
        "{:?}",
        begun.elapsed()
    );
    drop(logs);
}

/// Something that a hostile agent may send.
fn word() -> impl Strategy<Value = Vec<u8>> {
    let payload = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..200),
        Just(br#"{"type":"credit","bytes":4294967295}"#.to_vec()),
        Just(br#"{"type":"output","of":"stderr"}"#.to_vec()),
        Just(br#"{"type":"logs","records":[],"dropped":18446744073709551615}"#.to_vec()),
        Just(br#"{"type":"reply","reply":{"of":"exit","by":"code","code":0}}"#.to_vec()),
        Just(br#"{"type":"error","code":"invalid","message":"\u0000\u001b[2J"}"#.to_vec()),
        Just(br#"{"type":"event","event":{"event":"keep_awake","for_ms":1}}"#.to_vec()),
        Just(br#"{"type":"pong","token":0}"#.to_vec()),
    ];
    let kind = prop_oneof![
        4 => Just(FrameKind::Message),
        3 => Just(FrameKind::Data),
        1 => Just(FrameKind::End)
    ];
    let framed = (0_u32..6, kind, payload).prop_map(|(id, kind, bytes)| frame(id, kind, &bytes));
    prop_oneof![
        8 => framed,
        1 => prop::collection::vec(any::<u8>(), 0..50),
        1 => Just(vec![0; 64]),
    ]
}

proptest! {
    #[test]
    fn no_word_of_an_agent_makes_the_host_panic_or_hang(
        words in prop::collection::vec(word(), 0..40),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all().start_paused(true).build().unwrap();
        let ended = runtime.block_on(async {
            let mut channel = open().await;
            let first = channel.session.request(Request::Status).await.unwrap();
            let second = channel.session.request(Request::Logs { after: 0 }).await.unwrap();
            let reading = async {
                while let Ok(Some(_bytes)) = first.next().await {}
                while let Ok(Some(_batch)) = second.next_logs().await {}
            };
            let feeding = async {
                for word in words {
                    channel.agent.send(&word).await;
                }
                drop(channel.agent);
            };
            let draining = async { while channel.news.recv().await.is_some() {} };
            let all = async {
                tokio::join!(reading, feeding, channel.session.over());
            };
            tokio::time::timeout(Duration::from_secs(600), async {
                tokio::select! {
                    () = all => {}
                    () = async { draining.await; core::future::pending().await } => {}
                }
            }).await.is_ok()
        });
        prop_assert!(ended);
    }
}
