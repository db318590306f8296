//! TOML files read with places: every refusal names the file, the line, the value and what would
//! be right.
//!
//! Used by `config.rs` for the daemon's file and by `manifest.rs` for an app's. It knows no key
//! of either, and opens no file.

use core::fmt;
use core::ops::{Range, RangeInclusive};
use core::str::FromStr;
use core::time::Duration;

use thiserror::Error;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// The most characters of a value that a refusal repeats.
const VALUE_CHARS_MAX: usize = 60;

/// A line of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    file: String,
    line: usize,
}

/// Why a file is refused.
#[derive(Debug, Error, PartialEq, Eq)]
pub(crate) enum DocumentError {
    #[error("{place}: this is not TOML: {problem}")]
    Syntax { place: Place, problem: String },
    #[error("{place}: unknown key `{key}`. {right}")]
    UnknownKey {
        place: Place,
        key: String,
        right: String,
    },
    #[error("{place}: `{key} = {value}` is {found}, but must be {right}")]
    WrongType {
        place: Place,
        key: String,
        value: String,
        found: &'static str,
        right: String,
    },
    #[error("{place}: `{key} = {value}` is not possible: {why}")]
    Refused {
        place: Place,
        key: String,
        value: String,
        why: String,
    },
    #[error("{place}: `{key} = {value}` is not in this version. {right}")]
    NotYet {
        place: Place,
        key: String,
        value: String,
        right: String,
    },
    #[error("{place}: `{key}` is missing. Add {right}")]
    Missing {
        place: Place,
        key: String,
        right: String,
    },
}

/// A parsed file.
#[derive(Debug)]
pub(crate) struct Document<'t> {
    file: String,
    text: &'t str,
    root: Spanned<DeTable<'t>>,
}

/// A table of a file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Table<'d> {
    document: &'d Document<'d>,
    prefix: &'d str,
    entries: &'d DeTable<'d>,
    at: usize,
}

/// A key with its value.
#[derive(Clone, Debug)]
pub(crate) struct Entry<'d> {
    document: &'d Document<'d>,
    key: String,
    value: &'d Spanned<DeValue<'d>>,
}

impl<'t> Document<'t> {
    /// Reads `text`; `file` is how messages call it.
    pub(crate) fn parse(file: impl Into<String>, text: &'t str) -> Result<Self, DocumentError> {
        let file = file.into();
        match DeTable::parse(text) {
            Ok(root) => Ok(Self { file, text, root }),
            Err(error) => {
                let at = error.span().map_or(0, |span| span.start);
                let place = Place {
                    file,
                    line: line_of(text, at),
                };
                let problem = error.message().lines().collect::<Vec<_>>().join(", ");
                Err(DocumentError::Syntax { place, problem })
            }
        }
    }

    /// The outermost table; it has these keys and no other.
    pub(crate) fn root(&'t self, known: &[&str]) -> Result<Table<'t>, DocumentError> {
        let entries = self.root.get_ref();
        Table {
            document: self,
            prefix: "",
            entries,
            at: 0,
        }
        .only(known)
    }

    fn place(&self, at: usize) -> Place {
        Place {
            file: self.file.clone(),
            line: line_of(self.text, at),
        }
    }

    fn shown(&self, span: Range<usize>) -> String {
        let text = self.text.get(span).unwrap_or_default();
        let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
        if line.chars().count() <= VALUE_CHARS_MAX {
            return line;
        }
        let cut: String = line.chars().take(VALUE_CHARS_MAX).collect();
        format!("{cut}…")
    }
}

impl<'d> Table<'d> {
    fn only(self, known: &[&str]) -> Result<Self, DocumentError> {
        let unknown = self
            .entries
            .keys()
            .filter(|key| !known.contains(&key.get_ref().as_ref()))
            .min_by_key(|key| key.span().start);
        let Some(key) = unknown else {
            return Ok(self);
        };
        let name = key.get_ref().as_ref();
        let near = known.iter().find(|other| is_near(name, other));
        let right = match near {
            Some(near) => format!("Did you mean `{}{near}`?", self.prefix),
            None => format!("Known here: {}", known.join(", ")),
        };
        Err(DocumentError::UnknownKey {
            place: self.document.place(key.span().start),
            key: format!("{}{name}", self.prefix),
            right,
        })
    }

