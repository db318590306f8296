//! Images through the real, confined worker. Needs root, like the daemon; says SKIPPED without it.

#![cfg(test)]

mod image {
    use std::ffi::OsString;
    use std::fs;
    use std::io::{self, Read};
    use std::path::PathBuf;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::Duration;

    use spore_node::cgroup::Cgroups;
    use spore_node::image::debian::DebianBuilder;
    use spore_node::image::job::{Ended, Job, UPLOAD_LIMITS};
    use spore_node::image::pack::PackRequest;
    use spore_node::image::packer::{BuildError, Packer};
    use spore_node::image::store::{Filing, ImageStore, StoreError};
    use spore_node::image::workshop::{Bounds, LaneBounds, WorkError, Workshop, WorkshopConfig};
    use spore_wire::node::{ImageInfo, ImageKind};
    use tokio::io::{AsyncRead, AsyncWriteExt as _, duplex};

    const WORKER_UID: u32 = 214_000;

    /// Of the worker that a test looks at while others run.
    const LOOKED_AT_UID: u32 = 214_001;

    const FILING: Filing = Filing {
        at_s: 42,
        bytes_max: u64::MAX,
    };

    /// A store, and cgroups that are gone with the test.
    struct Rig {
        dir: tempfile::TempDir,
        store: ImageStore,
        cgroups: Cgroups,
        packer: Packer,
    }

    impl Rig {
        fn new() -> Option<Self> {
            static NEXT: AtomicU32 = AtomicU32::new(0);
            if !rustix::process::geteuid().is_root() {
                println!("SKIPPED: the image worker is confined by root");
                return None;
            }
            let dir = tempfile::tempdir().unwrap();
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let parent = format!("spore-image-test-{}-{number}", std::process::id());
            Some(Self {
                store: ImageStore::open(dir.path()).unwrap(),
                cgroups: Cgroups::open(&parent).unwrap(),
                packer: Packer {
                    program: PathBuf::from(env!("CARGO_BIN_EXE_spore-node-image-pack")),
                    arguments: Vec::<OsString>::new(),
                    uid: Some(WORKER_UID),
                },
                dir,
            })
        }

        fn pack(
            &self,
            request: PackRequest,
            archive: &mut dyn Read,
            filing: Filing,
        ) -> Result<ImageInfo, BuildError> {
            let job = Job::begin(&self.cgroups, &UPLOAD_LIMITS).unwrap();
            self.packer
                .pack(&self.store, request, archive, filing, &job)
        }

        fn workshop(&self, idle: Duration, time: Duration) -> Workshop {
            let lane = LaneBounds {
                at_once: 1,
                waiting: 0,
                patience: Duration::from_secs(60),
                time,
            };
            Workshop::new(WorkshopConfig {
                images: self.store.clone(),
                packer: self.packer.clone(),
                builder: DebianBuilder {
                    user: "nobody".to_owned(),
                    scratch: self.dir.path().to_owned(),
                    owner: self.dir.path().to_owned(),
                },
                cgroups: self.cgroups.clone(),
                bounds: Bounds {
                    uploads: lane,
                    builds: lane,
                    idle,
                },
            })
        }

        /// Nothing of any work: no file, no image, no cgroup, hence no process.
        fn assert_nothing_left(&self) {
            assert!(self.store.list().unwrap().is_empty());
            let staged = fs::read_dir(self.dir.path().join("staging")).unwrap();
            assert_eq!(staged.count(), 0);
            assert_eq!(self.cgroups.list().unwrap(), [""; 0]);
        }
    }

    impl Drop for Rig {
        fn drop(&mut self) {
            if let Err(error) = self.cgroups.remove_parent() {
                assert!(std::thread::panicking(), "{error}");
            }
        }
    }

