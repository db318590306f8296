//! What a later daemon must know of the VMs that this one leaves: one file per VM.
//!
//! Written by the VM's actor before the effects that depend on it, read at start-up by
//! re-adoption. `<runtime>/vms/VMID/journal.json`, written beside and renamed over, so that a
//! reader sees the old or the new record and never a half. There is no fsync: the folder is on a
//! tmpfs and VMs die with the host, so nothing that a power cut could lose is worth keeping.
//!
//! Never holds a secret: a re-adopted VM goes on with what its guest has.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use spore_wire::gateway::Phase;
use spore_wire::id::{SnapshotId, VmId};
use spore_wire::node::{StartVm, TemplateMiss};
use thiserror::Error;

use crate::hypervisor::{Identity, Machine, Prepared};
use crate::vm::state::Milestone;

/// The version of the record. A record of a generation that is not served is released, not guessed
/// at. 2 added where a VM begins, and the milestones of forks.
pub const JOURNAL_GENERATION: u32 = 2;

/// The oldest that is still read: every VM of it was booted.
const JOURNAL_GENERATION_OLDEST: u32 = 1;

/// The most bytes of one record: command, environment and grants have limits far below.
pub const JOURNAL_BYTES_MAX: u64 = 1024 * 1024;

/// What is known of one VM.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// [`JOURNAL_GENERATION`].
    pub generation: u32,
    /// Which driver made it.
    pub hypervisor: String,
    /// What was asked, without its secrets.
    pub start: StartVm,
    /// Whether there were secrets: they must be told again before the app is started or its
    /// output masked.
    pub secrets: SecretsKept,
    /// Whether what it was forked from holds some.
    #[serde(default)]
    pub inherited: SecretsKept,
    /// What the suspended snapshot continued that it went on from: its own next one does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<SnapshotId>,
    /// Whether its tenant may have been heard of, of one that began where another stood.
    #[serde(default)]
    pub ran: bool,
    /// The snapshot that it ends for, if it is whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sealing: Option<SnapshotId>,
    /// What it is made of.
    pub machine: Machine,
    /// How far it got.
    pub milestone: Milestone,
    /// What the driver made.
    pub prepared: Option<Prepared>,
    /// Which process hosts it.
    pub identity: Option<Identity>,
    /// What took how long so far.
    pub phases: Vec<Phase>,
    /// Why it did not begin from a template, if it could have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub missed: Option<TemplateMiss>,
}

/// Whether a VM was started with secrets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SecretsKept {
    /// It had none.
    #[default]
    None,
    /// It had some, which are not here.
    Elsewhere,
}

impl Record {
    /// A record of a VM for which nothing was done yet; the secrets of `start` are taken out.
    #[must_use]
    pub fn new(hypervisor: &str, start: &StartVm, machine: Machine) -> Self {
        let mut start = start.clone();
        start.keys.clear();
        let mut secrets = SecretsKept::None;
        if let Some(process) = &mut start.process {
            if !process.secret_environment.is_empty() || !process.secret_files.is_empty() {
                secrets = SecretsKept::Elsewhere;
            }
            process.secret_environment.clear();
            process.secret_files.clear();
        }
        Self {
            generation: JOURNAL_GENERATION,
            hypervisor: hypervisor.to_owned(),
            start,
            secrets,
            inherited: SecretsKept::None,
            base: None,
            ran: false,
            sealing: None,
            machine,
            milestone: Milestone::Preparing,
            prepared: None,
            identity: None,
            phases: Vec::new(),
            missed: None,
        }
    }
}

