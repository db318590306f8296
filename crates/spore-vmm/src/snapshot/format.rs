//! The form of a saved machine: sections of bytes, each with a name, a version and a checksum.
//!
//! ```text
//!   magic "SPVM" · format u32 · layout u32 · sections…
//!   section: kind u8 · number u8 · version u16 · length u32 · crc32 u32 · bytes
//! ```
//!
//! All numbers are little-endian. Written by one process and read by another, which may be of a
//! newer version and must not trust it: a guest may have taken over the process that wrote it. So
//! every length is checked before anything is taken, each section is there once, and what is left
//! over is as wrong as what is missing.
//!
//! The checksum finds damage, not malice; whoever keeps the file seals it.
//!
//! Pure: bytes in, bytes out. How to change it: a part that is saved in another way raises its
//! section's version, and reads the older one or refuses it by name; another form of sections
//! raises [`FORMAT`]; another physical map raises [`LAYOUT`].

use crate::machine::layout::LAYOUT;

/// What a file begins with.
pub const MAGIC: [u8; 4] = *b"SPVM";

/// The number of this form.
pub const FORMAT: u32 = 1;

/// The most bytes of a saved machine, memory and disks aside.
pub const STATE_BYTES_MAX: usize = 1024 * 1024;

/// The most sections.
pub const SECTIONS_MAX: usize = 64;

const HEAD_BYTES: usize = 12;
const SECTION_HEAD_BYTES: usize = 12;

/// What a section is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tag {
    /// Which kind of part.
    pub kind: u8,
    /// Which one of its kind.
    pub number: u8,
}

impl std::fmt::Display for Tag {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.kind, self.number)?;
        super::kind::name(self.kind).map_or(Ok(()), |name| write!(f, " ({name})"))
    }
}

/// Why a saved machine cannot be read or written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// The file is none of ours.
    #[error("this is no saved machine")]
    Magic,
    /// The file has another form.
    #[error("a saved machine of form {found}: this version reads {FORMAT}")]
    Format {
        /// What it says.
        found: u32,
    },
    /// The machine had another physical map.
    #[error("a saved machine of layout {found}: this version has {LAYOUT}")]
    Layout {
        /// What it says.
        found: u32,
    },
    /// It ends before it should.
    #[error("a saved machine ends {missing} bytes early")]
    Short {
        /// How many are missing where they were looked for.
        missing: usize,
    },
    /// It is larger than any.
    #[error("a saved machine of {bytes} bytes: {STATE_BYTES_MAX} at most")]
    Long {
        /// How large it is.
        bytes: usize,
    },
    /// It has more sections than any.
    #[error("a saved machine of more than {SECTIONS_MAX} sections")]
    Sections,
    /// A section is there twice.
    #[error("section {0} is there twice")]
    Twice(Tag),
    /// A section is not there.
    #[error("section {0} is missing")]
    Missing(Tag),
    /// A section was damaged.
    #[error("section {0} is damaged: its checksum is another")]
    Damaged(Tag),
    /// A section is written in another way.
    #[error("section {tag} has version {found}: this version reads {expected}")]
    Version {
        /// Which one.
        tag: Tag,
        /// What it says.
        found: u16,
        /// What is read.
        expected: u16,
    },
    /// There is more than was asked for.
    #[error("{bytes} bytes of a saved machine are left over")]
    LeftOver {
        /// How many.
        bytes: usize,
    },
    /// A number that says what is there says something that cannot be.
    #[error("{value} {what} in a saved machine: {most} at most")]
    Count {
        /// What is counted.
        what: &'static str,
        /// What it says.
        value: u64,
        /// What can be.
        most: u64,
    },
    /// A number that names one of a few things names none.
    #[error("{value} names no {what} in a saved machine")]
    Name {
        /// What is named.
        what: &'static str,
        /// What it says.
        value: u8,
    },
}

/// Writes a saved machine.
#[derive(Clone, Debug)]
pub struct Writer {
    bytes: Vec<u8>,
    tags: Vec<Tag>,
}

impl Default for Writer {
    fn default() -> Self {
        let mut bytes = Vec::new();
        bytes.extend(MAGIC);
        bytes.extend(FORMAT.to_le_bytes());
        bytes.extend(LAYOUT.to_le_bytes());
        Self {
            bytes,
            tags: Vec::new(),
        }
    }
}

