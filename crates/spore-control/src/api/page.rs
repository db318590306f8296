//! The one way in which a list answers: a page of the store's entries and where the next begins.

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
