//! Saved machines: their form, and what each part of a machine puts into it.

pub mod format;
pub mod kind;

use self::format::{Fields, FormatError, Sections, Tag, Writer};

/// What is saved of a part, implemented beside the part.
///
/// The numbers that it writes are those of its release for ever: whoever changes them raises
/// [`VERSION`](Self::VERSION), and the pinned bytes in the part's test show that it was forgotten.
pub trait Saved: Sized {
    /// The way that it is written in.
    const VERSION: u16;

    /// Writes it behind what is there.
    fn put(&self, into: &mut Vec<u8>);

    /// Reads what was written; whether the part can be in such a state is for the part to say.
    fn get(from: &mut Fields<'_>) -> Result<Self, FormatError>;
}

impl Writer {
    /// Adds the section of a part.
    pub fn put(&mut self, tag: Tag, state: &impl Saved) -> Result<(), FormatError> {
        fn version<S: Saved>(_: &S) -> u16 {
            S::VERSION
        }
        let mut bytes = Vec::new();
        state.put(&mut bytes);
        self.section(tag, version(state), &bytes)
    }
}

impl Sections<'_> {
    /// Takes the section of a part, all of it.
    pub fn get<S: Saved>(&mut self, tag: Tag) -> Result<S, FormatError> {
        let mut fields = self.take(tag, S::VERSION)?;
        let state = S::get(&mut fields)?;
        fields.finish()?;
        Ok(state)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::fmt::Debug;

    use super::Saved;
    use super::format::{Fields, FormatError, Sections, Tag, Writer};

    const TAG: Tag = Tag { kind: 1, number: 2 };

    /// Writes a state, compares it with the bytes of every release, and reads it again. None of
    /// them can be left out.
    pub(crate) fn is_pinned<S: Saved + PartialEq + Debug>(state: &S, version: u16, bytes: &[u8]) {
        assert_eq!(S::VERSION, version);
        let mut written = Vec::new();
        state.put(&mut written);
        assert_eq!(written, bytes);
        let mut writer = Writer::default();
        writer.put(TAG, state).unwrap();
        let file = writer.finish();
        assert_eq!(
            Sections::read(&file).unwrap().get::<S>(TAG).as_ref(),
            Ok(state)
        );
        for end in 0..bytes.len() {
            let mut fields = Fields::new(&bytes[..end]);
            assert!(S::get(&mut fields).is_err(), "{end} bytes");
        }
    }

    #[derive(Debug, PartialEq)]
    struct Part(u16);

    impl Saved for Part {
        const VERSION: u16 = 3;

        fn put(&self, into: &mut Vec<u8>) {
            into.extend(self.0.to_le_bytes());
        }

        fn get(from: &mut Fields<'_>) -> Result<Self, FormatError> {
            from.u16().map(Self)
        }
    }

    #[test]
    fn a_part_is_written_in_its_version_and_read_whole() {
        is_pinned(&Part(0x102), 3, &[2, 1]);
        let read = |version, bytes: &[u8]| {
            let mut writer = Writer::default();
            writer.section(TAG, version, bytes).unwrap();
            let file = writer.finish();
            Sections::read(&file).unwrap().get::<Part>(TAG)
        };
        assert_eq!(read(3, &[2, 1]), Ok(Part(0x102)));
        assert_eq!(read(3, &[2, 1, 0]), Err(FormatError::LeftOver { bytes: 1 }));
        assert!(matches!(read(2, &[2, 1]), Err(FormatError::Version { .. })));
    }
}
