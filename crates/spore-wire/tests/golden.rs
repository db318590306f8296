//! The contracts that outlive a process, as they are on the wire: one example of every message.
//!
//! Compares with `schema/gen-N.json`. A difference means that an agent in a snapshot, or a gateway
//! left by another daemon, would be misunderstood: add, do not change. An addition is written with
//! `SPORE_WRITE_SCHEMA=1 cargo test -p spore-wire --test golden`.

#[cfg(test)]
mod tests {
    use serde::Serialize;
    use serde::de::DeserializeOwned;
    use serde_json::{Map, Value, json};
    use spore_wire::gateway::{FromGateway, ToGateway};
    use spore_wire::generation::{GENERATION, GENERATION_OLDEST_SERVED};
    use spore_wire::guest::{AgentErrorCode, AgentMessage, HostMessage, Request, ThawStep};
    use spore_wire::vmm::{FromVmm, ToVmm};
    use spore_wire::zygote::{FromZygote, ToZygote};

    /// Each example must read as its type and be written as it was read.
    fn checked<T: Serialize + DeserializeOwned>(examples: Vec<(&str, Value)>) -> Value {
        let mut out = Map::new();
        for (name, example) in examples {
            let message: T = serde_json::from_value(example.clone())
                .unwrap_or_else(|error| panic!("`{name}` is not read any more: {error}"));
            let written = serde_json::to_value(&message).unwrap();
            assert_eq!(written, example, "`{name}` is written differently");
            out.insert(name.to_owned(), written);
        }
        Value::Object(out)
    }

    fn request(fields: Value) -> Value {
        json!({"type": "request", "request": fields})
    }

    fn host() -> Value {
        let window = json!({"rows": 24, "columns": 80});
        checked::<HostMessage>(vec![
            (
                "hello",
                json!({"type": "hello", "generation": 1,
            "nonce": "00112233445566778899aabbccddeeff"}),
            ),
            ("ping", json!({"type": "ping", "token": 7})),
            ("credit", json!({"type": "credit", "bytes": 65536})),
            (
                "resize",
                json!({"type": "resize", "rows": 24, "columns": 80}),
            ),
            ("signal", json!({"type": "signal", "signal": 15})),
            ("cancel", json!({"type": "cancel"})),
            ("request status", request(json!({"op": "status"}))),
            (
                "request thaw",
                request(json!({"op": "thaw", "realtime_ns": 1, "entropy": "AAEC",
            "hostname": "notes", "machine_id": "0123456789abcdef0123456789abcdef",
            "resolver": [10, 42, 0, 1]})),
            ),
            (
                "request start_app by port",
                request(json!({"op": "start_app",
            "command": ["python3", "app.py"], "directory": "/app",
            "environment": [["PORT", "8000"]], "secret_environment": [["KEY", "AAEC"]],
            "secret_files": [["KEY", "AAEC"]], "user": null, "port": 8000,
            "ready": {"by": "port"}, "ready_timeout_ms": 30000})),
            ),
            (
                "request start_app by http",
                request(json!({"op": "start_app", "command": ["a"],
            "directory": "/", "environment": [], "secret_environment": [], "secret_files": [],
            "user": "www", "port": 80, "ready": {"by": "http", "path": "/healthz"},
            "ready_timeout_ms": 1})),
            ),
            (
                "request stop_app",
                request(json!({"op": "stop_app", "grace_ms": 5000})),
            ),
            (
                "request exec",
                request(json!({"op": "exec", "argv": ["sh"],
            "environment": [["A", "b"]], "directory": "/app", "user": "1000:1000",
            "pty": window, "timeout_ms": 1000})),
            ),
            (
                "request read_file",
                request(json!({"op": "read_file", "path": "/etc/hosts"})),
            ),
            (
                "request write_file",
                request(json!({"op": "write_file", "path": "/app/a",
            "mode": 420, "user": null})),
            ),
            ("request logs", request(json!({"op": "logs", "after": 3}))),
            (
                "request shutdown",
                request(json!({"op": "shutdown", "grace_ms": 5000})),
            ),
        ])
    }