    fn archive() -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(5);
        header.set_cksum();
        builder
            .append_data(&mut header, "hello", b"hello".as_slice())
            .unwrap();
        builder.into_inner().unwrap()
    }

    #[test]
    fn a_packed_upload_is_in_the_store_under_its_hash() {
        let Some(rig) = Rig::new() else { return };
        let request = PackRequest::of(ImageKind::Folder);
        let info = rig
            .pack(request, &mut archive().as_slice(), FILING)
            .unwrap();
        assert_eq!(rig.store.verify(info.id).unwrap(), info);
        assert_eq!(
            (info.entries, info.made_at_s, info.kind),
            (2, 42, ImageKind::Folder)
        );
        let later = Filing { at_s: 43, ..FILING };
        let again = rig.pack(request, &mut archive().as_slice(), later);
        assert_eq!(again.unwrap(), info);
        rig.store.remove(info.id).unwrap();
        rig.assert_nothing_left();
    }

    #[test]
    fn a_refused_upload_leaves_nothing_and_says_why() {
        let Some(rig) = Rig::new() else { return };
        let request = PackRequest::of(ImageKind::Folder);
        let refused = rig
            .pack(request, &mut [0x42; 4096].as_slice(), FILING)
            .unwrap_err();
        assert!(
            matches!(&refused, BuildError::Refused(why) if why.contains("tar")),
            "{refused}"
        );
        let small = Filing {
            bytes_max: 10,
            ..FILING
        };
        let refused = rig.pack(request, &mut archive().as_slice(), small);
        let refused = refused.unwrap_err();
        assert!(
            matches!(
                refused,
                BuildError::Store(StoreError::OverBudget { max: 10, .. })
            ),
            "{refused}"
        );
        rig.assert_nothing_left();
    }

    #[test]
    fn an_upload_that_breaks_off_is_never_packed() {
        struct Broken(Vec<u8>);
        impl Read for Broken {
            fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
                if self.0.is_empty() {
                    return Err(io::ErrorKind::ConnectionReset.into());
                }
                let count = self.0.len().min(buffer.len());
                buffer[..count].copy_from_slice(&self.0[..count]);
                self.0.drain(..count);
                Ok(count)
            }
        }
        let Some(rig) = Rig::new() else { return };
        // Whole as an archive: only the error tells that more was meant to come.
        let mut broken = Broken(archive());
        let request = PackRequest::of(ImageKind::Folder);
        let refused = rig.pack(request, &mut broken, FILING).unwrap_err();
        assert!(matches!(refused, BuildError::Source(_)), "{refused}");
        rig.assert_nothing_left();
    }

    #[test]
    fn the_worker_that_reads_an_archive_has_nothing_else() {
        /// Gives the archive's first bytes, then looks at who reads them.
        struct Looking {
            archive: io::Cursor<Vec<u8>>,
            seen: Option<String>,
        }
        impl Read for Looking {
            fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
                // The worker waits for the rest of the first header while it is looked at.
                if self.archive.position() > 0 && self.seen.is_none() {
                    self.seen = Some(look(LOOKED_AT_UID));
                }
                let most = buffer.len().min(100);
                let count = self.archive.read(&mut buffer[..most])?;
                Ok(count)
            }
        }
        let Some(mut rig) = Rig::new() else { return };
        rig.packer.uid = Some(LOOKED_AT_UID);
        let mut looking = Looking {
            archive: io::Cursor::new(archive()),
            seen: None,
        };
        rig.pack(PackRequest::of(ImageKind::Folder), &mut looking, FILING)
            .unwrap();
        let seen = looking.seen.expect("the worker was looked at");
        for line in [
            "CapEff:\t0000000000000000",
            "CapBnd:\t0000000000000000",
            "NoNewPrivs:\t1",
            "Seccomp:\t2",
            "Uid:\t214001\t214001\t214001\t214001",
        ] {
            assert!(seen.contains(line), "{line} is not in {seen}");
        }
        assert!(seen.contains("root entries: 0"), "{seen}");
        assert!(seen.contains("descriptors: 0 1 2"), "{seen}");
        assert!(seen.contains("network: its own"), "{seen}");
        let limits = [
            ("Max processes", "0"),
            ("Max address space", "2147483648"),
            ("Max cpu time", "3600"),
        ];
        for (name, most) in limits {
            let line = seen.lines().find(|line| line.starts_with(name)).unwrap();
            assert_eq!(line[name.len()..].split_whitespace().next(), Some(most));
        }
        assert!(seen.contains("oom score: 800"), "{seen}");
        let cgroups = seen.lines().filter(|line| line.contains("/image-")).count();
        assert!(cgroups >= 1, "{seen}");
    }

    /// A body that gives the beginning of an archive, then what `more` writes.
    fn body<F: Future<Output = ()> + Send + 'static>(
        more: impl FnOnce(tokio::io::DuplexStream) -> F,
    ) -> Box<dyn AsyncRead + Send + Unpin> {
        let (to, from) = duplex(4096);
        tokio::spawn(more(to));
        Box::new(from)
    }

    /// A byte now and then, for ever.
    async fn drip(mut to: tokio::io::DuplexStream) {
        while to.write_all(b"x").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    const LONG: Duration = Duration::from_secs(60);

    const SHORT: Duration = Duration::from_millis(300);

    #[tokio::test]
    async fn a_silent_upload_is_given_up() {
        let Some(rig) = Rig::new() else { return };
        let silent = body(|to| async move {
            std::future::pending::<()>().await;
            drop(to);
        });
        let shop = rig.workshop(SHORT, LONG);
        let error = shop.import(silent, ImageKind::Folder, FILING).await;
        let error = error.unwrap_err();
        assert!(
            matches!(&error, WorkError::Build(BuildError::Source(cause))
                if cause.kind() == io::ErrorKind::TimedOut),
            "{error}"
        );
        rig.assert_nothing_left();
    }

    #[tokio::test]
    async fn an_upload_that_takes_too_long_is_ended_with_its_worker() {
        let Some(rig) = Rig::new() else { return };
        let shop = rig.workshop(LONG, SHORT);
        let error = shop.import(body(drip), ImageKind::Folder, FILING).await;
        let error = error.unwrap_err();
        assert!(
            matches!(
                error,
                WorkError::Build(BuildError::Ended(Ended::Timeout(_)))
            ),
            "{error}"
        );
        rig.assert_nothing_left();
        // Its place is free again; whether so little time is enough is the machine's affair.
        let whole = Box::new(io::Cursor::new(archive()));
        let next = shop.import(whole, ImageKind::Folder, FILING).await;
        assert!(!matches!(next, Err(WorkError::Busy { .. })), "{next:?}");
    }

    #[tokio::test]
    async fn work_ends_when_its_caller_leaves_and_its_place_is_taken_until_then() {
        let Some(rig) = Rig::new() else { return };
        let shop = rig.workshop(LONG, LONG);
        let mut first = Box::pin(shop.import(body(drip), ImageKind::Folder, FILING));
        let works = async {
            while rig.cgroups.list().unwrap().is_empty() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::select! {
            () = works => {}
            early = &mut first => panic!("it ended by itself: {early:?}"),
        }
        let second = shop.import(body(drip), ImageKind::Folder, FILING).await;
        let second = second.unwrap_err();
        assert!(matches!(second, WorkError::Busy { .. }), "{second}");
        drop(first);
        for _try in 0..6000 {
            if rig.cgroups.list().unwrap().is_empty() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        rig.assert_nothing_left();
    }

    /// What `/proc` says of the worker: status, its root, its descriptors and its network.
    fn look(uid: u32) -> String {
        let own = std::process::id().to_string();
        for _try in 0..6000 {
            for entry in fs::read_dir("/proc").unwrap().flatten() {
                let path = entry.path();
                let Ok(status) = fs::read_to_string(path.join("status")) else {
                    continue;
                };
                let is_child = status.contains(&format!("PPid:\t{own}\n"));
                if !is_child || !status.contains(&format!("Uid:\t{uid}\t")) {
                    continue;
                }
                if !status.contains("Seccomp:\t2") {
                    continue;
                }
                let root = fs::read_dir(path.join("root")).map_or(99, Iterator::count);
                let fds: Vec<String> = fs::read_dir(path.join("fd"))
                    .unwrap()
                    .flatten()
                    .map(|fd| fd.file_name().to_string_lossy().into_owned())
                    .collect();
                let mut fds: Vec<u32> = fds.iter().filter_map(|fd| fd.parse().ok()).collect();
                fds.sort_unstable();
                let network = fs::read_link(path.join("ns/net")).unwrap();
                let own_network = fs::read_link("/proc/self/ns/net").unwrap();
                let links = if network == own_network {
                    "the host's"
                } else {
                    "its own"
                };
                let fds: Vec<String> = fds.iter().map(u32::to_string).collect();
                let read = |name| fs::read_to_string(path.join(name)).unwrap();
                return format!(
                    "{status}root entries: {root}\ndescriptors: {}\nnetwork: {links}\n{}{}\
                     oom score: {}",
                    fds.join(" "),
                    read("limits"),
                    read("cgroup"),
                    read("oom_score_adj"),
                );
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        String::new()
    }
}
