//! Images through the real, confined worker. Needs root, like the daemon; says SKIPPED without it.

#![cfg(test)]

mod image {
    use std::ffi::OsString;
    use std::fs;
    use std::io::{self, Read};
    use std::path::PathBuf;
    use std::time::Duration;

    use spore_node::image::pack::PackRequest;
    use spore_node::image::packer::{BuildError, Packer};
    use spore_node::image::store::ImageStore;
    use spore_wire::node::ImageKind;

    const WORKER_UID: u32 = 214_000;

    /// Of the worker that a test looks at while others run.
    const LOOKED_AT_UID: u32 = 214_001;

    fn packer() -> Option<Packer> {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED: the image worker is confined by root");
            return None;
        }
        Some(Packer {
            program: PathBuf::from(env!("CARGO_BIN_EXE_spore-node-image-pack")),
            arguments: Vec::<OsString>::new(),
            uid: Some(WORKER_UID),
        })
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

    fn staged_files(store: &std::path::Path) -> usize {
        fs::read_dir(store.join("staging")).unwrap().count()
    }

    #[test]
    fn a_packed_upload_is_in_the_store_under_its_hash() {
        let Some(packer) = packer() else { return };
        let dir = tempfile::tempdir().unwrap();
        let store = ImageStore::open(dir.path()).unwrap();
        let request = PackRequest::of(ImageKind::Folder);
        let info = packer
            .pack(&store, request, &mut archive().as_slice(), 42)
            .unwrap();
        assert_eq!(store.verify(info.id).unwrap(), info);
        assert_eq!(
            (info.entries, info.made_at_s, info.kind),
            (2, 42, ImageKind::Folder)
        );
        let again = packer
            .pack(&store, request, &mut archive().as_slice(), 43)
            .unwrap();
        assert_eq!(again, info);
        assert_eq!(staged_files(dir.path()), 0);
    }

    #[test]
    fn a_refused_upload_leaves_nothing_and_says_why() {
        let Some(packer) = packer() else { return };
        let dir = tempfile::tempdir().unwrap();
        let store = ImageStore::open(dir.path()).unwrap();
        let request = PackRequest::of(ImageKind::Folder);
        let refused = packer
            .pack(&store, request, &mut [0x42; 4096].as_slice(), 1)
            .unwrap_err();
        assert!(
            matches!(&refused, BuildError::Refused(why) if why.contains("tar")),
            "{refused}"
        );
        assert!(store.list().unwrap().is_empty());
        assert_eq!(staged_files(dir.path()), 0);
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
        let Some(packer) = packer() else { return };
        let dir = tempfile::tempdir().unwrap();
        let store = ImageStore::open(dir.path()).unwrap();
        // Whole as an archive: only the error tells that more was meant to come.
        let mut broken = Broken(archive());
        let request = PackRequest::of(ImageKind::Folder);
        let refused = packer.pack(&store, request, &mut broken, 1).unwrap_err();
        assert!(matches!(refused, BuildError::Source(_)), "{refused}");
        assert!(store.list().unwrap().is_empty());
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
        let Some(packer) = packer() else { return };
        let packer = Packer {
            uid: Some(LOOKED_AT_UID),
            ..packer
        };
        let dir = tempfile::tempdir().unwrap();
        let store = ImageStore::open(dir.path()).unwrap();
        let mut looking = Looking {
            archive: io::Cursor::new(archive()),
            seen: None,
        };
        packer
            .pack(&store, PackRequest::of(ImageKind::Folder), &mut looking, 1)
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
    }

    /// What `/proc` says of the worker: status, its root, its descriptors and its network.
    fn look(uid: u32) -> String {
        let own = std::process::id().to_string();
        for _try in 0..500 {
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
                return format!(
                    "{status}root entries: {root}\ndescriptors: {}\nnetwork: {links}\n",
                    fds.join(" ")
                );
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        String::new()
    }
}