    fn forks() -> Value {
        checked::<HostMessage>(vec![
            (
                "request thaw of a fork",
                request(json!({"op": "thaw", "realtime_ns": 1, "entropy": "AAEC",
            "hostname": "notes", "machine_id": "0123456789abcdef0123456789abcdef",
            "resolver": null, "incarnation": "abcdefghijklmnopqrstuvwxya",
            "folder": "00ff", "steps": ["folder", "entropy", "clock", "names", "boot_id",
            "neighbour", "sockets", "logs"], "hold": true})),
            ),
            (
                "request thaw with secrets",
                request(json!({"op": "thaw", "realtime_ns": 1, "entropy": "AAEC",
            "hostname": "notes", "machine_id": "0123456789abcdef0123456789abcdef",
            "resolver": null, "incarnation": "abcdefghijklmnopqrstuvwxya",
            "steps": ["clock", "secrets"], "hold": true,
            "secrets": {"environment": [["KEY", "AAEC"]], "files": [["CERT", "AAEC"]]}})),
            ),
            (
                "request start_app with the secrets of the thaw",
                request(
                    json!({"op": "start_app", "command": ["a"], "directory": "/",
            "environment": [], "user": null, "port": 80, "ready": {"by": "port"},
            "ready_timeout_ms": 1}),
                ),
            ),
            (
                "request rehearse",
                request(json!({"op": "rehearse", "argv": ["python3", "-c", "0"],
            "timeout_ms": 30000})),
            ),
            ("request freeze", request(json!({"op": "freeze"}))),
            (
                "request unfreeze",
                request(json!({"op": "unfreeze", "incarnation": "abcdefghijklmnopqrstuvwxya"})),
            ),
            (
                "request unfreeze of a fork",
                request(
                    json!({"op": "unfreeze", "incarnation": "abcdefghijklmnopqrstuvwxya",
                    "hooks_ms": 5000}),
                ),
            ),
        ])
    }

    fn both(one: &Value, other: &Value) -> Value {
        let maps = [one, other].map(|map| map.as_object().unwrap().clone());
        Value::Object(maps.into_iter().flatten().collect())
    }

    fn event(fields: Value) -> Value {
        json!({"type": "event", "event": fields})
    }

    fn reply(fields: Value) -> Value {
        json!({"type": "reply", "reply": fields})
    }

    fn agent() -> Value {
        let code = json!({"by": "code", "code": 3});
        checked::<AgentMessage>(vec![
            (
                "hello",
                json!({"type": "hello", "generation": 2, "version": "0.1.0", "boot_id": "b",
            "thawed": false, "frozen": false, "app": {"is": "absent"}}),
            ),
            (
                "hello of a fork",
                json!({"type": "hello", "generation": 2, "version": "0.1.0", "boot_id": "b",
            "thawed": false, "frozen": true, "incarnation": "abcdefghijklmnopqrstuvwxya",
            "app": {"is": "absent"}}),
            ),
            ("pong", json!({"type": "pong", "token": 7})),
            ("credit", json!({"type": "credit", "bytes": 65536})),
            ("output stdout", json!({"type": "output", "of": "stdout"})),
            ("output stderr", json!({"type": "output", "of": "stderr"})),
            (
                "logs",
                json!({"type": "logs", "dropped": 2, "records": [
            {"sequence": 3, "at_us": 1, "from": "stderr", "text": "line"}]}),
            ),
            (
                "event app starting",
                event(json!({"event": "app", "is": "starting", "pid": 9})),
            ),
            (
                "event app ready",
                event(json!({"event": "app", "is": "ready", "pid": 9})),
            ),
            (
                "event app backoff",
                event(json!({"event": "app", "is": "backoff", "failures": 2,
            "restart_in_ms": 200, "exit": code})),
            ),
            (
                "event app stopped",
                event(json!({"event": "app", "is": "stopped"})),
            ),
            (
                "event app_unready",
                event(json!({"event": "app_unready", "reason": "why"})),
            ),
            (
                "event keep_awake",
                event(json!({"event": "keep_awake", "for_ms": 600_000})),
            ),
            (
                "event out_of_memory",
                event(json!({"event": "out_of_memory", "kills": 1})),
            ),
            (
                "error",
                json!({"type": "error", "code": "not_now", "message": "why"}),
            ),
        ])
    }