impl Writer {
    /// Adds a section.
    pub fn section(&mut self, tag: Tag, version: u16, bytes: &[u8]) -> Result<(), FormatError> {
        if self.tags.contains(&tag) {
            return Err(FormatError::Twice(tag));
        }
        if self.tags.len() == SECTIONS_MAX {
            return Err(FormatError::Sections);
        }
        let whole = self.bytes.len() + SECTION_HEAD_BYTES + bytes.len();
        let long = FormatError::Long { bytes: whole };
        let length = u32::try_from(bytes.len()).map_err(|_error| long)?;
        if whole > STATE_BYTES_MAX {
            return Err(long);
        }
        self.tags.push(tag);
        self.bytes.extend([tag.kind, tag.number]);
        self.bytes.extend(version.to_le_bytes());
        self.bytes.extend(length.to_le_bytes());
        self.bytes.extend(crc32fast::hash(bytes).to_le_bytes());
        self.bytes.extend(bytes);
        Ok(())
    }

    /// The whole file.
    #[must_use]
    pub fn finish(self) -> Vec<u8> {
        self.bytes
    }
}

/// The sections of a saved machine, each to be taken once.
#[derive(Clone, Debug)]
pub struct Sections<'a> {
    left: Vec<(Tag, u16, &'a [u8])>,
}

impl<'a> Sections<'a> {
    /// Looks a whole file over.
    pub fn read(file: &'a [u8]) -> Result<Self, FormatError> {
        let bytes = file.len();
        if bytes > STATE_BYTES_MAX {
            return Err(FormatError::Long { bytes });
        }
        let mut rest = Fields::new(file);
        if rest.array::<4>().ok() != Some(MAGIC) {
            return Err(FormatError::Magic);
        }
        match rest.u32()? {
            FORMAT => {}
            found => return Err(FormatError::Format { found }),
        }
        match rest.u32()? {
            LAYOUT => {}
            found => return Err(FormatError::Layout { found }),
        }
        let mut left: Vec<(Tag, u16, &[u8])> = Vec::new();
        while !rest.bytes.is_empty() {
            if left.len() == SECTIONS_MAX {
                return Err(FormatError::Sections);
            }
            let tag = Tag {
                kind: rest.u8()?,
                number: rest.u8()?,
            };
            let version = rest.u16()?;
            let length = rest.u32()?;
            let checksum = rest.u32()?;
            let bytes = rest.take(usize::try_from(length).unwrap_or(usize::MAX))?;
            if left.iter().any(|(other, ..)| *other == tag) {
                return Err(FormatError::Twice(tag));
            }
            if crc32fast::hash(bytes) != checksum {
                return Err(FormatError::Damaged(tag));
            }
            left.push((tag, version, bytes));
        }
        Ok(Self { left })
    }

    /// Takes the section of one part, written in the way of one version.
    pub fn take(&mut self, tag: Tag, expected: u16) -> Result<Fields<'a>, FormatError> {
        let at = self.left.iter().position(|(other, ..)| *other == tag);
        let (_, found, bytes) = self.left.swap_remove(at.ok_or(FormatError::Missing(tag))?);
        if found != expected {
            return Err(FormatError::Version {
                tag,
                found,
                expected,
            });
        }
        Ok(Fields::new(bytes))
    }

    /// Every section was somebody's.
    pub fn finish(self) -> Result<(), FormatError> {
        let bytes = self.left.iter().map(|(_, _, bytes)| bytes.len()).sum();
        if self.left.is_empty() {
            Ok(())
        } else {
            Err(FormatError::LeftOver { bytes })
        }
    }
}

/// The numbers in a section, read one after the other.
#[derive(Clone, Debug)]
pub struct Fields<'a> {
    bytes: &'a [u8],
}

