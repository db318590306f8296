//! The session loop over a socket pair: the real agent, real processes, a folder as the tenant's
//! root.
//!
//! The machine is a stand-in, since a thaw would set the clock of the host that runs the test.

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, BufReader, Read as _, Write as _};
    use std::net::Ipv4Addr;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;
    use std::path::{Path, PathBuf};
    use std::thread::JoinHandle;

    use serde_json::{Value, json};
    use spore_guest::agent::{Agent, Machine};
    use spore_guest::cgroup::Groups;
    use spore_guest::guest::Guest;
    use spore_guest::launch::Launcher;
    use spore_guest::reap::Reaper;
    use spore_wire::frame::{self, Decoder, FrameKind, PREAMBLE_BYTES};
    use spore_wire::guest::{AgentError, CREDIT_BYTES, Thaw, ThawStep};

    struct StandIn;

    impl Machine for StandIn {
        fn check(&self, _thaw: &Thaw) -> Result<(), AgentError> {
            Ok(())
        }

        fn renew(
            &mut self,
            _guest: &Guest,
            _step: ThawStep,
            _thaw: &Thaw,
        ) -> Result<(), AgentError> {
            Ok(())
        }

        fn power_off(&mut self) {}
    }

    struct Host {
        socket: UnixStream,
        decoder: Decoder,
        stream: u32,
    }

    fn agent(root: &Path) -> (Host, JoinHandle<()>) {
        agent_with(root, Groups::ProcessGroups, None)
    }

    fn agent_with(root: &Path, groups: Groups, face: Option<PathBuf>) -> (Host, JoinHandle<()>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        if root != Path::new("/") {
            std::fs::create_dir_all(root.join("run/secrets")).unwrap();
            std::fs::create_dir_all(root.join("dev")).unwrap();
        }
        let guest = Guest {
            root: OwnedFd::from(std::fs::File::open(root).unwrap()),
            launcher: Launcher {
                program: env!("CARGO_BIN_EXE_spore-guest").into(),
                namespace: None,
            },
            groups,
            reaper: Reaper::own(),
            address: Ipv4Addr::LOCALHOST,
            face,
            leftovers: Vec::new(),
        };
        let thread = std::thread::spawn(move || {
            Agent::new(OwnedFd::from(theirs), guest, StandIn)
                .unwrap()
                .run();
        });
        let host = Host {
            socket: ours,
            decoder: Decoder::new(),
            stream: 1,
        };
        (host, thread)
    }

    impl Host {
        fn frame(&mut self, stream: u32, kind: FrameKind, payload: &[u8]) {
            let mut out = Vec::new();
            frame::encode(stream, kind, payload, &mut out).unwrap();
            self.socket.write_all(&out).unwrap();
        }

        fn say(&mut self, stream: u32, message: &Value) {
            self.frame(stream, FrameKind::Message, message.to_string().as_bytes());
        }

        fn hello(&mut self, nonce: u8) -> Value {
            self.socket.write_all(&[0; PREAMBLE_BYTES]).unwrap();
            self.decoder = Decoder::after_mark([nonce; 16]);
            let nonce = format!("{nonce:02x}").repeat(16);
            self.say(
                0,
                &json!({"type": "hello", "generation": 1, "nonce": nonce}),
            );
            self.stream = 1;
            self.next(0).1
        }

        fn next(&mut self, stream: u32) -> (Vec<u8>, Value) {
            let mut buffer = [0; 65536];
            loop {
                while let Some(frame) = self.decoder.next_frame().unwrap() {
                    if frame.stream != stream {
                        continue;
                    }
                    match frame.kind {
                        FrameKind::Message => {
                            let value = serde_json::from_slice(&frame.payload).unwrap();
                            return (Vec::new(), value);
                        }
                        FrameKind::Data => return (frame.payload, Value::Null),
                        FrameKind::End | FrameKind::Part => {}
                    }
                }
                let bytes = self.socket.read(&mut buffer).unwrap();
                assert!(bytes > 0, "the agent hung up");
                self.decoder.feed(&buffer[..bytes]);
            }
        }

        fn open(&mut self, request: &Value) -> u32 {
            let stream = self.stream;
            self.stream += 2;
            self.say(stream, &json!({"type": "request", "request": request}));
            stream
        }

        /// Output and end of a stream, giving credit for what came.
        fn finish(&mut self, stream: u32) -> (Vec<u8>, Value) {
            let mut output = Vec::new();
            loop {
                let (data, message) = self.next(stream);
                output.extend_from_slice(&data);
                if !data.is_empty() {
                    self.say(stream, &json!({"type": "credit", "bytes": data.len()}));
                }
                if message["type"] == "reply" || message["type"] == "error" {
                    return (output, message);
                }
            }
        }

        fn call(&mut self, request: &Value) -> (Vec<u8>, Value) {
            let stream = self.open(request);
            self.finish(stream)
        }

        fn greet_and_thaw(&mut self) {
            assert_eq!(self.hello(1)["type"], "hello");
            let thaw = json!({"op": "thaw", "realtime_ns": 1, "entropy": "AAEC",
                "hostname": "a", "machine_id": "0", "resolver": null});
            assert_eq!(self.call(&thaw).1["reply"]["of"], "done");
        }

        fn shut_down(mut self, thread: JoinHandle<()>) {
            let request = json!({"op": "shutdown", "grace_ms": 10});
            assert_eq!(self.call(&request).1["reply"]["of"], "done");
            thread.join().unwrap();
        }
    }

    fn sh(script: &str) -> Value {
        json!({"op": "exec", "argv": ["/bin/sh", "-c", script], "environment": [],
            "directory": "/", "user": "0", "pty": null, "timeout_ms": null})
    }

    fn rehearse(script: &str, timeout_ms: u32) -> Value {
        let argv = ["/bin/sh", "-c", script];
        json!({"op": "rehearse", "argv": argv, "timeout_ms": timeout_ms})
    }

    #[test]
    fn a_rehearsal_is_silent_ends_in_time_and_comes_before_every_app() {
        let folder = tempfile::tempdir().unwrap();
        let (mut host, thread) = agent(folder.path());
        host.hello(1);
        assert_eq!(host.call(&rehearse("true", 1000)).1["code"], "not_now");
        host.greet_and_thaw();
        let (output, message) = host.call(&rehearse("echo noise; exit 3", 60_000));
        assert_eq!(
            message["reply"],
            json!({"of": "exit", "by": "code", "code": 3})
        );
        assert!(output.is_empty());
        let (_output, message) = host.call(&rehearse("exec sleep 1000", 50));
        assert_eq!(message["reply"], json!({"of": "exit", "by": "timeout"}));
        let start = json!({"op": "start_app", "command": ["/bin/sleep", "1000"],
            "directory": "/", "environment": [], "secret_environment": [], "secret_files": [],
            "user": "0", "port": 1, "ready": {"by": "port"}, "ready_timeout_ms": 60000});
        assert_eq!(host.call(&start).1["reply"]["of"], "done");
        let refused = host.call(&rehearse("true", 1000)).1;
        assert_eq!(refused["code"], "not_now", "{refused}");
        host.shut_down(thread);
    }

    #[test]
    fn nothing_but_status_is_served_before_a_thaw_and_a_thaw_is_served_once() {
        let folder = tempfile::tempdir().unwrap();
        let (mut host, thread) = agent(folder.path());
        assert_eq!(host.hello(9)["thawed"], false);
        assert_eq!(host.call(&sh("true")).1["code"], "not_now");
        assert_eq!(
            host.call(&json!({"op": "status"})).1["reply"]["of"],
            "status"
        );
        host.greet_and_thaw();
        let again = json!({"op": "thaw", "realtime_ns": 1, "entropy": "AAEC",
            "hostname": "a", "machine_id": "0", "resolver": null});
        assert_eq!(host.call(&again).1["code"], "not_now");
        host.shut_down(thread);
    }

    fn thaw(name: &str, hold: bool) -> Value {
        json!({"op": "thaw", "realtime_ns": 1, "entropy": "AAEC", "hostname": "a",
            "machine_id": "0", "resolver": null, "incarnation": name, "hold": hold,
            "steps": ["boot_id", "entropy", "of_tomorrow"]})
    }

    /// Gives secrets to an app, whose key is `key` in base64.
    fn thaw_giving(name: &str, key: &str) -> Value {
        let mut thaw = thaw(name, true);
        thaw["steps"] = json!(["secrets"]);
        thaw["secrets"] = json!({"environment": [["KEY", key]], "files": [["CERT", "YQ=="]]});
        thaw
    }

    #[test]
    fn what_a_thaw_gave_is_there_before_the_app_and_is_given_again_with_each_of_its_starts() {
        let (folder, group) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (mut host, thread) = agent_with(folder.path(), groups(group.path()), None);
        host.hello(1);
        let done = host.call(&thaw_giving("source", "YQ==")).1["reply"]["done"].clone();
        assert_eq!(done[0][0], "secrets");
        let file = folder.path().join("run/secrets/CERT");
        assert_eq!(std::fs::read(&file).unwrap(), b"a");
        // The host asks again until it has an answer, while the tenant is held.
        let again = host.call(&thaw_giving("source", "Yg==")).1;
        assert_eq!(again["reply"]["of"], "thawed");
        let wrong = json!({"op": "thaw", "realtime_ns": 1, "entropy": "AAEC", "hostname": "a",
            "machine_id": "0", "resolver": null, "incarnation": "source", "hold": true,
            "steps": ["secrets"],
            "secrets": {"environment": [], "files": [["../CERT", "Y2FuYXJ5"]]}});
        let refused = host.call(&wrong).1;
        assert_eq!(refused["code"], "invalid", "{refused}");
        assert!(!refused.to_string().contains("canary"), "{refused}");
        assert_eq!(
            host.call(&thaw_giving("source", "Yg==")).1["reply"]["of"],
            "thawed"
        );
        assert_eq!(host.call(&unfreeze("source")).1["reply"]["of"], "done");

        let out = folder.path().join("out");
        let script = format!("echo $KEY >> {}", out.display());
        let start = json!({"op": "start_app", "command": ["/bin/sh", "-c", script],
            "directory": "/", "environment": [["KEY", "no secret"]], "user": "0", "port": 1,
            "ready": {"by": "port"}, "ready_timeout_ms": 60000});
        assert_eq!(host.call(&start).1["reply"]["of"], "done");
        let said = || std::fs::read_to_string(&out).unwrap_or_default();
        while said().lines().count() < 2 {
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        assert!(said().lines().all(|line| line == "b"), "{}", said());
        host.shut_down(thread);
    }

    fn unfreeze(name: &str) -> Value {
        json!({"op": "unfreeze", "incarnation": name})
    }

    /// A folder that stands for the tenant's group; nobody in it ever runs.
    fn groups(folder: &Path) -> Groups {
        std::fs::write(folder.join("cgroup.events"), "populated 0\nfrozen 0\n").unwrap();
        Groups::Unified {
            tenant: folder.to_owned(),
            pids_max: 8,
        }
    }

    #[test]
    fn a_frozen_vm_goes_on_under_its_name_and_its_fork_is_thawed_under_another() {
        let (folder, group) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (mut host, thread) = agent_with(folder.path(), groups(group.path()), None);
        let told = |host: &mut Host| host.call(&json!({"op": "status"})).1["reply"].clone();
        let freezer = || std::fs::read_to_string(group.path().join("cgroup.freeze")).unwrap();
        host.hello(1);
        let done = host.call(&thaw("source", false)).1["reply"]["done"].clone();
        let steps: Vec<_> = done
            .as_array()
            .unwrap()
            .iter()
            .map(|step| &step[0])
            .collect();
        assert_eq!(
            steps,
            ["entropy", "boot_id"],
            "in their order, and those it knows"
        );
        assert_eq!(freezer(), "0");
        let stream = host.open(&json!({"op": "freeze"}));
        assert_eq!(told(&mut host)["frozen"], false);
        assert_eq!(freezer(), "1");
        assert_eq!(host.call(&sh("true")).1["code"], "not_now");
        std::fs::write(
            group.path().join("cgroup.events"),
            "populated 1\nfrozen 1\n",
        )
        .unwrap();
        assert_eq!(host.finish(stream).1["reply"]["of"], "done");
        let still = told(&mut host);
        assert_eq!(
            (&still["thawed"], &still["frozen"]),
            (&json!(false), &json!(true))
        );
        assert_eq!(still["incarnation"], "source");
        assert_eq!(host.call(&unfreeze("fork")).1["code"], "not_now");
        assert_eq!(host.call(&thaw("source", false)).1["code"], "not_now");
        assert_eq!(host.call(&unfreeze("source")).1["reply"]["of"], "done");
        assert_eq!(freezer(), "0");
        assert_eq!(told(&mut host)["thawed"], true);

        let stream = host.open(&json!({"op": "freeze"}));
        assert_eq!(host.finish(stream).1["reply"]["of"], "done");
        let hello = host.hello(2);
        assert_eq!(
            (&hello["frozen"], &hello["incarnation"]),
            (&json!(true), &json!("source"))
        );
        assert_eq!(host.call(&thaw("fork", true)).1["reply"]["of"], "thawed");
        assert_eq!(freezer(), "1");
        assert_eq!(told(&mut host)["incarnation"], "fork");
        assert_eq!(host.call(&thaw("fork", true)).1["reply"]["of"], "thawed");
        assert_eq!(host.call(&unfreeze("fork")).1["reply"]["of"], "done");
        assert_eq!(freezer(), "0");
        host.shut_down(thread);
    }

    #[test]
    fn who_asks_to_hear_of_forks_while_its_vm_is_being_copied_hears_of_them() {
        let (folder, group) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let face = folder.path().join("agent.sock");
        let groups = groups(group.path());
        let (mut host, thread) = agent_with(folder.path(), groups, Some(face.clone()));
        host.hello(1);
        assert_eq!(host.call(&thaw("source", false)).1["reply"]["of"], "thawed");
        let still = "populated 1\nfrozen 1\n";
        std::fs::write(group.path().join("cgroup.events"), still).unwrap();
        let freeze = json!({"op": "freeze"});
        assert_eq!(host.call(&freeze).1["reply"]["of"], "done");

        // Its question was on its way when the agent stopped listening to tenants.
        let mut process = UnixStream::connect(face).unwrap();
        process.write_all(b"{\"ask\":\"after_fork\"}\n").unwrap();
        assert_eq!(host.call(&thaw("fork", true)).1["reply"]["of"], "thawed");
        let mut patient = unfreeze("fork");
        patient["hooks_ms"] = json!(60_000);
        let stream = host.open(&patient);
        process
            .set_read_timeout(Some(std::time::Duration::from_secs(60)))
            .unwrap();
        let mut lines = BufReader::new(&process).lines();
        assert_eq!(lines.next().unwrap().unwrap(), "{\"ok\":true}");
        assert_eq!(lines.next().unwrap().unwrap(), "{\"forked\":\"fork\"}");
        (&process).write_all(b"{\"done\":true}\n").unwrap();
        let resumed = json!({"of": "resumed", "done": 1, "late": 0});
        assert_eq!(host.finish(stream).1["reply"], resumed);
        host.shut_down(thread);
    }

    #[test]
    fn a_freeze_that_does_not_come_or_is_not_waited_for_leaves_the_tenant_running() {
        let (folder, group) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (mut host, thread) = agent_with(folder.path(), groups(group.path()), None);
        let freezer = || std::fs::read_to_string(group.path().join("cgroup.freeze")).unwrap();
        host.hello(1);
        host.call(&thaw("source", false));
        assert_eq!(host.call(&json!({"op": "freeze"})).1["code"], "refused");
        assert_eq!(freezer(), "0");
        let stream = host.open(&json!({"op": "freeze"}));
        host.say(stream, &json!({"type": "cancel"}));
        let status = host.call(&json!({"op": "status"})).1["reply"].clone();
        assert_eq!((&status["thawed"], freezer().as_str()), (&json!(true), "0"));
        host.open(&json!({"op": "freeze"}));
        assert_eq!(host.hello(2)["thawed"], true);
        assert_eq!(freezer(), "0");
        host.shut_down(thread);
    }

    #[test]
    fn an_exec_gives_its_output_and_its_end() {
        let folder = tempfile::tempdir().unwrap();
        let (mut host, thread) = agent(folder.path());
        host.greet_and_thaw();
        let (output, end) = host.call(&sh("echo out; echo err >&2; exit 3"));
        assert!(output.starts_with(b"out\n") || output.starts_with(b"err\n"));
        assert_eq!(end["reply"], json!({"of": "exit", "by": "code", "code": 3}));
        let end = host.call(&sh("kill -9 $$")).1;
        assert_eq!(
            end["reply"],
            json!({"of": "exit", "by": "signal", "signal": 9})
        );
        let mut slow = sh("sleep 1000");
        slow["timeout_ms"] = json!(50);
        assert_eq!(host.call(&slow).1["reply"]["by"], "timeout");
        let mut none = sh("");
        none["argv"] = json!(["/no/such/program"]);
        assert_eq!(host.call(&none).1["code"], "not_found");
        host.shut_down(thread);
    }

    #[test]
    fn input_and_output_keep_to_their_credit() {
        let folder = tempfile::tempdir().unwrap();
        let (mut host, thread) = agent(folder.path());
        host.greet_and_thaw();
        let stream = host.open(&sh("head -c 1000000 /dev/zero; cat"));
        // Without credit exactly the window comes, however long one waits.
        let mut bytes = 0;
        while bytes < CREDIT_BYTES as usize {
            bytes += host.next(stream).0.len();
        }
        assert_eq!(bytes, CREDIT_BYTES as usize);
        host.say(0, &json!({"type": "ping", "token": 5}));
        assert_eq!(host.next(0).1["token"], 5);
        host.say(stream, &json!({"type": "credit", "bytes": CREDIT_BYTES}));
        host.frame(stream, FrameKind::Data, &[b'x'; 60_000]);
        host.frame(stream, FrameKind::End, &[]);
        let (rest, end) = host.finish(stream);
        assert_eq!(end["reply"]["code"], 0);
        assert_eq!(bytes + rest.len(), 1_060_000);
        let stream = host.open(&sh("sleep 1000"));
        for _part in 0..6 {
            host.frame(stream, FrameKind::Data, &[0; 60_000]);
        }
        assert_eq!(host.finish(stream).1["code"], "too_many");
        host.shut_down(thread);
    }

    #[test]
    fn a_terminal_has_its_size_and_follows_a_resize() {
        // A folder of one's own has no terminals; this test writes nothing to the host's root.
        let (mut host, thread) = agent(Path::new("/"));
        host.greet_and_thaw();
        let mut exec = sh("stty size; read line; stty size");
        exec["pty"] = json!({"rows": 33, "columns": 99});
        let stream = host.open(&exec);
        let mut output = Vec::new();
        while !String::from_utf8_lossy(&output).contains("33 99") {
            output.extend(host.next(stream).0);
        }
        host.say(
            stream,
            &json!({"type": "resize", "rows": 11, "columns": 22}),
        );
        host.frame(stream, FrameKind::Data, b"\n");
        let (rest, end) = host.finish(stream);
        assert!(String::from_utf8_lossy(&rest).contains("11 22"));
        assert_eq!(end["reply"]["code"], 0);
        host.shut_down(thread);
    }

    #[test]
    fn a_new_hello_kills_what_ran_and_resynchronises_behind_a_half_frame() {
        let folder = tempfile::tempdir().unwrap();
        let (mut host, thread) = agent(folder.path());
        host.greet_and_thaw();
        let stream = host.open(&sh("echo $$; exec sleep 1000"));
        let mut output = Vec::new();
        while !output.ends_with(b"\n") {
            output.extend(host.next(stream).0);
        }
        let pid = String::from_utf8(output).unwrap();
        let process = format!("/proc/{}", pid.trim());
        assert!(Path::new(&process).exists());
        let mut half = Vec::new();
        frame::encode(7, FrameKind::Data, &[1; 5000], &mut half).unwrap();
        host.socket.write_all(&half[..100]).unwrap();
        let hello = host.hello(2);
        assert_eq!(hello["thawed"], true);
        while Path::new(&process).exists() {
            std::thread::yield_now();
        }
        host.shut_down(thread);
    }

    #[test]
    fn files_are_whole_and_no_link_leads_out_of_the_root() {
        let folder = tempfile::tempdir().unwrap();
        let (mut host, thread) = agent(folder.path());
        host.greet_and_thaw();
        std::os::unix::fs::symlink("/etc", folder.path().join("link")).unwrap();
        let read = |path: &str| json!({"op": "read_file", "path": path});
        assert_eq!(host.call(&read("/link/hostname")).1["code"], "not_found");
        assert_eq!(
            host.call(&read("/../../etc/hostname")).1["code"],
            "not_found"
        );
        let write = json!({"op": "write_file", "path": "/dev/file", "mode": 0o640, "user": "0"});
        let stream = host.open(&write);
        host.frame(stream, FrameKind::Data, b"half ");
        host.frame(stream, FrameKind::Data, b"and half");
        host.say(0, &json!({"type": "ping", "token": 1}));
        assert_eq!(host.next(0).1["token"], 1);
        assert!(
            !folder.path().join("dev/file").exists(),
            "it must not be seen half"
        );
        host.frame(stream, FrameKind::End, &[]);
        assert_eq!(host.finish(stream).1["reply"]["of"], "done");
        let (bytes, end) = host.call(&read("/dev/file"));
        assert_eq!(bytes, b"half and half");
        assert_eq!(
            end["reply"],
            json!({"of": "file", "bytes": 13, "mode": 0o640})
        );
        let stream = host.open(&write);
        host.say(stream, &json!({"type": "cancel"}));
        host.say(0, &json!({"type": "ping", "token": 2}));
        assert_eq!(host.next(0).1["token"], 2);
        let left = std::fs::read_dir(folder.path().join("dev"))
            .unwrap()
            .count();
        assert_eq!(left, 1, "the temporary file is gone");
        host.shut_down(thread);
    }
}
