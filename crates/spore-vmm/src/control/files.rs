//! The descriptors of one packet, each of which a message names once.

use std::os::fd::OwnedFd;

use spore_wire::launch::FdIndex;

/// A message and its descriptors that do not go together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FilesError {
    /// There is none with that number, or it was named before.
    #[error("descriptor {index} is named, and is not among the {count} that came or named twice")]
    Missing {
        /// Its number.
        index: u8,
        /// How many there are.
        count: usize,
    },
    /// Nobody names it.
    #[error("{count} of the descriptors that came are named by nothing")]
    LeftOver {
        /// How many.
        count: usize,
    },
}

/// The descriptors.
#[derive(Debug)]
pub struct Files(Vec<Option<OwnedFd>>);

impl Files {
    /// In the order in which they came.
    #[must_use]
    pub fn new(fds: Vec<OwnedFd>) -> Self {
        Self(fds.into_iter().map(Some).collect())
    }

    /// The one that is named.
    pub fn take(&mut self, index: FdIndex) -> Result<OwnedFd, FilesError> {
        let count = self.0.len();
        let slot = self.0.get_mut(usize::from(index.0));
        slot.and_then(Option::take).ok_or(FilesError::Missing {
            index: index.0,
            count,
        })
    }

    /// All were named.
    pub fn finish(self) -> Result<(), FilesError> {
        match self.0.iter().flatten().count() {
            0 => Ok(()),
            count => Err(FilesError::LeftOver { count }),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use spore_wire::launch::FdIndex;

    use super::{Files, FilesError};

    #[test]
    fn each_descriptor_is_named_once() {
        let null = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let mut files = Files::new(vec![null(), null()]);
        files.take(FdIndex(1)).unwrap();
        for index in [1, 2, 255] {
            let refused = files.take(FdIndex(index)).unwrap_err();
            assert_eq!(refused, FilesError::Missing { index, count: 2 });
        }
        let left = files.finish().unwrap_err();
        assert_eq!(left, FilesError::LeftOver { count: 1 });
        let mut files = Files::new(vec![null()]);
        files.take(FdIndex(0)).unwrap();
        files.finish().unwrap();
    }
}