    /// The value of a key, if it is there.
    pub(crate) fn get(&self, key: &str) -> Option<Entry<'d>> {
        let value = self.entries.get(key)?;
        Some(Entry {
            document: self.document,
            key: format!("{}{key}", self.prefix),
            value,
        })
    }

    /// The value of a key that must be there; `right` is a line to add.
    pub(crate) fn need(&self, key: &str, right: &str) -> Result<Entry<'d>, DocumentError> {
        self.get(key).ok_or_else(|| DocumentError::Missing {
            place: self.document.place(self.at),
            key: format!("{}{key}", self.prefix),
            right: format!("`{right}`"),
        })
    }

    /// A table below this one, if it is there; it has these keys and no other. `prefix` is its
    /// name with a dot.
    pub(crate) fn table(
        &self,
        prefix: &'static str,
        known: &[&str],
    ) -> Result<Option<Self>, DocumentError> {
        let Some(entry) = self.get(prefix.trim_end_matches('.')) else {
            return Ok(None);
        };
        let entries = entry.table()?;
        let at = entry.value.span().start;
        Table {
            document: self.document,
            prefix,
            entries,
            at,
        }
        .only(known)
        .map(Some)
    }

    /// All keys with their values, in the order of the file.
    pub(crate) fn entries(&self) -> Vec<(&'d str, Entry<'d>)> {
        let mut all: Vec<_> = self.entries.iter().collect();
        all.sort_by_key(|(key, _)| key.span().start);
        all.into_iter()
            .map(|(key, value)| {
                let name = key.get_ref().as_ref();
                let key = format!("{}{name}", self.prefix);
                (
                    name,
                    Entry {
                        document: self.document,
                        key,
                        value,
                    },
                )
            })
            .collect()
    }
}

impl<'d> Entry<'d> {
    fn table(&self) -> Result<&'d DeTable<'d>, DocumentError> {
        self.value
            .get_ref()
            .as_table()
            .ok_or_else(|| self.wrong(format!("a table: `[{}]`", self.key)))
    }

    /// A table whose keys are names that people choose.
    pub(crate) fn names(&self, prefix: &'static str) -> Result<Table<'d>, DocumentError> {
        let at = self.value.span().start;
        Ok(Table {
            document: self.document,
            prefix,
            entries: self.table()?,
            at,
        })
    }

    /// A string.
    pub(crate) fn text(&self) -> Result<&'d str, DocumentError> {
        let text = self.value.get_ref().as_str();
        text.ok_or_else(|| self.wrong("a text in quotes".to_owned()))
    }

    /// Yes or no.
    pub(crate) fn flag(&self) -> Result<bool, DocumentError> {
        let flag = self.value.get_ref().as_bool();
        flag.ok_or_else(|| self.wrong("true or false, without quotes".to_owned()))
    }

    /// A list of strings, each with its own place.
    pub(crate) fn texts(&self) -> Result<Vec<(&'d str, Self)>, DocumentError> {
        let wrong = || {
            let right = match self.value.get_ref().as_str() {
                Some(text) => {
                    let words: Vec<_> = text.split_whitespace().map(|w| format!("{w:?}")).collect();
                    format!("a list: `[{}]`", words.join(", "))
                }
                None => "a list of texts: `[\"…\", \"…\"]`".to_owned(),
            };
            self.wrong(right)
        };
        let list = self.value.get_ref().as_array().ok_or_else(wrong)?;
        list.iter()
            .map(|value| {
                let item = Self {
                    document: self.document,
                    key: self.key.clone(),
                    value,
                };
                Ok((item.text()?, item))
            })
            .collect()
    }

    /// A whole number within a range.
    pub(crate) fn integer(&self, range: RangeInclusive<i64>) -> Result<i64, DocumentError> {
        let right = || format!("a whole number from {} to {}", range.start(), range.end());
        let number = self
            .value
            .get_ref()
            .as_integer()
            .ok_or_else(|| self.wrong(right()))?;
        i64::from_str_radix(number.as_str(), number.radix())
            .ok()
            .filter(|number| range.contains(number))
            .ok_or_else(|| self.refused(format!("it must be {}", right())))
    }

    /// A string that means something.
    pub(crate) fn parse<T>(&self) -> Result<T, DocumentError>
    where
        T: FromStr,
        T::Err: fmt::Display,
    {
        self.text()?
            .parse()
            .map_err(|error: T::Err| self.refused(error.to_string()))
    }

