//! A host's end of the agent's channel, as small as a test needs it: one request at a time, beside
//! streams that stay open.

use std::collections::HashMap;
use std::process::Command;
use std::time::Duration;

use data_encoding::HEXLOWER;
use spore_node::hypervisor::{AgentStream, Vm};
use spore_wire::frame::{Decoder, FrameKind, PREAMBLE_BYTES, encode};
use spore_wire::generation::GENERATION;
use spore_wire::guest::{
    AgentError, AgentHello, AgentMessage, AppSecrets, Exec, HostHello, HostMessage, Reply, Request,
    Thaw, ThawStep,
};
use spore_wire::id::VmId;
use spore_wire::secret::SecretBytes;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::timeout;

/// Longer than anything takes on a busy machine; only a hang reaches it.
const HANG: Duration = Duration::from_secs(300);

/// A session.
pub(crate) struct Agent {
    stream: Box<dyn AgentStream>,
    decoder: Decoder,
    last: u32,
    output: HashMap<u32, Vec<u8>>,
    logs: HashMap<u32, String>,
}

impl Agent {
    /// Begins a session; what ran for the one before ends.
    pub(crate) async fn greet(vm: &dyn Vm) -> (Self, AgentHello) {
        let nonce: [u8; 16] = random();
        let mut this = Self {
            stream: vm.agent().await.unwrap(),
            decoder: Decoder::after_mark(nonce),
            last: 0,
            output: HashMap::new(),
            logs: HashMap::new(),
        };
        this.stream.write_all(&[0; PREAMBLE_BYTES]).await.unwrap();
        let hello = HostHello {
            generation: GENERATION,
            nonce: HEXLOWER.encode(&nonce),
        };
        this.say(0, &HostMessage::Hello(hello)).await;
        let AgentMessage::Hello(hello) = this.hear(0).await else {
            unreachable!("the agent's first word is no hello");
        };
        (this, hello)
    }

    async fn frame(&mut self, stream: u32, kind: FrameKind, payload: &[u8]) {
        let mut out = Vec::new();
        encode(stream, kind, payload, &mut out).unwrap();
        self.stream.write_all(&out).await.unwrap();
    }

    async fn say(&mut self, stream: u32, message: &HostMessage) {
        let json = serde_json::to_vec(message).unwrap();
        self.frame(stream, FrameKind::Message, &json).await;
    }

    /// The next message on a stream; data is kept.
    async fn hear(&mut self, stream: u32) -> AgentMessage {
        let mut buffer = vec![0; 64 * 1024];
        loop {
            while let Some(frame) = self.decoder.next_frame().unwrap() {
                match frame.kind {
                    FrameKind::Data => {
                        let output = self.output.entry(frame.stream).or_default();
                        output.extend(frame.payload);
                    }
                    FrameKind::Message if frame.stream == stream => {
                        return serde_json::from_slice(&frame.payload).unwrap();
                    }
                    FrameKind::Message => {
                        let message = serde_json::from_slice(&frame.payload).unwrap();
                        if let AgentMessage::Logs(batch) = message {
                            let lines = self.logs.entry(frame.stream).or_default();
                            lines.extend(batch.records.into_iter().map(|line| line.text + "\n"));
                        }
                    }
                    _ => {}
                }
            }
            let read = timeout(HANG, self.stream.read(&mut buffer)).await;
            if read.is_err() {
                look();
                // One that an emulated processor let sleep over its interrupt hears the next.
                let request = Request::Exec(shell("true"));
                self.say(self.last + 2, &HostMessage::Request { request })
                    .await;
                let woken = timeout(Duration::from_secs(30), self.stream.read(&mut buffer)).await;
                println!("it was asked for more, and said {woken:?} bytes");
            }
            let bytes = read.expect("the agent answers").unwrap();
            assert!(bytes > 0, "the agent hung up");
            self.decoder.feed(&buffer[..bytes]);
        }
    }

    pub(crate) async fn open(&mut self, request: Request) -> u32 {
        self.last = (self.last + 2) | 1;
        let stream = self.last;
        self.say(stream, &HostMessage::Request { request }).await;
        stream
    }

