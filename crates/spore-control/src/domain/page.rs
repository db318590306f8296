//! Pages: a cursor is the last key of the page before, opaque to clients.

use data_encoding::BASE64URL_NOPAD;
use spore_api::limits::{PAGE_ITEMS_DEFAULT, PAGE_ITEMS_MAX};
use spore_api::page::PageQuery;

use super::RuleError;

/// Which part of a list is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    /// Items behind this name; `None` is from the first on.
    pub after: Option<String>,
    /// The most items.
    pub limit: usize,
}

/// Reads a page's query.
///
/// # Errors
/// When the cursor is none of ours or the limit is out of range.
pub fn slice(query: &PageQuery) -> Result<Slice, RuleError> {
    let limit = query.limit.unwrap_or(PAGE_ITEMS_DEFAULT);
    if !(1..=PAGE_ITEMS_MAX).contains(&limit) {
        let rule = format!("1 to {PAGE_ITEMS_MAX} items are allowed");
        return Err(RuleError::invalid("limit", limit, rule));
    }
    let after = query.cursor.as_deref().map(read_cursor).transpose()?;
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    Ok(Slice { after, limit })
}

/// The cursor of a page that ends with `name`.
#[must_use]
pub fn cursor(name: &str) -> String {
    BASE64URL_NOPAD.encode(name.as_bytes())
}

fn read_cursor(cursor: &str) -> Result<String, RuleError> {
    let wrong = || RuleError::invalid("cursor", cursor, "give back `next` of the page before");
    let bytes = BASE64URL_NOPAD
        .decode(cursor.as_bytes())
        .map_err(|_e| wrong())?;
    let name = String::from_utf8(bytes).map_err(|_e| wrong())?;
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'/');
    if name.is_empty() || name.len() > 256 || !name.bytes().all(plain) {
        return Err(wrong());
    }
    Ok(name)
}

#[cfg(test)]
mod tests {
    use super::{cursor, slice};
    use spore_api::page::PageQuery;

    #[test]
    fn a_cursor_reads_back_and_nothing_else_does() {
        let query = |text: &str| PageQuery {
            cursor: Some(text.to_owned()),
            limit: None,
        };
        let read = slice(&query(&cursor("notes"))).unwrap();
        assert_eq!(read.after.as_deref(), Some("notes"));
        for text in [
            "",
            "%%",
            "AA",
            &cursor("a\u{0}b"),
            &cursor(&"x".repeat(300)),
        ] {
            assert!(slice(&query(text)).is_err(), "{text}");
        }
    }

    #[test]
    fn a_limit_out_of_range_is_refused() {
        for limit in [0, 501, u32::MAX] {
            let query = PageQuery {
                cursor: None,
                limit: Some(limit),
            };
            assert!(slice(&query).is_err(), "{limit}");
        }
    }
}
