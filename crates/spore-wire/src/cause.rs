//! An error with its causes in one line: as every process logs it, and tells it to another.

use core::error::Error;

/// The message of `error`, then those of its causes, outermost first.
#[must_use]
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::chain;

    #[derive(Debug, thiserror::Error)]
    #[error("outer")]
    struct Outer(#[source] Inner);

    #[derive(Debug, thiserror::Error)]
    #[error("inner")]
    struct Inner(#[source] std::io::Error);

    #[test]
    fn causes_follow_outermost_first() {
        let error = Outer(Inner(std::io::Error::other("the disk")));
        assert_eq!(chain(&error), "outer: inner: the disk");
    }
}