/// Why the journal cannot be used.
#[derive(Debug, Error)]
pub enum JournalError {
    /// A folder or file cannot be written or removed.
    #[error("cannot write the journal {path}: check the runtime folder's space and owner")]
    Write {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The folder cannot be read.
    #[error("cannot read the journals in {path}: check the runtime folder's owner")]
    Folder {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A record does not encode: a bug.
    #[error("cannot encode the journal of {vm}")]
    Encode {
        /// Whose.
        vm: VmId,
        /// What the encoder said.
        source: serde_json::Error,
    },
}

/// Why a record is not usable: its VM is released.
#[derive(Debug, Error)]
pub enum RecordError {
    /// It cannot be read.
    #[error("it cannot be read")]
    Read(#[source] io::Error),
    /// It is no record.
    #[error("it is not a journal record")]
    Decode(#[source] serde_json::Error),
    /// It is of another version.
    #[error(
        "it is of generation {0}; {JOURNAL_GENERATION_OLDEST} to {JOURNAL_GENERATION} are served"
    )]
    Generation(u32),
    /// It is in another VM's folder.
    #[error("it names {0}, whose folder this is not")]
    Foreign(VmId),
    /// Another driver made it.
    #[error("the driver `{0}` made it")]
    Hypervisor(String),
    /// There is none: the daemon died before its first write.
    #[error("there is none")]
    Missing,
}

/// The journals of one runtime folder.
#[derive(Clone, Debug)]
pub struct Journal {
    folder: PathBuf,
    hypervisor: String,
}

impl Journal {
    /// The journals below `runtime`, for VMs of this driver. Makes the folder.
    ///
    /// # Errors
    /// [`JournalError::Write`].
    pub fn open(runtime: &Path, hypervisor: &str) -> Result<Self, JournalError> {
        let folder = runtime.join("vms");
        let made = fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&folder);
        match made {
            Ok(()) => Ok(Self {
                folder,
                hypervisor: hypervisor.to_owned(),
            }),
            Err(source) => Err(JournalError::Write {
                path: folder,
                source,
            }),
        }
    }

    /// Replaces the record of its VM.
    ///
    /// # Errors
    /// [`JournalError`].
    pub fn write(&self, record: &Record) -> Result<(), JournalError> {
        let vm = record.start.vm;
        let bytes =
            serde_json::to_vec(record).map_err(|source| JournalError::Encode { vm, source })?;
        let path = self.path(vm);
        self.replace(vm, &path, &bytes)
            .map_err(|source| JournalError::Write { path, source })
    }

    fn replace(&self, vm: VmId, path: &Path, bytes: &[u8]) -> io::Result<()> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(self.folder.join(vm.to_string()))?;
        let beside = path.with_extension("new");
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&beside)?;
        file.write_all(bytes)?;
        fs::rename(&beside, path)
    }

    /// Forgets a VM. Idempotent. The folder goes when nothing else is in it: what a driver keeps
    /// there is the driver's to release.
    ///
    /// # Errors
    /// [`JournalError::Write`].
    pub fn remove(&self, vm: VmId) -> Result<(), JournalError> {
        let path = self.path(vm);
        let folder = self.folder.join(vm.to_string());
        let gone = [
            fs::remove_file(path.with_extension("new")),
            fs::remove_file(&path),
            fs::remove_dir(&folder),
        ];
        for result in gone {
            match result {
                Ok(()) => {}
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty
                    ) => {}
                Err(source) => return Err(JournalError::Write { path, source }),
            }
        }
        Ok(())
    }

    /// Every VM that has a folder, with its record or why there is none. A folder that no VM can
    /// have is left for the driver's sweep.
    ///
    /// # Errors
    /// [`JournalError::Folder`].
    pub fn read_all(&self) -> Result<BTreeMap<VmId, Result<Record, RecordError>>, JournalError> {
        let folder = |source| JournalError::Folder {
            path: self.folder.clone(),
            source,
        };
        let mut records = BTreeMap::new();
        for entry in fs::read_dir(&self.folder).map_err(folder)? {
            let name = entry.map_err(folder)?.file_name();
            if let Some(vm) = name.to_str().and_then(|name| name.parse::<VmId>().ok()) {
                records.insert(vm, self.read(vm));
            }
        }
        Ok(records)
    }

    fn read(&self, vm: VmId) -> Result<Record, RecordError> {
        /// What every generation of the record has.
        #[derive(Deserialize)]
        struct Header {
            generation: u32,
        }
        let file = match fs::File::open(self.path(vm)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(RecordError::Missing);
            }
            Err(error) => return Err(RecordError::Read(error)),
        };
        let mut bytes = Vec::new();
        file.take(JOURNAL_BYTES_MAX)
            .read_to_end(&mut bytes)
            .map_err(RecordError::Read)?;
        let header: Header = serde_json::from_slice(&bytes).map_err(RecordError::Decode)?;
        if !(JOURNAL_GENERATION_OLDEST..=JOURNAL_GENERATION).contains(&header.generation) {
            return Err(RecordError::Generation(header.generation));
        }
        let mut record: Record = serde_json::from_slice(&bytes).map_err(RecordError::Decode)?;
        if record.start.vm != vm {
            return Err(RecordError::Foreign(record.start.vm));
        }
        if record.hypervisor != self.hypervisor {
            return Err(RecordError::Hypervisor(record.hypervisor));
        }
        // It is written anew with what this generation has.
        record.generation = JOURNAL_GENERATION;
        Ok(record)
    }

    fn path(&self, vm: VmId) -> PathBuf {
        self.folder.join(vm.to_string()).join("journal.json")
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;

    use spore_wire::guest::Readiness;
    use spore_wire::id::{ImageId, SnapshotId, VmId};
    use spore_wire::node::{Owner, Process, Purpose, Resources, Source, StartVm};
    use spore_wire::secret::SecretBytes;

    use super::{JOURNAL_GENERATION, Journal, Record, RecordError, SecretsKept};
    use crate::hypervisor::Machine;
    use crate::vm::state::Milestone;

    fn start(vm: VmId) -> StartVm {
        StartVm {
            vm,
            owner: Owner {
                account: "me".to_owned(),
                app: "notes".to_owned(),
                release: 3,
                secrets_version: 5,
            },
            image: ImageId::from_hash([1; 32]),
            folder: None,
            resources: Resources {
                cpus: 1,
                memory_mib: 128,
                disk_mib: 64,
            },
            process: Some(Process {
                command: vec!["/bin/app".to_owned()],
                environment: Vec::new(),
                secret_environment: vec![(
                    "KEY".to_owned(),
                    SecretBytes::new(b"canary-in-env".to_vec()),
                )],
                secret_files: vec![(
                    "key".to_owned(),
                    SecretBytes::new(b"canary-in-file".to_vec()),
                )],
                user: None,
                port: 8000,
                ready: Readiness::Port,
                ready_timeout_ms: 1000,
                stop_grace_ms: 1000,
                has_hooks: false,
            }),
            egress: Vec::new(),
            source: Source::Boot,
            purpose: Purpose::Serve,
            keys: vec![(
                SnapshotId::from_bytes([9; 16]),
                SecretBytes::new(b"canary-in-key".to_vec()),
            )],
            trace: None,
        }
    }

    fn record(vm: VmId) -> Record {
        let machine = Machine {
            resources: start(vm).resources,
            image: PathBuf::from("/image"),
            folder: None,
            egress: Vec::new(),
        };
        Record::new("sim", &start(vm), machine)
    }

    #[test]
    fn a_record_reads_back_without_its_secrets() {
        let runtime = tempfile::tempdir().unwrap();
        let journal = Journal::open(runtime.path(), "sim").unwrap();
        let vm = VmId::random().unwrap();
        let mut wanted = record(vm);
        wanted.milestone = Milestone::Open;
        journal.write(&wanted).unwrap();
        let text = fs::read_to_string(journal.path(vm)).unwrap();
        assert!(
            !text.contains("canary") && !text.contains("Y2FuYXJ5"),
            "{text}"
        );
        let read = journal.read_all().unwrap().remove(&vm).unwrap().unwrap();
        assert_eq!(read.milestone, Milestone::Open);
        assert_eq!(read.secrets, SecretsKept::Elsewhere);
        assert_eq!(read.start.owner, wanted.start.owner);
    }

    #[test]
    fn a_record_of_generation_1_is_of_a_vm_that_was_booted() {
        let runtime = tempfile::tempdir().unwrap();
        let journal = Journal::open(runtime.path(), "sim").unwrap();
        let vm = VmId::from_bytes([7; 16]);
        fs::create_dir(runtime.path().join("vms").join(vm.to_string())).unwrap();
        let old = include_str!("journal.golden-1.json").replace("VMID", &vm.to_string());
        fs::write(journal.path(vm), old).unwrap();
        let read = journal.read_all().unwrap().remove(&vm).unwrap().unwrap();
        assert_eq!(read.start.source, Source::Boot);
        assert_eq!(read.start.owner.secrets_version, 0);
        assert_eq!(
            (read.generation, read.milestone),
            (JOURNAL_GENERATION, Milestone::Booted)
        );
    }

    #[test]
    fn a_record_of_a_fork_names_its_source() {
        let runtime = tempfile::tempdir().unwrap();
        let journal = Journal::open(runtime.path(), "sim").unwrap();
        let vm = VmId::random().unwrap();
        let mut wanted = record(vm);
        wanted.start.source = Source::Snapshot(SnapshotId::from_bytes([3; 16]));
        wanted.milestone = Milestone::Running;
        journal.write(&wanted).unwrap();
        let read = journal.read_all().unwrap().remove(&vm).unwrap().unwrap();
        assert_eq!(read.start.source, wanted.start.source);
        assert_eq!(read.milestone, Milestone::Running);
    }

    #[test]
    fn a_removed_record_leaves_nothing_and_may_be_removed_again() {
        let runtime = tempfile::tempdir().unwrap();
        let journal = Journal::open(runtime.path(), "sim").unwrap();
        let vm = VmId::random().unwrap();
        journal.write(&record(vm)).unwrap();
        journal.remove(vm).unwrap();
        journal.remove(vm).unwrap();
        assert_eq!(fs::read_dir(runtime.path().join("vms")).unwrap().count(), 0);
    }

    #[test]
    fn unusable_records_are_told_apart_and_never_stop_the_others() {
        let runtime = tempfile::tempdir().unwrap();
        let journal = Journal::open(runtime.path(), "sim").unwrap();
        let ids: Vec<VmId> = (0..6_u8).map(|n| VmId::from_bytes([n; 16])).collect();
        for vm in &ids {
            journal.write(&record(*vm)).unwrap();
        }
        fs::write(journal.path(ids[0]), b"{ half a rec").unwrap();
        fs::write(journal.path(ids[1]), b"{\"generation\": 99}").unwrap();
        fs::copy(journal.path(ids[5]), journal.path(ids[2])).unwrap();
        fs::remove_file(journal.path(ids[3])).unwrap();
        let mut other = record(ids[4]);
        other.hypervisor = "qemu".to_owned();
        journal.write(&other).unwrap();
        fs::create_dir(runtime.path().join("vms/not-a-vm")).unwrap();
        let all = journal.read_all().unwrap();
        assert_eq!(all.len(), 6);
        assert!(matches!(all[&ids[0]], Err(RecordError::Decode(_))));
        assert!(matches!(all[&ids[1]], Err(RecordError::Generation(99))));
        assert!(matches!(all[&ids[2]], Err(RecordError::Foreign(_))));
        assert!(matches!(all[&ids[3]], Err(RecordError::Missing)));
        assert!(matches!(all[&ids[4]], Err(RecordError::Hypervisor(_))));
        assert!(all[&ids[5]].is_ok());
    }
}