    fn replies() -> Value {
        checked::<AgentMessage>(vec![
            ("reply done", reply(json!({"of": "done"}))),
            (
                "reply status",
                reply(
                    json!({"of": "status", "uptime_ms": 1, "thawed": true, "frozen": false,
            "incarnation": "abcdefghijklmnopqrstuvwxya", "app": {"is": "ready", "pid": 9},
            "memory_available_kib": 2, "processes": 3}),
                ),
            ),
            (
                "reply resumed",
                reply(json!({"of": "resumed", "done": 2, "late": 1})),
            ),
            (
                "reply thawed",
                reply(json!({"of": "thawed", "realtime_ns": 1, "done": [["entropy", 12]]})),
            ),
            (
                "reply exit code",
                reply(json!({"of": "exit", "by": "code", "code": 3})),
            ),
            (
                "reply exit signal",
                reply(json!({"of": "exit", "by": "signal", "signal": 9})),
            ),
            (
                "reply exit timeout",
                reply(json!({"of": "exit", "by": "timeout"})),
            ),
            (
                "reply file",
                reply(json!({"of": "file", "bytes": 5, "mode": 420})),
            ),
        ])
    }

    fn error_codes() -> Value {
        use AgentErrorCode::{Invalid, NotFound, NotNow, Refused, TooMany, Unknown};
        json!([NotNow, Invalid, NotFound, Refused, TooMany, Unknown])
    }

    fn to_gateway() -> Value {
        let vm = "abcdefghijklmnopqrstuvwxya";
        checked::<ToGateway>(vec![
            ("hello", json!({"type": "hello", "generation": 1})),
            (
                "routes",
                json!({"type": "routes", "set": [
            {"host": "a.localhost", "app": "me/a", "policy": {"admission": "open",
                "waiters_max": 100, "wake_deadline_ms": 60000}},
            {"host": "b.localhost", "app": "me/b", "policy": {"admission": "disabled",
                "waiters_max": 0, "wake_deadline_ms": 0}},
            {"host": "c.localhost", "app": "me/c", "policy": {"admission": "no_release",
                "waiters_max": 0, "wake_deadline_ms": 0}}]}),
            ),
            ("routes_end", json!({"type": "routes_end"})),
            (
                "unroute",
                json!({"type": "unroute", "hosts": ["a.localhost"]}),
            ),
            (
                "awake",
                json!({"type": "awake", "app": "me/a", "vm": vm,
            "phases": [{"name": "boot", "us": 5}]}),
            ),
            (
                "wake_failed",
                json!({"type": "wake_failed", "app": "me/a", "failure": {
            "code": "app_unready", "message": "why", "retry_after_s": 5}}),
            ),
            ("connected", json!({"type": "connected", "id": 4})),
            (
                "connect_failed",
                json!({"type": "connect_failed", "id": 4, "reason": "why", "gone": false}),
            ),
            (
                "reap",
                json!({"type": "reap", "app": "me/a", "vm": vm, "force": false}),
            ),
            (
                "gone",
                json!({"type": "gone", "app": "me/a", "vm": vm, "reason": "why"}),
            ),
            ("quit", json!({"type": "quit", "drain_ms": 5000})),
        ])
    }

    fn from_gateway() -> Value {
        let vm = "abcdefghijklmnopqrstuvwxya";
        let activity = json!({"app": "me/a", "vm": vm, "in_flight": 1, "idle_ms": 0});
        checked::<FromGateway>(vec![
            (
                "hello",
                json!({"type": "hello", "generation": 1, "warm": [activity],
            "stamp": "0.1.0 1.2.3 127.0.0.1:8080"}),
            ),
            ("wake", json!({"type": "wake", "app": "me/a"})),
            ("connect", json!({"type": "connect", "id": 4, "vm": vm})),
            (
                "activity",
                json!({"type": "activity", "app": "me/a", "vm": vm, "in_flight": 1,
            "idle_ms": 0}),
            ),
            ("reaped", json!({"type": "reaped", "app": "me/a", "vm": vm})),
            ("busy", json!({"type": "busy", "app": "me/a", "vm": vm})),
            (
                "counts",
                json!({"type": "counts", "by_class": [0, 1, 2, 3, 4, 5], "waited": 1,
            "refused_full": 2, "vm_died": 3}),
            ),
        ])
    }

