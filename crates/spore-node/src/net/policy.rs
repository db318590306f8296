//! What may pass in a VM's namespace: one nftables table, written and read back.
//!
//! Called on a namespace thread, inside the namespace. Everything is dropped but this:
//!
//! | direction | closed | open | open, with egress grants |
//! |---|---|---|---|
//! | node to guest | nothing | TCP that the node begins | as open |
//! | guest to host side | nothing | answers to that | and TCP to the proxy, DNS to its resolver |
//! | through the namespace | nothing | nothing | nothing |
//!
//! With grants every TCP connection of the guest, wherever it is meant to go, is redirected to the
//! proxy's port, which asks the kernel for the address that was meant. Never knows which
//! addresses are granted: that is the proxy's.

use std::io;
use std::net::Ipv4Addr;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};
use spore_wire::egress::PROXY_PORT;
use spore_wire::guest::GUEST_ADDRESS;

use super::tap::TAP;
use crate::hypervisor::PolicyError;
use crate::tool;

/// The table's name; a namespace holds no other.
const TABLE: &str = "spore";

/// Where the resolver listens.
pub const DNS_PORT: u16 = 53;

/// TCP, as a number: its name is in `/etc/protocols`, which a small host does not have.
const TCP: i32 = libc::IPPROTO_TCP;

/// What a namespace lets pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// Nothing.
    Closed,
    /// Connections of the node to the guest.
    Open,
    /// These, and connections of the guest to the egress proxy and its resolver.
    OpenWithEgress,
}

impl Policy {
    /// The table, chains and rules as nftables lists them, without handles.
    fn objects(self) -> Vec<Value> {
        let guest = Ipv4Addr::from(GUEST_ADDRESS).to_string();
        let from_guest = || {
            vec![
                meta("iifname", json!(TAP)),
                field("ip", "saddr", json!(guest)),
            ]
        };
        let to_guest = || {
            vec![
                meta("oifname", json!(TAP)),
                field("ip", "daddr", json!(guest)),
            ]
        };
        let mut objects = vec![
            json!({"table": {"family": "inet", "name": TABLE}}),
            chain("input", "filter", 0, "drop"),
            chain("output", "filter", 0, "drop"),
            chain("forward", "filter", 0, "drop"),
        ];
        if self == Self::Closed {
            return objects;
        }
        if self == Self::OpenWithEgress {
            objects.push(chain("prerouting", "nat", -100, "accept"));
        }
        objects.push(rule(
            "input",
            from_guest(),
            [state("established"), accept()],
        ));
        if self == Self::OpenWithEgress {
            let proxy = field("tcp", "dport", json!(PROXY_PORT));
            let resolver = field("udp", "dport", json!(DNS_PORT));
            objects.push(rule("input", from_guest(), [proxy, accept()]));
            objects.push(rule("input", from_guest(), [resolver, accept()]));
        }
        objects.push(rule("output", to_guest(), [state("established"), accept()]));
        let mut begin = to_guest();
        begin.push(meta("l4proto", json!(TCP)));
        objects.push(rule("output", begin, [state("new"), accept()]));
        if self == Self::OpenWithEgress {
            let tap = || vec![meta("iifname", json!(TAP))];
            let tcp = meta("l4proto", json!(TCP));
            let resolver = field("udp", "dport", json!(DNS_PORT));
            objects.push(rule("prerouting", tap(), [tcp, redirect(PROXY_PORT)]));
            objects.push(rule("prerouting", tap(), [resolver, redirect(DNS_PORT)]));
        }
        objects
    }

    /// The commands that make it so, whatever was before, as one transaction.
    fn commands(self) -> Value {
        let mut commands = vec![json!({"flush": {"ruleset": null}})];
        commands.extend(
            self.objects()
                .into_iter()
                .map(|object| json!({"add": object})),
        );
        json!({"nftables": commands})
    }
}

fn chain(name: &str, kind: &str, priority: i32, policy: &str) -> Value {
    json!({"chain": {
        "family": "inet", "table": TABLE, "name": name,
        "type": kind, "hook": name, "prio": priority, "policy": policy,
    }})
}

fn rule(chain: &str, mut matches: Vec<Value>, then: [Value; 2]) -> Value {
    matches.extend(then);
    json!({"rule": {"family": "inet", "table": TABLE, "chain": chain, "expr": matches}})
}

fn meta(key: &str, right: Value) -> Value {
    json!({"match": {"op": "==", "left": {"meta": {"key": key}}, "right": right}})
}

fn field(protocol: &str, field: &str, right: Value) -> Value {
    let left = json!({"payload": {"protocol": protocol, "field": field}});
    json!({"match": {"op": "==", "left": left, "right": right}})
}

fn state(state: &str) -> Value {
    json!({"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": state}})
}

fn accept() -> Value {
    json!({"accept": null})
}

fn redirect(port: u16) -> Value {
    json!({"redirect": {"port": port}})
}

