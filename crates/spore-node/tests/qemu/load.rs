//! Checkpoints of a VM whose disk and network are never quiet.

use std::fs::{self, File};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use futures_util::StreamExt as _;
use rustix::fs::{FallocateFlags, fallocate, fstatvfs};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use spore_node::snapshot::NoStorePoints;
use spore_node::take::TakeError;
use spore_wire::id::{SnapshotId, VmId};
use spore_wire::node::{Source, StartVm};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::host::{HANG, TestHost, new_id};
use crate::kill_points::counter;
use crate::takes::{Daemon, new_snapshot, nothing_is_left};

/// Three processes, each of which writes blocks to a file without end, remembers in memory which it
/// wrote last, and says of all of them, read from the disk again, whether they are those. Two wait
/// for the disk after every few, so that it always has requests under way; one meanwhile sends back
/// what it is sent, as much of it at once as it gets, and asks the others for their word.
const APP: &str = r#"
use IO::Handle; use Fcntl;
my ($blocks, $bytes, $path, $file, @round, $writes, @workers) = (512, 4096, "/tmp/blocks");
sub block { return substr(sprintf("%08d:%08d:", @_) x ($bytes / 18 + 1), 0, $bytes); }
sub begin {
    sysopen($file, $path, O_RDWR | O_CREAT) or die "open: $!";
    put($_) for 0 .. $blocks - 1;
}
sub put {
    my $at = shift;
    my $round = ($round[$at] // 0) + 1;
    sysseek($file, $at * $bytes, 0);
    syswrite($file, block($at, $round)) == $bytes or die "write: $!";
    $round[$at] = $round;
    $writes++;
}
sub verify {
    $file->sync or return "sync: $!";
    system("dd", "of=$path", "oflag=nocache", "conv=notrunc,fdatasync", "count=0", "status=none")
        == 0 or return "dd: $?";
    for my $at (0 .. $blocks - 1) {
        sysseek($file, $at * $bytes, 0);
        sysread($file, my $read, $bytes) == $bytes or return "read: $!";
        $read eq block($at, $round[$at])
            or return "$path: block $at has " . substr($read, 0, 18) . ", not round $round[$at]";
    }
    my $all = $writes;
    for my $worker (@workers) {
        syswrite($worker, "v");
        my $said = "";
        while ($said !~ /\n/) { sysread($worker, $said, 256, length($said)) or return "no worker"; }
        $said =~ /^whole (\d+)$/ or return $said;
        $all += $1;
    }
    return "whole $all";
}
for my $number (1 .. 2) {
    socketpair(my $mine, my $its, AF_UNIX, SOCK_STREAM, 0) or die "socketpair: $!";
    if (fork()) { push(@workers, $mine); next; }
    close($_) for $mine, @workers;
    ($blocks, $bytes, $path, @workers) = (16, 1 << 16, "/tmp/blocks$number");
    begin();
    while (1) {
        put(int(rand($blocks))) for 1 .. 4;
        $file->sync or die "sync: $!";
        my $readable = "";
        vec($readable, fileno($its), 1) = 1;
        if (select($readable, undef, undef, 0)) {
            sysread($its, my $asked, 1) or exit;
            syswrite($its, verify() . "\n");
        }
    }
}
begin();
socket(my $server, PF_INET, SOCK_STREAM, 0);
setsockopt($server, SOL_SOCKET, SO_REUSEADDR, 1);
bind($server, sockaddr_in($ENV{PORT}, INADDR_ANY)) or die "bind: $!";
listen($server, 16);
$SIG{PIPE} = "IGNORE";
my %clients;
for (my $turn = 0;; $turn++) {
    put(int(rand($blocks))) for 1 .. 4;
    $file->sync or die "sync: $!" if $turn % 32 == 31;
    my ($readable, $writable) = ("", "");
    vec($readable, fileno($server), 1) = 1;
    for my $client (values %clients) {
        vec($readable, fileno($client->{io}), 1) = 1 if length($client->{out}) < 1 << 18;
        vec($writable, fileno($client->{io}), 1) = 1 if length($client->{out});
    }
    select($readable, $writable, undef, 0);
    if (vec($readable, fileno($server), 1) && accept(my $io, $server)) {
        $io->blocking(0);
        $clients{fileno($io)} = { io => $io, out => "", mode => "" };
    }
    for my $number (keys %clients) {
        my $client = $clients{$number};
        if (vec($readable, $number, 1)) {
            my $read = sysread($client->{io}, my $in, 1 << 16);
            if (!defined($read) && $!{EAGAIN}) { next; }
            if (!$read) { delete $clients{$number}; next; }
            $client->{mode} ||= substr($in, 0, 1, "");
            $client->{out} .= $client->{mode} eq "v" ? verify() . "\n" : $in;
        }
        if (vec($writable, $number, 1)) {
            my $sent = syswrite($client->{io}, $client->{out}) // 0;
            substr($client->{out}, 0, $sent, "");
        }
    }
}
"#;

/// Checkpoints of one VM.
const CHECKPOINTS: usize = 30;

/// Of them, those that a fork of is checkpointed and forked again.
const AGAIN: [usize; 3] = [0, 14, 29];

/// Forks that are verified at once.
const FORKS: usize = 3;

/// Connections that are kept full at once.
const FLOODS: usize = 2;

fn loaded(source: Source) -> StartVm {
    let mut start = counter(new_id());
    start.source = source;
    let process = start.process.as_mut().unwrap();
    process.command = ["perl", "-MSocket", "-MErrno", "-e", APP]
        .map(str::to_owned)
        .to_vec();
    start
}

/// How many blocks the app of a VM has written, which are all on its disk as it remembers.
async fn verified(daemon: &Daemon, vm: VmId) -> u64 {
    let mut said = String::new();
    let asked = async {
        let mut app = daemon.node.connect(vm).await.unwrap();
        app.write_all(b"v?").await.unwrap();
        while !said.ends_with('\n') {
            let mut piece = [0; 256];
            let read = app.read(&mut piece).await.unwrap();
            assert!(read > 0, "the app hung up after {said:?}");
            said.push_str(std::str::from_utf8(&piece[..read]).unwrap());
        }
    };
    timeout(HANG, asked).await.unwrap();
    let writes = said.trim().strip_prefix("whole ");
    let writes = writes.unwrap_or_else(|| unreachable!("{vm}: {said}"));
    writes.parse().unwrap()
}

/// Keeps a connection full in both directions, and compares what comes back.
struct Flood {
    echoed: Arc<AtomicU64>,
    over: Arc<AtomicBool>,
    tasks: [JoinHandle<()>; 2],
}

impl Flood {
    async fn start(daemon: &Daemon, vm: VmId, seed: u8) -> Self {
        let mut stream = daemon.node.connect(vm).await.unwrap();
        stream.write_all(b"e").await.unwrap();
        let (read, write) = TcpStream::into_split(stream);
        let (echoed, over) = (
            Arc::new(AtomicU64::new(0)),
            Arc::new(AtomicBool::new(false)),
        );
        let writer = tokio::spawn(fill(write, seed, Arc::clone(&over)));
        let reader = tokio::spawn(compare(read, seed, Arc::clone(&echoed)));
        Self {
            echoed,
            over,
            tasks: [writer, reader],
        }
    }

    /// Waits until what is on its way now has come back.
    async fn goes_on(&self) {
        let from = self.echoed.load(Ordering::Relaxed);
        let on = async {
            while self.echoed.load(Ordering::Relaxed) < from + (1 << 16) {
                assert!(!self.tasks.iter().any(JoinHandle::is_finished), "it ended");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(HANG, on).await.unwrap();
    }

    async fn end(self) -> u64 {
        self.over.store(true, Ordering::Relaxed);
        for task in self.tasks {
            timeout(HANG, task).await.unwrap().unwrap();
        }
        self.echoed.load(Ordering::Relaxed)
    }
}

/// A byte that tells its place, but for every 251st.
fn byte(seed: u8, at: u64) -> u8 {
    seed.wrapping_add(u8::try_from(at % 251).unwrap())
}

async fn fill(mut to: OwnedWriteHalf, seed: u8, over: Arc<AtomicBool>) {
    let mut at = 0;
    while !over.load(Ordering::Relaxed) {
        let some: Vec<u8> = (at..at + (1 << 16)).map(|at| byte(seed, at)).collect();
        to.write_all(&some).await.unwrap();
        at += 1 << 16;
    }
    to.shutdown().await.unwrap();
}

async fn compare(mut from: OwnedReadHalf, seed: u8, echoed: Arc<AtomicU64>) {
    let mut buffer = vec![0; 1 << 16];
    loop {
        let at = echoed.load(Ordering::Relaxed);
        // The app lets go of a connection once it has read its end.
        let read = from.read(&mut buffer).await.unwrap_or(0);
        if read == 0 {
            return;
        }
        let wrong = (at..)
            .zip(&buffer[..read])
            .find(|(at, is)| byte(seed, *at) != **is);
        assert_eq!(wrong, None, "what came back is not what was sent");
        echoed.store(at + read as u64, Ordering::Relaxed);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn checkpoint_under_disk_and_network_load() {
    let Some((host, machine)) = TestHost::with_agent() else {
        return;
    };
    let daemon = Daemon::open(&host, &machine.image, Arc::new(NoStorePoints)).await;
    let booted = loaded(Source::Boot);
    let first = new_snapshot();
    let booted_vm = booted.vm;
    daemon.ready(booted).await;
    verified(&daemon, booted_vm).await;
    daemon.take(booted_vm, first).await.unwrap();
    verified(&daemon, booted_vm).await;
    daemon.stop(booted_vm).await;

    let start = loaded(Source::Snapshot(first));
    let source = start.vm;
    daemon.ready(start).await;
    let mut floods = Vec::new();
    for seed in 0..FLOODS {
        floods.push(Flood::start(&daemon, source, u8::try_from(seed).unwrap()).await);
    }
    let mut written = verified(&daemon, source).await;
    // With what was surely written before it.
    let mut taken: Vec<(SnapshotId, u64)> = Vec::new();
    for number in 0..CHECKPOINTS {
        for flood in &floods {
            flood.goes_on().await;
        }
        let snapshot = new_snapshot();
        let info = daemon.take(source, snapshot).await.unwrap().info;
        assert_eq!(info.depth, 1, "{info:?}");
        taken.push((snapshot, written));
        if AGAIN.contains(&number) {
            let now = verified(&daemon, source).await;
            assert!(now > written, "{now} blocks, {written} before");
            written = now;
        }
    }
    let mut echoed = 0;
    for flood in floods {
        flood.goes_on().await;
        echoed += flood.end().await;
    }
    println!("{written} blocks were written and {echoed} bytes sent back");
    // It has shown what it was to show until the end, and takes the processor from the others.
    verified(&daemon, source).await;
    daemon.stop(source).await;

    let numbered = taken.into_iter().enumerate();
    let verifying = numbered.map(|(number, (snapshot, least))| {
        let again = AGAIN.contains(&number);
        verify_forks(&daemon, snapshot, least, again)
    });
    let verifying = futures_util::stream::iter(verifying).buffer_unordered(FORKS);
    assert_eq!(verifying.count().await, CHECKPOINTS);
    daemon.close().await;
    nothing_is_left(&host);
}

/// Verifies what a fork of the snapshot has on its disk; with `again`, the fork's fork also.
async fn verify_forks(daemon: &Daemon, snapshot: SnapshotId, least: u64, again: bool) {
    let vm = daemon.ready(loaded(Source::Snapshot(snapshot))).await.vm;
    let inherited = verified(daemon, vm).await;
    assert!(
        inherited > least,
        "{inherited} blocks, {least} before it was taken"
    );
    if again {
        let grandchild = new_snapshot();
        let taken = daemon.take(vm, grandchild).await.unwrap();
        assert_eq!(taken.info.depth, 2, "{taken:?}");
        let vm = daemon.ready(loaded(Source::Snapshot(grandchild))).await.vm;
        assert!(verified(daemon, vm).await >= inherited);
        daemon.stop(vm).await;
    }
    daemon.stop(vm).await;
}

/// A copy of a disk that cannot be written fails the writes of its source, so it is not begun.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_without_room_for_a_copy_refuses_the_checkpoint_and_spares_its_source() {
    let Some((host, machine)) = TestHost::with_agent() else {
        return;
    };
    let disks = host.runtime("../data/scratch");
    fs::create_dir_all(&disks).unwrap();
    let size = Some(c"size=160m");
    mount("tmpfs", &disks, "tmpfs", MountFlags::empty(), size).unwrap();
    let daemon = Daemon::open(&host, &machine.image, Arc::new(NoStorePoints)).await;
    let source = daemon.ready(loaded(Source::Boot)).await.vm;
    verified(&daemon, source).await;
    let filler = File::create(disks.join("filler")).unwrap();
    let room = fstatvfs(&filler).unwrap();
    // What is left is enough to go on with, and not for a copy.
    let left = room.f_bavail * room.f_frsize - (4 << 20);
    fallocate(&filler, FallocateFlags::empty(), 0, left).unwrap();
    for _try in 0..3 {
        let full = daemon.take(source, new_snapshot()).await.unwrap_err();
        assert!(matches!(full, TakeError::NoSpace(_)), "{full:?}");
        verified(&daemon, source).await;
    }
    filler.set_len(0).unwrap();
    let snapshot = new_snapshot();
    daemon.take(source, snapshot).await.unwrap();
    let writes = verified(&daemon, source).await;
    let child = daemon.ready(loaded(Source::Snapshot(snapshot))).await.vm;
    assert!(verified(&daemon, child).await > 0 && writes > 0);
    for vm in [source, child] {
        daemon.stop(vm).await;
    }
    daemon.close().await;
    drop(filler);
    unmount(&disks, UnmountFlags::DETACH).unwrap();
    assert_eq!(host.left(), Vec::<String>::new());
}