    fn launch(begin: Value, scratch: Value) -> Value {
        json!({"type": "launch", "vm": "abcdefghijklmnopqrstuvwxya", "vcpus": 2,
            "memory_mib": 256, "memory": 0, "begin": begin,
            "incarnation": "00112233445566778899aabbccddeeff", "image": 1, "folder": 2,
            "scratch": scratch, "tap": 3, "mac": [2, 0, 0, 0, 0, 1], "agent": 4})
    }

    fn to_vmm() -> Value {
        let locked = json!({"file": 8, "key": "AAEC"});
        let boot = json!({"by": "boot", "kernel": 5, "initramfs": 6, "command_line": "quiet"});
        let shared = json!({"by": "restore", "state": 5, "memory": "shared"});
        let own = json!({"by": "restore", "state": 5, "memory": "own"});
        let ahead = json!({"by": "restore", "state": 5, "memory": "shared",
            "ahead": [[3, 2], [1024, 1]]});
        let new = json!({"bytes": 4096, "base": 7, "layers": [], "own": locked});
        let forked = json!({"bytes": 4096, "base": null, "own": locked,
            "layers": [{"file": 6, "key": null}, {"file": 7, "key": "AAEC"}]});
        let mut limited = launch(own.clone(), Value::Null);
        limited["rates"] = json!({"disk_bytes": 1, "disk_operations": 2, "network_bytes": 3});
        checked::<ToVmm>(vec![
            ("launch one with limits", limited),
            (
                "park",
                json!({"type": "park", "memory_mib": 128, "vcpus": 2}),
            ),
            ("launch a boot", launch(boot, new)),
            ("launch a fork", launch(shared, forked)),
            ("launch one that goes on", launch(own, Value::Null)),
            ("launch a fork with pages", launch(ahead, Value::Null)),
            ("resume", json!({"type": "resume"})),
            ("pause", json!({"type": "pause", "limit_ms": 5000})),
            ("save", json!({"type": "save"})),
            (
                "switch",
                json!({"type": "switch", "own": {"file": 0, "key": "AAEC"}}),
            ),
            (
                "copy what was frozen",
                json!({"type": "copy", "to": {"file": 0, "key": "AAEC"}, "below": "source",
            "of": "frozen"}),
            ),
            (
                "copy all",
                json!({"type": "copy", "to": {"file": 0, "key": null}, "below": "nothing",
            "of": "paused"}),
            ),
            ("cancel_copy", json!({"type": "cancel_copy"})),
            ("freeze", json!({"type": "freeze", "limit_ms": 60000})),
            ("console", json!({"type": "console"})),
            ("quit", json!({"type": "quit"})),
        ])
    }

    fn from_vmm() -> Value {
        let hello = |state: &str| json!({"type": "hello", "generation": 2, "state": state});
        let copying = |copy: &str| {
            let mut hello = hello("running");
            hello["copy"] = json!(copy);
            hello
        };
        let ended = |by: &str| json!({"type": "ended", "why": "why", "by": by});
        checked::<FromVmm>(vec![
            ("hello parked", hello("parked")),
            ("hello paused", hello("paused")),
            ("hello running", hello("running")),
            ("hello ended", hello("ended")),
            (
                "hello of a fork",
                json!({"type": "hello", "generation": 2, "state": "paused", "layers": 3}),
            ),
            ("hello while copying", copying("under_way")),
            ("hello with a copy", copying("over")),
            ("copied", json!({"type": "copied", "why": null})),
            ("not copied", json!({"type": "copied", "why": "why"})),
            ("done", json!({"type": "done", "bytes": 7})),
            ("failed", json!({"type": "failed", "why": "why"})),
            ("ended by the guest", ended("guest")),
            ("ended by a fault", ended("fault")),
            ("ended by the host", ended("host")),
            ("ended as asked", ended("asked")),
        ])
    }

