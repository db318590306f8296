//! A disk of zeros: what is below the lowest layer.

use std::io;

use super::{Access, Disk};

/// So many bytes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Zeros(pub u64);

impl Disk for Zeros {
    fn bytes(&self) -> u64 {
        self.0
    }

    fn access(&self) -> Access {
        Access::ReadOnly
    }

    fn read(&mut self, _at: u64, into: &mut [u8]) -> io::Result<()> {
        into.fill(0);
        Ok(())
    }

    fn write(&mut self, _at: u64, _from: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