impl<'a> Fields<'a> {
    /// Of a section's bytes.
    #[must_use]
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self { bytes }
    }

    /// So many bytes.
    pub fn take(&mut self, count: usize) -> Result<&'a [u8], FormatError> {
        let missing = count.saturating_sub(self.bytes.len());
        let (taken, rest) = self
            .bytes
            .split_at_checked(count)
            .ok_or(FormatError::Short { missing })?;
        self.bytes = rest;
        Ok(taken)
    }

    /// As many bytes as the caller has room for.
    pub fn array<const COUNT: usize>(&mut self) -> Result<[u8; COUNT], FormatError> {
        let mut array = [0; COUNT];
        array.copy_from_slice(self.take(COUNT)?);
        Ok(array)
    }

    /// A byte.
    pub fn u8(&mut self) -> Result<u8, FormatError> {
        self.array().map(u8::from_le_bytes)
    }

    /// A number of 16 bits.
    pub fn u16(&mut self) -> Result<u16, FormatError> {
        self.array().map(u16::from_le_bytes)
    }

    /// A number of 32 bits.
    pub fn u32(&mut self) -> Result<u32, FormatError> {
        self.array().map(u32::from_le_bytes)
    }

    /// A number of 64 bits.
    pub fn u64(&mut self) -> Result<u64, FormatError> {
        self.array().map(u64::from_le_bytes)
    }

    /// A byte that is 0 or 1.
    pub fn flag(&mut self, what: &'static str) -> Result<bool, FormatError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            value => Err(FormatError::Name { what, value }),
        }
    }

    /// A number of things that follow, which must not be more than there can be.
    pub fn count(&mut self, what: &'static str, most: u32) -> Result<u32, FormatError> {
        let value = self.u32()?;
        if value > most {
            return Err(FormatError::Count {
                what,
                value: u64::from(value),
                most: u64::from(most),
            });
        }
        Ok(value)
    }

    /// All of it was read.
    pub const fn finish(self) -> Result<(), FormatError> {
        match self.bytes.len() {
            0 => Ok(()),
            bytes => Err(FormatError::LeftOver { bytes }),
        }
    }
}