    fn to_zygote() -> Value {
        checked::<ToZygote>(vec![(
            "spawn",
            json!({"type": "spawn", "request": 7, "uid": 200_001,
            "fds": ["control", "output", "cgroup"]}),
        )])
    }

    fn from_zygote() -> Value {
        checked::<FromZygote>(vec![
            ("ready", json!({"type": "ready", "generation": 2})),
            (
                "spawned",
                json!({"type": "spawned", "request": 7, "pid": 31, "init": 30}),
            ),
            (
                "refused",
                json!({"type": "refused", "request": 7, "why": "the uid is not free"}),
            ),
            (
                "refused unread",
                json!({"type": "refused", "request": null, "why": "not a message"}),
            ),
            (
                "ended by itself",
                json!({"type": "ended", "pid": 31, "by": {"by": "code", "code": 0}}),
            ),
            (
                "ended by a signal",
                json!({"type": "ended", "pid": 31, "by": {"by": "signal", "signal": 31}}),
            ),
            ("gone", json!({"type": "gone", "pid": 31, "uid": 200_001})),
        ])
    }

    fn read_all<T: DeserializeOwned>(schema: &Value, part: &str) {
        // A part that came later is not there in what was before.
        for (name, example) in schema[part].as_object().into_iter().flatten() {
            serde_json::from_value::<T>(example.clone())
                .unwrap_or_else(|error| panic!("`{name}` of `{part}` is not read: {error}"));
        }
    }

    #[test]
    fn every_message_of_every_served_generation_is_still_read() {
        for generation in GENERATION_OLDEST_SERVED..=GENERATION {
            let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/schema");
            let text = std::fs::read_to_string(format!("{folder}/gen-{generation}.json")).unwrap();
            let schema: Value = serde_json::from_str(&text).unwrap();
            read_all::<HostMessage>(&schema, "host_message");
            read_all::<AgentMessage>(&schema, "agent_message");
            read_all::<AgentMessage>(&schema, "agent_reply");
            read_all::<ToGateway>(&schema, "to_gateway");
            read_all::<FromGateway>(&schema, "from_gateway");
            read_all::<ToVmm>(&schema, "to_vmm");
            read_all::<FromVmm>(&schema, "from_vmm");
            read_all::<ToZygote>(&schema, "to_zygote");
            read_all::<FromZygote>(&schema, "from_zygote");
        }
    }

    #[test]
    fn a_thaw_with_a_step_of_a_later_generation_is_read() {
        let mut thaw = forks()["request thaw of a fork"].clone();
        thaw["request"]["steps"] = json!(["clock", "of_tomorrow"]);
        let HostMessage::Request {
            request: Request::Thaw(thaw),
        } = serde_json::from_value(thaw).unwrap()
        else {
            panic!("not a thaw");
        };
        assert_eq!(thaw.steps, [ThawStep::Clock, ThawStep::Unknown]);
    }

    #[test]
    fn every_message_is_on_the_wire_as_it_was_in_this_generation() {
        let now = json!({
            "generation": GENERATION,
            "host_message": both(&host(), &forks()),
            "agent_message": agent(),
            "agent_reply": replies(),
            "agent_error_code": error_codes(),
            "to_gateway": to_gateway(),
            "from_gateway": from_gateway(),
            "to_vmm": to_vmm(),
            "from_vmm": from_vmm(),
            "to_zygote": to_zygote(),
            "from_zygote": from_zygote(),
        });
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/schema");
        let path = format!("{folder}/gen-{GENERATION}.json");
        if std::env::var_os("SPORE_WRITE_SCHEMA").is_some() {
            let text = serde_json::to_string_pretty(&now).unwrap();
            std::fs::write(&path, text + "\n").unwrap();
        }
        let text = std::fs::read_to_string(&path).unwrap();
        let committed: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(
            now, committed,
            "see the first lines of this file for what to do"
        );
    }
}
