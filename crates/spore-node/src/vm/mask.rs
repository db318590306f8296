//! Takes an app's secret values out of what the platform keeps of its output.
//!
//! Used by the log collector before anything is written or handed out. Knows a value as it is, line
//! by line, in base64 and percent-encoded; an app that prints a value in another shape, or in
//! pieces, is not stopped by this, and the documentation says so. Never prints a value itself.

use core::fmt;

use data_encoding::{BASE64, BASE64_NOPAD, BASE64URL_NOPAD, HEXLOWER};
use spore_wire::secret::SecretBytes;
use zeroize::Zeroizing;

/// Shorter values are left alone: taking out every `7` would leave no log.
pub const MASKED_BYTES_MIN: usize = 4;

/// What stands where a value was.
pub const MASK: &str = "***";

/// The values to take out.
#[derive(Clone, Default)]
pub struct Masker {
    /// Longest first, so that a value inside another's encoding does not leave its rest.
    patterns: Vec<Zeroizing<String>>,
}

impl fmt::Debug for Masker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Masker({} patterns)", self.patterns.len())
    }
}

impl Masker {
    /// Knows these values.
    #[must_use]
    pub fn new<'a>(secrets: impl Iterator<Item = &'a SecretBytes>) -> Self {
        let mut patterns = Vec::new();
        for secret in secrets {
            let bytes = secret.expose();
            add_shapes(bytes, &mut patterns);
            // A log is made of lines, so a value of many lines is never met whole.
            for line in bytes.split(|byte| *byte == b'\n') {
                let line = line.strip_suffix(b"\r").unwrap_or(line);
                if line.len() < bytes.len() {
                    add_shapes(line, &mut patterns);
                }
            }
        }
        patterns.sort_by(|a, b| b.len().cmp(&a.len()).then_with(|| a.cmp(b)));
        patterns.dedup();
        Self { patterns }
    }

    /// The text without the values.
    #[must_use]
    pub fn mask(&self, text: &str) -> String {
        let mut masked = text.to_owned();
        for pattern in &self.patterns {
            if masked.contains(pattern.as_str()) {
                masked = masked.replace(pattern.as_str(), MASK);
            }
        }
        masked
    }
}

fn add_shapes(bytes: &[u8], patterns: &mut Vec<Zeroizing<String>>) {
    if bytes.len() < MASKED_BYTES_MIN {
        return;
    }
    // The agent replaces what is not UTF-8 in the same way.
    let plain = Zeroizing::new(String::from_utf8_lossy(bytes).into_owned());
    let escaped = serde_json::to_string(plain.as_str()).map(Zeroizing::new);
    if let Ok(escaped) = escaped {
        patterns.push(Zeroizing::new(escaped[1..escaped.len() - 1].to_owned()));
    }
    patterns.push(Zeroizing::new(percent(bytes)));
    patterns.push(Zeroizing::new(BASE64.encode(bytes)));
    patterns.push(Zeroizing::new(BASE64_NOPAD.encode(bytes)));
    patterns.push(Zeroizing::new(BASE64URL_NOPAD.encode(bytes)));
    patterns.push(Zeroizing::new(HEXLOWER.encode(bytes)));
    patterns.push(plain);
}

/// As in a form or a query: everything but unreserved characters.
fn percent(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len() * 3);
    for byte in bytes {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~') {
            text.push(char::from(*byte));
        } else {
            text.push_str(&format!("%{byte:02X}"));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use spore_wire::secret::SecretBytes;

    use super::Masker;

    fn masker(values: &[&[u8]]) -> Masker {
        let secrets: Vec<SecretBytes> = values
            .iter()
            .map(|value| SecretBytes::new(value.to_vec()))
            .collect();
        Masker::new(secrets.iter())
    }

    #[test]
    fn a_value_is_taken_out_in_every_known_shape() {
        let masker = masker(&[b"hunter2 & \"co\""]);
        let text = "plain hunter2 & \"co\", json hunter2 & \\\"co\\\", \
                    url hunter2%20%26%20%22co%22, base64 aHVudGVyMiAmICJjbyI=";
        assert_eq!(
            masker.mask(text),
            "plain ***, json ***, url ***, base64 ***"
        );
    }

    #[test]
    fn a_value_of_many_lines_is_taken_out_of_each_line() {
        let masker = masker(&[b"-----BEGIN\nMIIEow\n-----END"]);
        assert_eq!(masker.mask("x MIIEow y"), "x *** y");
    }

    #[test]
    fn the_longer_of_two_values_goes_first() {
        let masker = masker(&[b"token", b"token-and-more"]);
        assert_eq!(masker.mask("token-and-more token"), "*** ***");
    }

    #[test]
    fn a_value_too_short_to_hide_is_left() {
        assert_eq!(masker(&[b"7"]).mask("7 of 17"), "7 of 17");
    }

    #[test]
    fn debug_shows_no_value() {
        assert!(!format!("{:?}", masker(&[b"hunter2"])).contains("hunter2"));
    }
}