    /// A size in whole MiB.
    pub(crate) fn mib(&self, range: RangeInclusive<u32>) -> Result<u32, DocumentError> {
        let (low, high) = (*range.start(), *range.end());
        let rule = || {
            let (low, high) = (mib_text(low), mib_text(high));
            format!("a size such as \"256MiB\" or \"1GiB\", from {low} to {high}")
        };
        let Some(text) = self.value.get_ref().as_str() else {
            return Err(self.wrong(rule()));
        };
        let mib = parse_mib(text).map_err(|why| self.refused(format!("{why}. Use {}", rule())))?;
        u32::try_from(mib)
            .ok()
            .filter(|mib| range.contains(mib))
            .ok_or_else(|| self.refused(format!("it must be {}", rule())))
    }

    /// A span of time.
    pub(crate) fn span(&self, range: RangeInclusive<Duration>) -> Result<Duration, DocumentError> {
        let (low, high) = (*range.start(), *range.end());
        let rule = || {
            let (low, high) = (span_text(low), span_text(high));
            format!("a time such as \"60s\" or \"5m\", from {low} to {high}")
        };
        let Some(text) = self.value.get_ref().as_str() else {
            return Err(self.wrong(rule()));
        };
        let span =
            parse_span(text).map_err(|why| self.refused(format!("{why}. Use {}", rule())))?;
        if range.contains(&span) {
            return Ok(span);
        }
        Err(self.refused(format!("it must be {}", rule())))
    }

    /// A refusal of this value.
    pub(crate) fn refused(&self, why: impl Into<String>) -> DocumentError {
        DocumentError::Refused {
            place: self.document.place(self.value.span().start),
            key: self.key.clone(),
            value: self.document.shown(self.value.span()),
            why: why.into(),
        }
    }

    /// A refusal of this value because it asks for something that comes later.
    pub(crate) fn not_yet(&self, right: impl Into<String>) -> DocumentError {
        DocumentError::NotYet {
            place: self.document.place(self.value.span().start),
            key: self.key.clone(),
            value: self.document.shown(self.value.span()),
            right: right.into(),
        }
    }

    fn wrong(&self, right: String) -> DocumentError {
        let found = match self.value.get_ref() {
            DeValue::String(_) => "a text",
            DeValue::Integer(_) => "a whole number",
            DeValue::Float(_) => "a fraction",
            DeValue::Boolean(_) => "true or false",
            DeValue::Datetime(_) => "a date",
            DeValue::Array(_) => "a list",
            DeValue::Table(_) => "a table",
        };
        DocumentError::WrongType {
            place: self.document.place(self.value.span().start),
            key: self.key.clone(),
            value: self.document.shown(self.value.span()),
            found,
            right,
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file, self.line)
    }
}

fn line_of(text: &str, at: usize) -> usize {
    let before = text.as_bytes().get(..at).unwrap_or(text.as_bytes());
    before.iter().filter(|byte| **byte == b'\n').count() + 1
}

/// Whether one name is likely a slip for the other: one more, less or other character, or the
/// same without case, dashes and underscores.
fn is_near(name: &str, other: &str) -> bool {
    let plain = |text: &str| text.to_lowercase().replace(['-', '_'], "");
    let (name, other) = (plain(name), plain(other));
    if name == other || name.trim_end_matches('s') == other.trim_end_matches('s') {
        return true;
    }
    let (name, other): (Vec<char>, Vec<char>) = (name.chars().collect(), other.chars().collect());
    if name.len().abs_diff(other.len()) > 1 || name.len().min(other.len()) < 3 {
        return false;
    }
    let same = name.iter().zip(&other).take_while(|(a, b)| a == b).count();
    let rest = name.len().max(other.len()) - same - 1;
    let tail = name
        .iter()
        .rev()
        .zip(other.iter().rev())
        .take_while(|(a, b)| a == b)
        .count();
    tail >= rest
}

/// `256MiB` as 256. Decimal units are refused: a reader could take them for either.
pub(crate) fn parse_mib(text: &str) -> Result<u64, String> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let number: u64 = number
        .parse()
        .map_err(|_error| format!("`{text}` is not a size"))?;
    let factor = match unit {
        "MiB" => 1,
        "GiB" => 1024,
        "" => return Err(format!("`{text}` has no unit")),
        other => return Err(format!("`{other}` is not a unit here: MiB and GiB are")),
    };
    number
        .checked_mul(factor)
        .ok_or_else(|| format!("`{text}` is too large"))
}

