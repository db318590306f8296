//! What gets out and what does not.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpStream};
use std::time::Duration;

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::RecordType;

use crate::world::{
    FIRST, HOST, METADATA, PRIVATE, SECOND, SINK_PORT, World, by_address, by_name, is_root,
};

const NAME: &str = "api.example.com";

#[test]
fn a_granted_address_is_reached_and_nothing_else_is() {
    if !is_root() {
        return;
    }
    let world = World::new(
        vec![by_address(PRIVATE, 5432), by_address(METADATA, 80)],
        16,
        &[],
    );
    assert_eq!(
        world.say(PRIVATE, 5432, "hello").unwrap(),
        "10.20.0.5:5432 hello"
    );
    assert_eq!(
        world.say(METADATA, 80, "hello").unwrap(),
        "169.254.169.254:80 hello"
    );
    for (to, port) in [
        (PRIVATE, 80),
        (PRIVATE, 53),
        (METADATA, 443),
        (FIRST, 443),
        (HOST, 80),
        (Ipv4Addr::new(10, 42, 0, 1), 3128),
        (Ipv4Addr::new(10, 42, 0, 1), 22),
    ] {
        assert!(world.is_refused(to, port), "{to}:{port} {}", world.said());
    }
    assert!(world.said().contains("egress refused"));
}

#[test]
fn a_granted_name_is_reached_with_its_port_and_only_once_it_was_asked_for() {
    if !is_root() {
        return;
    }
    let grants = vec![by_name(NAME, 443), by_name("other.example.com", 80)];
    let names: &[(_, &[_])] = &[(NAME, &[FIRST]), ("other.example.com", &[SECOND])];
    let world = World::new(grants, 16, names);
    assert!(world.is_refused(FIRST, 443), "not asked for yet");
    assert_eq!(world.addresses("API.example.COM"), [FIRST]);
    assert_eq!(world.addresses("other.example.com"), [SECOND]);
    assert_eq!(
        world.say(FIRST, 443, "hello\n").unwrap(),
        "8.8.4.4:443 hello\n"
    );
    assert_eq!(
        world.say(SECOND, 80, "hello\n").unwrap(),
        "9.9.9.9:80 hello\n"
    );
    assert!(world.is_refused(FIRST, 80), "the other name's port");
    assert!(world.is_refused(SECOND, 443), "the other name's address");
    assert!(world.is_refused(FIRST, 5432));
}

#[test]
fn only_granted_names_are_answered_and_asked_upstream() {
    if !is_root() {
        return;
    }
    let names: &[(_, &[_])] = &[(NAME, &[FIRST]), ("evil.test", &[SECOND])];
    let world = World::new(vec![by_name(NAME, 443)], 16, names);
    for _again in 0..5 {
        assert_eq!(world.addresses(NAME), [FIRST]);
    }
    let secret = world.ask("secret-data.evil.test", RecordType::A);
    assert_eq!(secret.metadata.response_code, ResponseCode::NXDomain);
    let below = world.ask("secret-data.api.example.com", RecordType::A);
    assert_eq!(below.metadata.response_code, ResponseCode::NXDomain);
    let above = world.ask("example.com", RecordType::A);
    assert_eq!(above.metadata.response_code, ResponseCode::NoError);
    let six = world.ask(NAME, RecordType::AAAA);
    assert_eq!(
        (six.metadata.response_code, six.answers.len()),
        (ResponseCode::NoError, 0)
    );
    assert!(world.is_refused(SECOND, 443));
    let mut asked = world.zone.lock().unwrap().asked.clone();
    // One lookup: it asks again, twice at most, where the answer is late.
    assert!(asked.len() <= 3, "{asked:?}");
    asked.dedup();
    assert_eq!(asked, [format!("{NAME}.")]);
}

#[test]
fn a_name_that_leads_inside_is_stripped_and_not_dialled() {
    if !is_root() {
        return;
    }
    let inside = [Ipv4Addr::LOCALHOST, METADATA, PRIVATE, HOST];
    let mixed = [METADATA, FIRST, Ipv4Addr::LOCALHOST];
    let names: &[(_, &[_])] = &[("rebind.test", &inside), ("mixed.test", &mixed)];
    let grants = ["rebind.test", "mixed.test"].map(|name| by_name(name, 443));
    let world = World::new(grants.to_vec(), 16, names);
    let answer = world.ask("rebind.test", RecordType::A);
    assert_eq!(
        (answer.metadata.response_code, answer.answers.len()),
        (ResponseCode::NoError, 0)
    );
    assert_eq!(world.addresses("mixed.test"), [FIRST]);
    for to in [METADATA, PRIVATE, HOST] {
        assert!(world.is_refused(to, 443), "{to}");
    }
    assert_eq!(
        world.say(FIRST, 443, "hello\n").unwrap(),
        "8.8.4.4:443 hello\n"
    );
}