/// How long `nft` may take; it takes some milliseconds, unless the kernel is busy with its rules.
const NFT_LIMIT: Duration = Duration::from_secs(10);

/// Runs `nft` in the calling thread's namespace.
fn nft(arguments: &[&str], input: &[u8]) -> io::Result<Vec<u8>> {
    let mut command = Command::new("nft");
    command
        .args(arguments)
        .env_clear()
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .stdin(tool::input(input)?);
    Ok(tool::run(
        command,
        NFT_LIMIT,
        "install the package nftables",
    )?)
}

/// Writes `policy` in the calling thread's namespace, in place of whatever is there.
///
/// # Errors
/// What `nft` says.
pub fn write(policy: Policy) -> io::Result<()> {
    nft(&["-j", "-f", "-"], policy.commands().to_string().as_bytes())?;
    Ok(())
}

/// Compares what holds in the calling thread's namespace with `policy`.
///
/// # Errors
/// [`PolicyError::Differs`] names the first difference.
pub fn verify(policy: Policy) -> Result<(), PolicyError> {
    let failed = |source| PolicyError::Step {
        what: "reading it back",
        source,
    };
    let listed = ["-j", "--numeric-protocol", "list", "ruleset"];
    let listed = nft(&listed, b"").map_err(failed)?;
    let listed: Value =
        serde_json::from_slice(&listed).map_err(|error| failed(io::Error::other(error)))?;
    match first_difference(&policy.objects(), &without_handles(listed)) {
        Some(difference) => Err(PolicyError::Differs(difference)),
        None => Ok(()),
    }
}

/// The objects of a listing, without what the kernel adds.
fn without_handles(mut listed: Value) -> Vec<Value> {
    let Some(objects) = listed.get_mut("nftables").and_then(Value::as_array_mut) else {
        return Vec::new();
    };
    objects.retain(|object| object.get("metainfo").is_none());
    for object in objects.iter_mut().filter_map(Value::as_object_mut) {
        for body in object.values_mut().filter_map(Value::as_object_mut) {
            body.remove("handle");
        }
    }
    std::mem::take(objects)
}

/// Rules keep their order within a chain; a listing groups them by chain, as `objects` does not.
fn first_difference(wanted: &[Value], found: &[Value]) -> Option<String> {
    let chain_of = |object: &&Value| object["rule"]["chain"].as_str().map(str::to_owned);
    let mut wanted: Vec<&Value> = wanted.iter().collect();
    let mut found: Vec<&Value> = found.iter().collect();
    wanted.sort_by_key(chain_of);
    found.sort_by_key(chain_of);
    let missing = wanted
        .iter()
        .zip(&found)
        .find(|(wanted, found)| wanted != found);
    if let Some((wanted, found)) = missing {
        return Some(format!("{wanted} was written, {found} was read"));
    }
    if let Some(wanted) = wanted.get(found.len()) {
        return Some(format!("{wanted} is missing"));
    }
    found
        .get(wanted.len())
        .map(|found| format!("{found} was not written"))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::{Policy, first_difference, without_handles};

    /// The text that nftables shows for the widest policy.
    const GOLDEN: &str = include_str!("policy.golden.json");

    #[test]
    fn the_widest_policy_is_the_golden_one() {
        let golden = GOLDEN
            .lines()
            .map(|line| serde_json::from_str(line).unwrap());
        assert_eq!(
            Policy::OpenWithEgress.objects(),
            golden.collect::<Vec<Value>>()
        );
    }

    #[test]
    fn a_closed_policy_has_no_rule_and_drops_in_every_direction() {
        let objects = Policy::Closed.objects();
        assert!(objects.iter().all(|object| object.get("rule").is_none()));
        let dropping = objects
            .iter()
            .filter(|object| object["chain"]["policy"] == "drop");
        assert_eq!(dropping.count(), 3);
    }

    #[test]
    fn a_missing_an_added_and_a_changed_rule_are_differences() {
        let wanted = Policy::OpenWithEgress.objects();
        assert_eq!(first_difference(&wanted, &wanted), None);
        let missing = first_difference(&wanted, &wanted[..wanted.len() - 1]);
        assert!(missing.is_some());
        let added = first_difference(&wanted[..wanted.len() - 1], &wanted);
        assert!(added.is_some());
        let mut changed = wanted.clone();
        changed[1]["chain"]["policy"] = json!("accept");
        assert!(
            first_difference(&wanted, &changed)
                .unwrap()
                .contains("was written")
        );
    }

    #[test]
    fn handles_and_the_listing_header_are_no_difference() {
        let listed = json!({"nftables": [
            {"metainfo": {"version": "1"}},
            {"table": {"family": "inet", "name": "spore", "handle": 7}},
        ]});
        assert_eq!(
            without_handles(listed),
            [json!({"table": {"family": "inet", "name": "spore"}})]
        );
    }
}
