//! The file of a saved machine, from a disk that may lie: what was written is read again, and what
//! was changed since is read or refused.
#![no_main]

use libfuzzer_sys::fuzz_target;
use spore_vmm::snapshot::format::{Sections, Tag, Writer};

type Section = (u8, u8, u16, Vec<u8>);

fuzz_target!(|input: (Vec<Section>, Vec<(u16, u8)>, u16)| {
    let (sections, changes, cut) = input;
    let mut writer = Writer::default();
    let mut written = Vec::new();
    for (kind, number, version, bytes) in &sections {
        let tag = Tag {
            kind: *kind,
            number: *number,
        };
        if writer.section(tag, *version, bytes).is_ok() {
            written.push((tag, *version, bytes));
        }
    }
    let mut file = writer.finish();
    let mut read = Sections::read(&file).expect("it was just written");
    for (tag, version, bytes) in written {
        let mut fields = read.take(tag, version).expect("it is there once");
        assert_eq!(fields.take(bytes.len()).ok(), Some(bytes.as_slice()));
        assert!(fields.finish().is_ok());
    }
    assert!(read.finish().is_ok());

    for (at, change) in changes {
        if let Some(byte) = file.get_mut(usize::from(at)) {
            *byte ^= change;
        }
    }
    let cut = file.len().saturating_sub(usize::from(cut));
    for file in [&file[..], &file[..cut]] {
        if let Ok(mut read) = Sections::read(file) {
            for (kind, number, version, _) in &sections {
                let tag = Tag {
                    kind: *kind,
                    number: *number,
                };
                // One that is there reads to its end and no further.
                if let Ok(mut fields) = read.take(tag, *version) {
                    while fields.u64().is_ok() {}
                }
            }
        }
    }
});