#[test]
fn a_client_that_names_another_host_is_cut_off() {
    if !is_root() {
        return;
    }
    let world = World::new(vec![by_name(NAME, 80)], 16, &[(NAME, &[FIRST])]);
    assert_eq!(world.addresses(NAME), [FIRST]);
    let right = format!("GET / HTTP/1.1\r\nHost: {NAME}\r\n\r\n");
    assert_eq!(
        world.say(FIRST, 80, &right).unwrap(),
        format!("8.8.4.4:80 {right}")
    );
    let wrong = world.say(FIRST, 80, "GET / HTTP/1.1\r\nHost: evil.test\r\n\r\n");
    assert!(wrong.is_err(), "{wrong:?}");
    assert!(world.said().contains("HelloRefused"), "{}", world.said());
}

#[test]
fn rubbish_on_the_dns_port_is_dropped_and_a_flood_harms_nobody() {
    if !is_root() {
        return;
    }
    let world = World::new(vec![by_name(NAME, 80)], 16, &[(NAME, &[FIRST])]);
    let socket = world
        .guest
        .enter(|| std::net::UdpSocket::bind("0.0.0.0:0"))
        .unwrap();
    for round in 0..5000_u32 {
        let rubbish = round.to_be_bytes().repeat(8);
        let length = usize::try_from(round % 32).unwrap();
        let _full = socket.send_to(&rubbish[..length], "10.42.0.1:53");
    }
    assert_eq!(world.addresses(NAME), [FIRST]);
}

#[test]
fn each_direction_of_a_connection_closes_on_its_own() {
    if !is_root() {
        return;
    }
    let world = World::new(vec![by_address(FIRST, 443)], 16, &[]);
    // The server answers only once it has seen the end of what the guest says.
    let long = "x".repeat(3_000_000);
    let answer = world.say(FIRST, 443, &long).unwrap();
    assert_eq!(answer.len(), "8.8.4.4:443 ".len() + long.len());
}

#[test]
fn two_hundred_connections_at_once_are_carried() {
    if !is_root() {
        return;
    }
    let world = World::new(vec![by_address(FIRST, 443)], 256, &[]);
    let mut open = (0..200)
        .map(|_| world.connect(FIRST, 443).unwrap())
        .collect::<Vec<_>>();
    for (number, stream) in open.iter_mut().enumerate() {
        stream
            .write_all(format!("number {number}").as_bytes())
            .unwrap();
    }
    for (number, mut stream) in open.into_iter().enumerate() {
        stream.shutdown(Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, format!("8.8.4.4:443 number {number}"));
    }
    assert_eq!(world.taken(), 200);
}

#[test]
fn a_flood_of_connections_is_cut_at_the_limit_and_passes() {
    if !is_root() {
        return;
    }
    let world = World::new(vec![by_address(FIRST, 443)], 20, &[]);
    let mut first = (0..20)
        .map(|_| world.connect(FIRST, 443).unwrap())
        .collect::<Vec<_>>();
    for stream in &mut first {
        stream.write_all(b"hello ").unwrap();
    }
    for _more in 0..300 {
        if let Ok(mut refused) = world.connect(FIRST, 443) {
            assert!(refused.read_exact(&mut [0]).is_err());
        }
    }
    assert!(world.taken() <= 20, "{}", world.taken());
    for mut stream in first {
        stream.shutdown(Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "8.8.4.4:443 hello ");
    }
    let again = (0..1200).find_map(|_| {
        std::thread::sleep(Duration::from_millis(50));
        world.say(FIRST, 443, "again").ok()
    });
    assert_eq!(again.as_deref(), Some("8.8.4.4:443 again"));
}

#[test]
fn a_server_that_does_not_read_stops_the_guest_and_costs_little() {
    if !is_root() {
        return;
    }
    let world = World::new(vec![by_address(FIRST, SINK_PORT)], 64, &[]);
    let streams = (0..20)
        .map(|_| world.connect(FIRST, SINK_PORT).unwrap())
        .collect::<Vec<_>>();
    for stream in &streams {
        let written = write_until_full(stream);
        assert!(
            written < 32 << 20,
            "{written} bytes were taken from the guest"
        );
    }
    let resident = resident_kib(world.pid());
    assert!(resident < 64 << 10, "{resident} KiB");
}

/// Writes until nothing moves for a while; how much was taken.
fn write_until_full(mut stream: &TcpStream) -> usize {
    stream
        .set_write_timeout(Some(Duration::from_millis(300)))
        .unwrap();
    let mut written = 0;
    while let Ok(length) = stream.write(&[0; 65536]) {
        written += length;
    }
    written
}

fn resident_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}