    /// Gives a program its whole input.
    pub(crate) async fn input(&mut self, stream: u32, bytes: &[u8]) {
        self.frame(stream, FrameKind::Data, bytes).await;
        self.frame(stream, FrameKind::End, &[]).await;
    }

    pub(crate) async fn finish(&mut self, stream: u32) -> Result<(Reply, String), AgentError> {
        loop {
            match self.hear(stream).await {
                AgentMessage::Reply { reply } => {
                    let output = self.output.remove(&stream).unwrap_or_default();
                    return Ok((reply, String::from_utf8(output).unwrap()));
                }
                AgentMessage::Error(error) => return Err(error),
                _ => {}
            }
        }
    }

    pub(crate) async fn ask(&mut self, request: Request) -> Result<Reply, AgentError> {
        let stream = self.open(request).await;
        self.finish(stream).await.map(|(reply, _output)| reply)
    }

    /// What a script prints, as root.
    pub(crate) async fn sh(&mut self, script: &str) -> String {
        let stream = self.open(Request::Exec(shell(script))).await;
        self.input(stream, &[]).await;
        let (_exit, output) = self.finish(stream).await.unwrap();
        output.trim().to_owned()
    }

    /// What the app has printed until now.
    pub(crate) async fn logged(&mut self) -> String {
        let stream = self.open(Request::Logs { after: 0 }).await;
        // Behind what there is: the answers to two requests come in turn.
        self.sh("true").await;
        self.say(stream, &HostMessage::Cancel).await;
        self.logs.remove(&stream).unwrap_or_default()
    }

    /// Renews everything under the name of `vm`, which has no folder.
    pub(crate) async fn thaw(&mut self, vm: VmId, hostname: &str) -> Result<Reply, AgentError> {
        self.thaw_with(vm, hostname, None).await
    }

    /// The same of one with a folder.
    pub(crate) async fn thaw_with(
        &mut self,
        vm: VmId,
        hostname: &str,
        folder: Option<&str>,
    ) -> Result<Reply, AgentError> {
        self.ask(Request::Thaw(thaw(vm, hostname, folder))).await
    }

    /// Renews everything and gives an app's secrets.
    pub(crate) async fn thaw_giving(
        &mut self,
        vm: VmId,
        secrets: AppSecrets,
    ) -> Result<Reply, AgentError> {
        let mut thaw = thaw(vm, "giving", None);
        thaw.secrets = Some(secrets);
        self.ask(Request::Thaw(thaw)).await
    }

    /// Renews less than everything.
    pub(crate) async fn thaw_without(
        &mut self,
        vm: VmId,
        withheld: &[ThawStep],
    ) -> Result<Reply, AgentError> {
        let mut thaw = thaw(vm, "less", None);
        thaw.steps.retain(|step| !withheld.contains(step));
        self.ask(Request::Thaw(thaw)).await
    }
}

fn thaw(vm: VmId, hostname: &str, folder: Option<&str>) -> Thaw {
    let now = std::time::UNIX_EPOCH.elapsed().unwrap();
    Thaw {
        realtime_ns: u64::try_from(now.as_nanos()).unwrap(),
        entropy: SecretBytes::new(random::<64>().to_vec()),
        hostname: hostname.to_owned(),
        machine_id: HEXLOWER.encode(&random::<16>()),
        resolver: None,
        folder: folder.map(str::to_owned),
        incarnation: vm.to_string(),
        steps: ThawStep::ALL.to_vec(),
        hold: false,
        secrets: None,
    }
}

fn random<const BYTES: usize>() -> [u8; BYTES] {
    let mut bytes = [0; BYTES];
    getrandom::fill(&mut bytes).unwrap();
    bytes
}

pub(crate) fn shell(script: &str) -> Exec {
    Exec {
        argv: ["/bin/sh", "-c", script].map(str::to_owned).to_vec(),
        environment: Vec::new(),
        directory: Some("/".to_owned()),
        user: Some("0".to_owned()),
        pty: None,
        timeout_ms: None,
    }
}

/// In the rig: says what guests do that do not answer, while they are there.
pub(crate) fn look() {
    if let Ok(said) = Command::new("/run/rig/look").output() {
        println!("{}", String::from_utf8_lossy(&said.stdout));
    }
}