/// The numbers of [`MAGIC`]'s file are those of this release for ever: an older file is read by
/// them.
const _: () = assert!(FORMAT == 1 && HEAD_BYTES == 12 && SECTION_HEAD_BYTES == 12);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{
        FormatError, HEAD_BYTES, SECTION_HEAD_BYTES, SECTIONS_MAX, STATE_BYTES_MAX, Sections, Tag,
        Writer,
    };

    const ONE: Tag = Tag { kind: 1, number: 0 };
    const TWO: Tag = Tag { kind: 1, number: 1 };

    fn file() -> Vec<u8> {
        let mut writer = Writer::default();
        writer.section(ONE, 3, &[1, 2, 3, 4, 5, 6]).unwrap();
        writer.section(TWO, 1, &[]).unwrap();
        writer.finish()
    }

    fn error(file: &[u8]) -> FormatError {
        Sections::read(file).map(drop).unwrap_err()
    }

    #[test]
    fn what_is_written_is_read() {
        let file = file();
        let mut sections = Sections::read(&file).unwrap();
        let mut one = sections.take(ONE, 3).unwrap();
        assert_eq!(
            (one.u8(), one.u16(), one.u16()),
            (Ok(1), Ok(0x302), Ok(0x504))
        );
        assert_eq!(one.clone().u16(), Err(FormatError::Short { missing: 1 }));
        assert_eq!(
            one.clone().finish(),
            Err(FormatError::LeftOver { bytes: 1 })
        );
        assert_eq!(one.u8(), Ok(6));
        assert_eq!(one.finish(), Ok(()));
        sections.take(TWO, 1).unwrap().finish().unwrap();
        sections.finish().unwrap();
    }

    #[test]
    fn the_form_is_the_one_of_every_release() {
        let mut writer = Writer::default();
        writer.section(TWO, 0x203, b"xy").unwrap();
        let crc = crc32fast::hash(b"xy").to_le_bytes();
        let mut expected = b"SPVM\x01\0\0\0\x02\0\0\0\x01\x01\x03\x02\x02\0\0\0".to_vec();
        expected.extend(crc);
        expected.extend(b"xy");
        assert_eq!(writer.finish(), expected);
    }

    #[test]
    fn a_section_is_taken_once_and_in_its_version() {
        let file = file();
        let mut sections = Sections::read(&file).unwrap();
        let missing = Tag { kind: 9, number: 0 };
        let other = sections.clone().take(ONE, 2).map(drop);
        let expected = FormatError::Version {
            tag: ONE,
            found: 3,
            expected: 2,
        };
        assert_eq!(other, Err(expected));
        let absent = sections.take(missing, 1).map(drop);
        assert_eq!(absent, Err(FormatError::Missing(missing)));
        sections.take(ONE, 3).unwrap();
        let again = sections.take(ONE, 3).map(drop);
        assert_eq!(again, Err(FormatError::Missing(ONE)));
        let left = Sections::read(&file).unwrap().finish();
        assert_eq!(left, Err(FormatError::LeftOver { bytes: 6 }));
    }

    #[test]
    fn another_form_or_layout_is_refused_by_its_number() {
        let changed = |at: usize| {
            let mut file = file();
            file[at] = 9;
            error(&file)
        };
        assert_eq!(changed(0), FormatError::Magic);
        assert_eq!(changed(4), FormatError::Format { found: 9 });
        assert_eq!(changed(8), FormatError::Layout { found: 9 });
        assert_eq!(error(b""), FormatError::Magic);
        assert_eq!(error(b"SPVM\x01"), FormatError::Short { missing: 3 });
    }

    #[test]
    fn damage_is_found_in_every_byte_of_a_section() {
        let whole = file();
        for at in HEAD_BYTES + SECTION_HEAD_BYTES..HEAD_BYTES + SECTION_HEAD_BYTES + 6 {
            let mut damaged = whole.clone();
            damaged[at] ^= 0x10;
            assert_eq!(error(&damaged), FormatError::Damaged(ONE));
        }
        let mut twice = whole.clone();
        twice.extend(&whole[HEAD_BYTES..]);
        assert_eq!(error(&twice), FormatError::Twice(ONE));
    }

    #[test]
    fn sizes_are_bounded_on_both_sides() {
        let mut writer = Writer::default();
        let room = STATE_BYTES_MAX - HEAD_BYTES - SECTION_HEAD_BYTES;
        let long = writer.section(ONE, 1, &vec![0; room + 1]);
        assert!(matches!(long, Err(FormatError::Long { .. })));
        writer.section(ONE, 1, &vec![0; room]).unwrap();
        let full = writer.finish();
        assert!(Sections::read(&full).is_ok());
        let mut long = full;
        long.push(0);
        assert!(matches!(error(&long), FormatError::Long { .. }));
        let mut writer = Writer::default();
        for number in 0..SECTIONS_MAX {
            let number = u8::try_from(number).unwrap();
            writer.section(Tag { kind: 2, number }, 1, &[]).unwrap();
        }
        assert_eq!(writer.section(ONE, 1, &[]), Err(FormatError::Sections));
        let mut many = writer.finish();
        many.extend([9, 9, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(error(&many), FormatError::Sections);
    }

    #[test]
    fn a_flag_is_one_of_two() {
        let flag = |byte| super::Fields::new(&[byte]).flag("light");
        assert_eq!((flag(0), flag(1)), (Ok(false), Ok(true)));
        let what = "light";
        assert_eq!(flag(2), Err(FormatError::Name { what, value: 2 }));
    }

    #[test]
    fn a_count_is_bounded_before_it_is_believed() {
        let bytes = 5_u32.to_le_bytes();
        let count = |most| super::Fields::new(&bytes).count("registers", most);
        assert_eq!(count(5), Ok(5));
        assert!(matches!(count(4), Err(FormatError::Count { value: 5, .. })));
    }

    proptest! {
        #[test]
        fn no_bytes_are_more_than_an_error(
            head in any::<bool>(),
            bytes in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let mut file = if head { Writer::default().finish() } else { Vec::new() };
            file.extend(bytes);
            if let Ok(sections) = Sections::read(&file) {
                prop_assert!(sections.left.len() <= SECTIONS_MAX);
            }
        }

        #[test]
        fn a_cut_or_changed_file_is_never_taken_for_another(
            cut in 0..400_usize,
            at in 0..400_usize,
            with in 1..=u8::MAX,
        ) {
            let whole = file();
            let short = &whole[..cut % whole.len()];
            // Only at the end of a section a file may end, and then one is missing.
            if let Ok(mut sections) = Sections::read(short) {
                let both = sections.take(ONE, 3).is_ok() && sections.take(TWO, 1).is_ok();
                prop_assert!(!both);
            }
            let mut changed = whole.clone();
            let at = at % changed.len();
            changed[at] ^= with;
            if let Ok(mut sections) = Sections::read(&changed) {
                let both = sections.take(ONE, 3).is_ok() && sections.take(TWO, 1).is_ok();
                prop_assert!(!both, "byte {}", at);
            }
        }
    }
}
