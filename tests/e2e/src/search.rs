//! Where words are that should be nowhere.

use std::fs;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;

use anyhow::{Context, Result};

/// Read at once; a word may lie across two of them.
const CHUNK: usize = 1 << 20;

/// Words to look for. The first letter of each should be rare.
#[derive(Clone, Copy, Debug)]
pub struct Words<const N: usize>(pub [&'static str; N]);

impl<const N: usize> Words<N> {
    /// The files below a folder that have one.
    ///
    /// # Errors
    /// When a folder cannot be read.
    pub fn files(&self, folder: &Path) -> Result<Vec<String>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
            let entry = entry?;
            let (path, kind) = (entry.path(), entry.file_type()?);
            if kind.is_dir() {
                found.extend(self.files(&path)?);
            } else if kind.is_file() && self.are_in_file(&path) {
                found.push(path.display().to_string());
            }
        }
        Ok(found)
    }

    /// The processes that have one in their arguments or their environment.
    #[must_use]
    pub fn processes(&self, pids: &[i32]) -> Vec<String> {
        let files = |pid| ["cmdline", "environ"].map(|file| format!("/proc/{pid}/{file}"));
        let files = pids.iter().flat_map(files);
        // A process may have ended meanwhile.
        let has = |path: &String| self.are_in(&fs::read(path).unwrap_or_default());
        files.filter(has).collect()
    }

    /// The files on a disk that processes hold open and that have one, also those without a name;
    /// and how many files without a name were looked at.
    ///
    /// # Errors
    /// When the processes' open files cannot be listed.
    pub fn open_files(&self, pids: &[i32]) -> Result<(Vec<String>, usize)> {
        let (mut found, mut nameless) = (Vec::new(), 0);
        for pid in pids {
            let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else {
                continue;
            };
            for entry in entries {
                let path = entry?.path();
                let Ok(target) = fs::read_link(&path) else {
                    continue;
                };
                // What is memory only is not left anywhere.
                let is_memory = target.to_string_lossy().starts_with("/memfd:");
                let is_file = fs::metadata(&path).is_ok_and(|data| data.is_file());
                if is_memory || !is_file {
                    continue;
                }
                nameless += usize::from(fs::metadata(&path)?.nlink() == 0);
                if self.are_in_file(&path) {
                    found.push(format!("{} ({})", path.display(), target.display()));
                }
            }
        }
        Ok((found, nameless))
    }

    /// A file that has gone meanwhile has none; holes are passed over.
    fn are_in_file(&self, path: &Path) -> bool {
        let Ok(file) = fs::File::open(path) else {
            return false;
        };
        let longest = self.0.iter().map(|word| word.len()).max().unwrap_or(0);
        let mut buffer = vec![0; CHUNK];
        let mut at = 0;
        loop {
            let Ok(data) = rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(at)) else {
                return false;
            };
            let Ok(read) = file.read_at(&mut buffer, data) else {
                return false;
            };
            if self.are_in(&buffer[..read]) {
                return true;
            }
            if read <= longest {
                return false;
            }
            // What began at the end of this piece is whole in the next.
            at = data + (read - longest) as u64;
        }
    }

    /// Compares at the words' first bytes only: images are large, and nothing is optimised here.
    fn are_in(&self, bytes: &[u8]) -> bool {
        self.0.iter().any(|word| {
            let word = word.as_bytes();
            let mut rest = bytes;
            while let Some(at) = rest.iter().position(|byte| *byte == word[0]) {
                if rest[at..].starts_with(word) {
                    return true;
                }
                rest = &rest[at + 1..];
            }
            false
        })
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Seek as _, SeekFrom, Write as _};

    use super::{CHUNK, Words};

    #[test]
    fn a_word_is_found_in_an_open_file_without_a_name_across_pieces_and_behind_a_hole() {
        let words = Words(["zebra-of-this-test"]);
        let me = [i32::try_from(std::process::id()).unwrap()];
        let mut file = tempfile::tempfile().unwrap();
        let (before, _) = words.open_files(&me).unwrap();
        assert_eq!(before, Vec::<String>::new());
        let hole = 64 << 20;
        file.seek(SeekFrom::Start(hole)).unwrap();
        file.write_all(&vec![b'.'; CHUNK - 5]).unwrap();
        file.write_all(words.0[0].as_bytes()).unwrap();
        let (found, nameless) = words.open_files(&me).unwrap();
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(nameless >= 1);
    }
}
