//! Names of requests, one each, for `X-Request-Id`.
//!
//! Called by `forward.rs`. Never a secret, and never a counter that a visitor could read the
//! traffic of others from.

use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use http::header::HeaderValue;
use spore_wire::id::TraceId;

/// Makes ids of 32 hexadecimal digits: 16 of this process, 16 of the request.
#[derive(Debug)]
pub(crate) struct RequestIds {
    process: [u8; 16],
    key: u64,
    next: AtomicU64,
}

impl RequestIds {
    pub(crate) fn new() -> Result<Self, getrandom::Error> {
        let mut bytes = [0_u8; 16];
        getrandom::fill(&mut bytes)?;
        let [a, b, c, d, e, f, g, h, ref key @ ..] = bytes;
        let mut process = [0; 16];
        write_hex(u64::from_le_bytes([a, b, c, d, e, f, g, h]), &mut process);
        Ok(Self {
            process,
            key: u64::from_le_bytes(*key),
            next: AtomicU64::new(0),
        })
    }

    pub(crate) fn next(&self) -> HeaderValue {
        let count = self.next.fetch_add(1, Ordering::Relaxed);
        let mut text = [0_u8; 32];
        let (process, request) = text.split_at_mut(16);
        process.copy_from_slice(&self.process);
        write_hex(scramble(count ^ self.key), request);
        HeaderValue::from_maybe_shared(Bytes::copy_from_slice(&text))
            .unwrap_or(HeaderValue::from_static("0"))
    }
}

/// The trace that a request's id names.
pub(crate) fn trace_of(id: &HeaderValue) -> Option<TraceId> {
    id.to_str().ok()?.parse().ok()
}

/// A bijection, so that no two requests share an id (the finaliser of SplitMix64).
const fn scramble(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

fn write_hex(value: u64, out: &mut [u8]) {
    for (digit, byte) in out.iter_mut().enumerate() {
        let nibble = (value >> (60 - 4 * digit)) & 0xf;
        *byte = b"0123456789abcdef"[usize::from(nibble.to_le_bytes()[0])];
    }
}

#[cfg(test)]
mod tests {
    use super::{RequestIds, trace_of};
    use std::collections::HashSet;

    #[test]
    fn no_two_requests_share_an_id() {
        let ids = RequestIds::new().unwrap();
        let names: HashSet<_> = (0..10_000)
            .map(|_| ids.next().to_str().unwrap().to_owned())
            .collect();
        assert_eq!(names.len(), 10_000);
        assert!(names.iter().all(|name| name.len() == 32));
        let id = ids.next();
        assert_eq!(trace_of(&id).unwrap().to_string(), id.to_str().unwrap());
    }
}
