//! The floor: a process that makes a guest from what was saved of it with one ioctl after the
//! other, and lets it run to its first output. No jail, no zygote, no device, no thread but its
//! first.
//!
//! What it asks of KVM goes through `spore_vmm::kvm`, where each function is one call of
//! `kvm-ioctls`, and what was saved is read by `spore_vmm::machine::saved`: so it sets exactly what
//! a fork sets.
//!
//! ```text
//!   bench                              this
//!    │ spawn, with state and memory      │
//!    │ ◀─────────────────────────── 'r'  │  it has read the state; KVM is not open yet
//!    │ 'g' ───────────────────────────▶  │
//!    │ ◀─────────────────────────── 'o'  │  the guest's first output
//!    │ ◀──────────── its steps, as JSON  │
//!    │ close ─────────────────────────▶  │  it ends
//! ```

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use command_fds::{CommandFdExt as _, FdMapping};
use kvm_ioctls::VcpuExit;
use serde_json::{Map, json};
use spore_vmm::clock::{Clock as _, Monotonic};
use spore_vmm::inherited::{CONTROL_FD, KVM_FD, take};
use spore_vmm::kvm::Kvm;
use spore_vmm::kvm::x86_64::state::reading;
use spore_vmm::machine::saved::SavedMachine;
use spore_vmm::memory::{Sharing, Space};

use crate::guest::{RESET, RESET_PORT, Source};

/// The word that makes this program the floor.
pub(crate) const WORD: &str = "bare";

/// The process.
pub(crate) fn main() -> Result<()> {
    let [state, memory] = take([CONTROL_FD, KVM_FD])?;
    let state = File::from(state);
    let mut bytes = vec![0; usize::try_from(state.metadata()?.len())?];
    state.read_exact_at(&mut bytes, 0)?;
    let saved = SavedMachine::read(&bytes)?;
    let (mut input, mut output) = (std::io::stdin().lock(), std::io::stdout().lock());
    let mut byte = [0];
    output.write_all(b"r")?;
    output.flush()?;
    input.read_exact(&mut byte)?;
    let mut steps = Vec::new();
    restore(&saved, &memory, &mut steps, || {
        output.write_all(b"o")?;
        output.flush()?;
        Ok(())
    })?;
    let steps = steps.windows(2).map(|pair| match pair {
        [(_, from), (name, to)] => (String::from(*name), json!((*to - *from).as_micros())),
        _ => unreachable!("windows of two"),
    });
    writeln!(output, "{}", json!(steps.collect::<Map<_, _>>()))?;
    output.flush()?;
    // The machine is there until whoever looks at this process has seen enough.
    input.read_to_end(&mut Vec::new())?;
    Ok(())
}

/// All of it, and when each step was over; `said` is called at the guest's first output.
fn restore(
    saved: &SavedMachine<'_>,
    memory: &OwnedFd,
    steps: &mut Vec<(&'static str, Duration)>,
    said: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let mut over = |name| steps.push((name, Monotonic.now()));
    over("begin");
    let device = File::options().read(true).write(true).open("/dev/kvm")?;
    let kvm = Kvm::new(device.into())?;
    over("open");
    let space = Space::reserve(saved.layout.memory_bytes())?;
    let vm = kvm.create_vm()?;
    over("vm");
    vm.create_irqchip()?;
    over("irqchip");
    let regions = saved.layout.regions();
    vm.set_memory(&space, &regions)?;
    over("slots");
    let mut vcpu = vm.create_vcpu(0)?;
    over("vcpu");
    let _memory = space.fill(memory.as_fd(), Sharing::Private, &regions)?;
    over("map");
    let [one] = saved.vcpus.as_slice() else {
        anyhow::bail!("a guest of {} processors", saved.vcpus.len());
    };
    let shift = reading(&vcpu)?.shift_to(one.reading());
    one.restore(&vcpu, shift)?;
    saved.vm.restore(&vm)?;
    vcpu.tell_paused()?;
    over("state");
    match vcpu.run()? {
        VcpuExit::IoOut(RESET_PORT, [RESET]) => said()?,
        other => anyhow::bail!("the guest ended with {other:?}"),
    }
    over("run");
    // Taken apart with the process, as a VMM's is.
    std::mem::forget((vm, vcpu));
    Ok(())
}

/// One that waits to be told to begin.
#[derive(Debug)]
pub(crate) struct Floor {
    pub(crate) child: Child,
    input: ChildStdin,
    output: ChildStdout,
}

impl Floor {
    pub(crate) fn start(source: &Source) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg(WORD).env_clear();
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let fds = [(&source.state, CONTROL_FD), (&source.memory, KVM_FD)];
        let fds = fds.map(|(fd, child_fd)| {
            let parent_fd = fd.try_clone()?;
            Ok::<_, std::io::Error>(FdMapping {
                parent_fd,
                child_fd,
            })
        });
        let fds = fds.into_iter().collect::<Result<_, _>>()?;
        let mut child = command.fd_mappings(fds)?.spawn()?;
        let input = child.stdin.take().context("no pipe to the floor")?;
        let output = child.stdout.take().context("no pipe from the floor")?;
        let mut floor = Self {
            child,
            input,
            output,
        };
        floor.hears(b'r')?;
        Ok(floor)
    }

    fn hears(&mut self, expected: u8) -> Result<()> {
        let mut byte = [0];
        let read = self.output.read_exact(&mut byte);
        read.context("the floor ended; its standard error says why")?;
        ensure!(byte == [expected], "the floor said {byte:?}");
        Ok(())
    }

    /// Lets it begin, and waits for the guest's first output.
    pub(crate) fn run(&mut self) -> Result<()> {
        self.input.write_all(b"g")?;
        self.hears(b'o')
    }

    /// Ends it; gives its steps in microseconds.
    pub(crate) fn end(mut self) -> Result<Map<String, serde_json::Value>> {
        drop(self.input);
        let mut steps = String::new();
        self.output.read_to_string(&mut steps)?;
        let ended = self.child.wait()?;
        ensure!(ended.success(), "the floor: {ended}");
        Ok(serde_json::from_str(&steps)?)
    }
}
