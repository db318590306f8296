//! The one way in which a list answers: a page, and where the next begins.

use spore_api::page::PageQuery;

use super::Shared;
use super::error::Fault;
use crate::domain::page::{cursor, slice};
use crate::store::{Entry, Order, Range};

/// The entries under `prefix` that `query` asks for, and the cursor of the page behind them.
pub(super) async fn page(
    api: &Shared,
    query: &PageQuery,
    prefix: String,
    order: Order,
) -> Result<(Vec<Entry>, Option<String>), Fault> {
    let slice = slice(query)?;
    let behind = prefix.len();
    let range = Range {
        after: slice.after.map(|name| format!("{prefix}{name}")),
        prefix,
        // One more shows whether there is another page.
        limit: slice.limit + 1,
        order,
    };
    let mut entries = api.converge.inner.store.list(range).await?;
    let more = entries.len() > slice.limit;
    entries.truncate(slice.limit);
    let last = entries.last().filter(|_| more);
    let next = last.map(|entry| cursor(&entry.key[behind..]));
    Ok((entries, next))
}

/// The items that `query` asks for of a list which is there as a whole, in the order of their keys,
/// and the cursor of the page behind them.
pub(super) fn page_of<T>(
    query: &PageQuery,
    mut all: Vec<T>,
    key: impl Fn(&T) -> String,
) -> Result<(Vec<T>, Option<String>), Fault> {
    let slice = slice(query)?;
    all.sort_by_cached_key(&key);
    if let Some(after) = slice.after {
        all.retain(|item| key(item) > after);
    }
    let more = all.len() > slice.limit;
    all.truncate(slice.limit);
    let last = all.last().filter(|_| more);
    let next = last.map(|item| cursor(&key(item)));
    Ok((all, next))
}
