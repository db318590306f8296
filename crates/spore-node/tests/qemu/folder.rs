//! Whose folder a VM finds at `/app`, booted or forked.

use std::fs::File;
use std::io::Cursor;
use std::path::PathBuf;

use backhand::compression::Compressor;
use backhand::{FilesystemCompressor, FilesystemWriter, NodeHeader};
use spore_node::hypervisor::fork::Afterwards;

use crate::fork::{Running, boot_only, capture, fork_only};
use crate::host::TestHost;

/// An app's folder as an image: a file `name` that says `name`, and `fill` of so many bytes.
pub(crate) fn image(host: &TestHost, name: &str, fill: usize) -> PathBuf {
    let mut writer = FilesystemWriter::default();
    writer.set_compressor(FilesystemCompressor::new(Compressor::Zstd, None).unwrap());
    let header = NodeHeader::new(0o644, 1000, 1000, 1);
    let text = Cursor::new(format!("{name}\n").into_bytes());
    writer.push_file(text, "name", header).unwrap();
    // Random, so that the image is as large as it says.
    let mut bytes = vec![0; fill];
    getrandom::fill(&mut bytes).unwrap();
    writer
        .push_file(Cursor::new(bytes), "fill", header)
        .unwrap();
    let path = host.runtime(&format!("folder-{name}"));
    writer.write(&mut File::create(&path).unwrap()).unwrap();
    path
}

/// What a VM says of its folder: the disk's size, what the file says, how much can be read, and
/// what else there is.
async fn look(vm: &mut Running) -> String {
    let script = "cat /sys/block/vdb/size; cat /app/name; cat /app/fill | wc -c; ls -A /app";
    vm.agent.sh(script).await.replace('\n', " ")
}

fn sectors(path: &PathBuf) -> u64 {
    std::fs::metadata(path).unwrap().len() / 512
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fork_of_a_vm_without_a_folder_shows_its_own() {
    let Some((host, mut machine)) = TestHost::with_agent() else {
        return;
    };
    let driver = host.driver().await;
    let mut source = boot_only(&driver, &machine).await;
    source.agent.thaw(source.vm, "source").await.unwrap();
    assert_eq!(
        source.agent.sh("ls -A /app; cat /sys/block/vdb/size").await,
        "8"
    );
    let taken = capture(&mut source, Afterwards::Ends, None).await;
    driver.release(source.vm).await.unwrap();

    for (name, fill) in [("large", 3 << 20), ("small", 5000)] {
        let folder = image(&host, name, fill);
        machine.folder = Some(folder.clone());
        let mut fork = fork_only(&driver, &machine, &taken.source, source.vm).await;
        let thawed = fork.agent.thaw_with(fork.vm, name, Some(name)).await;
        println!("{thawed:?}");
        thawed.unwrap();
        let expected = format!("{} {name} {fill} fill name", sectors(&folder));
        assert_eq!(look(&mut fork).await, expected);
        let written = "cd /app && stat -c %u . && echo more > more && cat more name";
        assert_eq!(fork.agent.sh(written).await, format!("1000\nmore\n{name}"));
        driver.release(fork.vm).await.unwrap();
    }
    assert_eq!(host.left(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fork_of_a_vm_with_a_folder_keeps_that_one_or_shows_nothing_of_it() {
    let Some((host, mut machine)) = TestHost::with_agent() else {
        return;
    };
    let driver = host.driver().await;
    let (of_source, of_fork) = (image(&host, "theirs", 9000), image(&host, "mine", 2 << 20));
    machine.folder = Some(of_source.clone());
    let mut source = boot_only(&driver, &machine).await;
    let thawed = source.agent.thaw_with(source.vm, "source", Some("theirs"));
    println!("{:?}", thawed.await.unwrap());
    source
        .agent
        .sh("echo 1 > /app/written; cat /app/fill > /dev/null")
        .await;
    let as_left = format!("{} theirs 9000 fill name written", sectors(&of_source));
    assert_eq!(look(&mut source).await, as_left);
    let taken = capture(&mut source, Afterwards::GoesOn, None).await;

    let mut same = fork_only(&driver, &machine, &taken.source, source.vm).await;
    let thawed = same.agent.thaw_with(same.vm, "same", Some("theirs"));
    thawed.await.unwrap();
    assert_eq!(look(&mut same).await, as_left);
    driver.release(same.vm).await.unwrap();

    machine.folder = Some(of_fork.clone());
    let mut other = fork_only(&driver, &machine, &taken.source, source.vm).await;
    let thawed = other.agent.thaw_with(other.vm, "other", Some("mine"));
    thawed.await.unwrap();
    let expected = format!("{} mine {} fill name", sectors(&of_fork), 2 << 20);
    assert_eq!(look(&mut other).await, expected);
    driver.release(other.vm).await.unwrap();

    machine.folder = None;
    let mut none = fork_only(&driver, &machine, &taken.source, source.vm).await;
    none.agent.thaw(none.vm, "none").await.unwrap();
    assert_eq!(
        none.agent.sh("ls -A /app; grep -c /app /proc/mounts").await,
        "0"
    );
    driver.release(none.vm).await.unwrap();

    assert_eq!(look(&mut source).await, as_left);
    driver.release(source.vm).await.unwrap();
    assert_eq!(host.left(), Vec::<String>::new());
}
