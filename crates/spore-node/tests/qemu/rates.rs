//! How much a VM has of its disks and its network in a second.

use core::num::NonZeroU64;
use core::time::Duration;

use spore_node::hypervisor::fork::Afterwards;
use spore_wire::guest::{Reply, Request};
use spore_wire::launch::Rates;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::{Instant, sleep};

use crate::agent::look;
use crate::driver::is_kvm;
use crate::fork::{Running, boot, capture, fork};
use crate::host::{HANG, TestHost};
use crate::thaw::{app, until};

const MIB: u64 = 1 << 20;

/// A second's worth, and how many seconds' worth is asked for.
const PER_S: u64 = 2 * MIB;
const SECONDS: u64 = 4;

/// What may be had at once comes at once, and the rest in its time; who asks last need not wait for
/// what it owes.
const LEAST: Duration = Duration::from_millis(SECONDS * 1000 - 1500);

/// Writes so much to its disk, in small requests, and waits until it is there.
const WRITE: &str =
    "dd if=/dev/zero of=/var/tmp/much bs=256k count=32 oflag=direct 2>&1 | grep -c records";

/// Takes as many bytes as it is told, and gives as many back.
const SERVER: &str = r#"
    use Socket;
    socket(my $server, PF_INET, SOCK_STREAM, 0);
    setsockopt($server, SOL_SOCKET, SO_REUSEADDR, 1);
    bind($server, sockaddr_in(8000, INADDR_ANY)) or die;
    listen($server, 4);
    while (accept(my $client, $server)) {
        my ($bytes, $got) = (8 << 20, 0);
        while ($got < $bytes) {
            my $read = sysread($client, my $in, 1 << 16) or last;
            $got += $read;
        }
        syswrite($client, "t") if $got == $bytes;
        for (my $sent = 0; $got == $bytes && $sent < $bytes;) {
            $sent += syswrite($client, "x" x (1 << 16)) or last;
        }
        close($client);
    }
"#;

/// How long it takes the VM to write, to be sent to, and to send.
async fn took(of: &mut Running) -> [Duration; 3] {
    let begun = Instant::now();
    assert_eq!(of.agent.sh(WRITE).await, "2");
    let written = begun.elapsed();
    let mut outside = until(async || of.held.connect(8000).await.ok()).await;
    let bytes = usize::try_from(PER_S * SECONDS).unwrap();
    let (mut to, mut back) = (0, 0);
    let exchange = async {
        let begun = Instant::now();
        while to < bytes {
            to += outside.write(&vec![b'y'; bytes - to]).await.unwrap();
        }
        assert_eq!(outside.read_u8().await.unwrap(), b't');
        let received = begun.elapsed();
        let mut part = vec![0; 1 << 16];
        while back < bytes {
            let read = outside.read(&mut part).await.unwrap();
            assert!(read > 0, "it ended after {back} of {bytes} bytes");
            back += read;
        }
        (received, begun.elapsed() - received)
    };
    let ended = tokio::select! {
        done = exchange => Ok(done),
        () = sleep(HANG) => Err(None),
        exit = of.held.exited() => Err(Some(exit)),
    };
    let (received, sent) = match ended {
        Ok(done) => done,
        Err(exit) => {
            println!("{:#?}", of.held.console_tail().await);
            look();
            unreachable!("{exit:?} after {to} bytes there and {back} back, of {bytes}");
        }
    };
    [written, received, sent]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_and_its_forks_have_so_much_of_disk_and_network_in_a_second() {
    if !is_kvm() {
        return println!("SKIPPED: QEMU's VMs have no limits of these");
    }
    let Some((mut host, machine)) = TestHost::with_agent() else {
        return;
    };
    let driver = host.driver().await;
    let mut free = boot(&driver, &machine).await;
    free.held.open_network().await.unwrap();
    let start = Request::StartApp(app(&["perl", "-e", SERVER]));
    assert_eq!(free.agent.ask(start).await, Ok(Reply::Done));
    println!("without limits: {:?}", took(&mut free).await);
    let from = capture(&mut free, Afterwards::Ends, None).await.source;
    driver.release(free.vm).await.unwrap();
    driver.close().unwrap();

    // What was saved knows no limit: they are those of whoever starts a VM.
    let rate = NonZeroU64::new(PER_S);
    host.rates = Rates {
        disk_bytes: rate,
        disk_operations: None,
        network_bytes: rate,
    };
    let driver = host.driver().await;
    let mut limited = fork(&driver, &machine, &from, free.vm).await;
    limited.held.open_network().await.unwrap();
    let took = took(&mut limited).await;
    println!("with: {took:?}");
    for took in took {
        assert!(took >= LEAST, "{took:?}");
    }
    driver.release(limited.vm).await.unwrap();
    driver.close().unwrap();
    assert_eq!(host.left(), Vec::<String>::new());
}