/// `1m30s` as 90 seconds.
pub(crate) fn parse_span(text: &str) -> Result<Duration, String> {
    let mut rest = text;
    let mut total = Duration::ZERO;
    let too_long = || format!("`{text}` is too long");
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let (number, tail) = rest.split_at(digits);
        let letters = tail.bytes().take_while(u8::is_ascii_alphabetic).count();
        let (unit, tail) = tail.split_at(letters);
        let number: u64 = number
            .parse()
            .map_err(|_error| format!("`{text}` is not a time"))?;
        let unit_ms: u64 = match unit {
            "ms" => 1,
            "s" => 1000,
            "m" => 60 * 1000,
            "h" => 60 * 60 * 1000,
            "d" => 24 * 60 * 60 * 1000,
            "" => return Err(format!("`{text}` has no unit")),
            other => {
                return Err(format!(
                    "`{other}` is not a unit here: ms, s, m, h and d are"
                ));
            }
        };
        let part = number.checked_mul(unit_ms).map(Duration::from_millis);
        total = part
            .and_then(|part| total.checked_add(part))
            .ok_or_else(too_long)?;
        rest = tail;
    }
    if text.is_empty() {
        return Err("an empty text is not a time".to_owned());
    }
    Ok(total)
}

/// The shortest spelling of a size.
pub(crate) fn mib_text(mib: u32) -> String {
    if mib > 0 && mib.is_multiple_of(1024) {
        return format!("{}GiB", mib / 1024);
    }
    format!("{mib}MiB")
}

/// The shortest spelling of a time.
pub(crate) fn span_text(span: Duration) -> String {
    let ms = span.as_millis();
    for (unit, unit_ms) in [
        ("d", 86_400_000),
        ("h", 3_600_000),
        ("m", 60_000),
        ("s", 1000),
    ] {
        if ms > 0 && ms.is_multiple_of(unit_ms) {
            return format!("{}{unit}", ms / unit_ms);
        }
    }
    format!("{ms}ms")
}

#[cfg(test)]
mod tests {
    use core::time::Duration;

    use proptest::prelude::{prop_assert, prop_assert_eq, proptest};

    use super::{Document, is_near, mib_text, parse_mib, parse_span, span_text};

    #[test]
    fn a_slip_is_recognised_and_another_word_is_not() {
        for (name, other) in [
            ("prot", "port"),
            ("prt", "port"),
            ("portt", "port"),
            ("secret", "secrets"),
        ] {
            assert_eq!(is_near(name, other), name != "prot", "{name} {other}");
        }
        assert!(is_near("Data-Dir", "data_dir"));
        assert!(!is_near("image", "port"));
    }

    #[test]
    fn broken_toml_is_refused_with_its_line() {
        let error = Document::parse("x.toml", "a = 1\nb = \n")
            .unwrap_err()
            .to_string();
        assert!(error.starts_with("x.toml:2: this is not TOML"), "{error}");
        let error = Document::parse("x.toml", "a = 1\na = 2\n")
            .unwrap_err()
            .to_string();
        assert!(error.starts_with("x.toml:2: "), "{error}");
    }

    proptest! {
        #[test]
        fn a_size_is_read_as_it_is_written(mib in 1_u32..10_000_000) {
            prop_assert_eq!(parse_mib(&mib_text(mib)), Ok(u64::from(mib)));
        }

        #[test]
        fn a_time_is_read_as_it_is_written(ms in 0_u64..10_000_000_000) {
            let span = Duration::from_millis(ms);
            prop_assert_eq!(parse_span(&span_text(span)), Ok(span));
        }

        #[test]
        fn times_add_up(minutes in 0_u64..1000, seconds in 0_u64..1000) {
            let span = parse_span(&format!("{minutes}m{seconds}s"));
            prop_assert_eq!(span, Ok(Duration::from_secs(minutes * 60 + seconds)));
        }

        #[test]
        fn no_text_makes_the_parsers_panic_and_no_unit_is_guessed(text in ".{0,20}") {
            let number = text.bytes().all(|byte| byte.is_ascii_digit());
            if number {
                prop_assert!(parse_mib(&text).is_err() && parse_span(&text).is_err());
            } else if let Ok(mib) = parse_mib(&text) {
                prop_assert!(mib == 0 || text.ends_with("MiB") || text.ends_with("GiB"));
            }
            drop(parse_span(&text));
        }
    }
}
