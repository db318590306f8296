//! What a host's administrator has guests' kernels told beside what a driver tells them.

use std::fmt;
use std::str::FromStr;

/// The longest; a kernel cuts a line of 2048 bytes off (x86, `COMMAND_LINE_SIZE`), and drivers have
/// theirs in it.
const BYTES_MAX: usize = 512;

/// Arguments for the kernels of guests that boot, as Linux' `kernel-parameters` names them. They
/// stand behind a driver's own, so that of two that contradict each other they count.
///
/// ```
/// use spore_node::hypervisor::KernelArguments;
///
/// let arguments: KernelArguments = "nohz=off  mitigations=off".parse()?;
/// assert_eq!(arguments.after("quiet"), "quiet nohz=off mitigations=off");
/// assert!("quiet -- sh".parse::<KernelArguments>().is_err());
/// # Ok::<(), &str>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KernelArguments(String);

impl KernelArguments {
    /// A driver's line, with these.
    #[must_use]
    pub fn after(&self, line: &str) -> String {
        match self.0.as_str() {
            "" => line.to_owned(),
            arguments => format!("{line} {arguments}"),
        }
    }
}

impl FromStr for KernelArguments {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if !text.bytes().all(|byte| matches!(byte, b' '..=b'~')) {
            return Err("it must be printable ASCII, in one line");
        }
        let words: Vec<&str> = text.split(' ').filter(|word| !word.is_empty()).collect();
        if words.contains(&"--") {
            return Err("what stands behind -- is the agent's, and it takes none: leave it out");
        }
        if words
            .iter()
            .any(|word| word.starts_with("init=") || word.starts_with("rdinit="))
        {
            return Err("a guest's first program is the agent: leave init= and rdinit= out");
        }
        let text = words.join(" ");
        if text.len() > BYTES_MAX {
            return Err("it must be at most 512 bytes long");
        }
        Ok(Self(text))
    }
}

impl fmt::Display for KernelArguments {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::KernelArguments;

    #[test]
    fn what_no_kernel_could_be_told_is_refused() {
        for (text, part) in [
            ("a\nb", "in one line"),
            ("größer", "printable ASCII"),
            ("a -- b", "behind --"),
            ("init=/bin/sh", "first program"),
            ("quiet rdinit=/bin/sh", "first program"),
        ] {
            let refused = text.parse::<KernelArguments>().unwrap_err();
            assert!(refused.contains(part), "{text:?}: {refused}");
        }
        assert!("a".repeat(512).parse::<KernelArguments>().is_ok());
        assert!("a".repeat(513).parse::<KernelArguments>().is_err());
    }

    #[test]
    fn none_leave_a_line_as_it_is() {
        assert_eq!(KernelArguments::default().after("a b"), "a b");
        assert_eq!("  ".parse(), Ok(KernelArguments::default()));
    }
}
