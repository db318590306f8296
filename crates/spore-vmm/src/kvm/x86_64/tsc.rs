//! How a guest's TSC goes on in another VM: pure numbers.
//!
//! What a guest reads is `host's TSC × ratio + offset`. The ratio follows from the rates, and is 1
//! where they are the same. The offset is set so that the guest reads on from what it last could
//! have read; processors whose offsets were the same have the same again, which is how KVM, and the
//! guest, know that they may trust each other's.

/// How much two rates may differ and be taken for the same, in millionths: KVM's own measure
/// (`tsc_tolerance_ppm`). Each start of a host measures its TSC anew.
const TOLERANCE_PPM: u64 = 250;

/// A host whose TSC has another rate and cannot be scaled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the guest's TSC runs at {saved_khz} kHz and this host's at {host_khz} kHz, which this host \
     cannot scale"
)]
pub struct OtherRate {
    /// What the guest was saved with.
    pub saved_khz: u32,
    /// What a processor has here.
    pub host_khz: u32,
}

/// Whether a processor that has the host's rate is to be given the saved one.
pub fn rate(saved_khz: u32, host_khz: u32, can_scale: bool) -> Result<Option<u32>, OtherRate> {
    if saved_khz == host_khz {
        return Ok(None);
    }
    let apart = u64::from(saved_khz.abs_diff(host_khz));
    let is_near = apart * 1_000_000 <= u64::from(host_khz) * TOLERANCE_PPM;
    if can_scale || is_near {
        // For near ones too: KVM computes the guest's clock by it.
        return Ok(Some(saved_khz));
    }
    Err(OtherRate {
        saved_khz,
        host_khz,
    })
}

/// What a processor reads, and the offset by which it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reading {
    /// Its TSC.
    pub tsc: u64,
    /// What is added to the host's, scaled.
    pub offset: u64,
}

impl Reading {
    /// By how much all offsets are moved for a guest to go on from `saved`, on a processor that
    /// reads `self` now.
    #[must_use]
    pub const fn shift_to(self, saved: Self) -> u64 {
        let host = self.tsc.wrapping_sub(self.offset);
        let offset = saved.tsc.wrapping_sub(host);
        offset.wrapping_sub(saved.offset)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{OtherRate, Reading, rate};

    #[test]
    fn the_same_rate_is_left_and_another_is_set_or_refused_by_name() {
        assert_eq!(rate(2_000_000, 2_000_000, false), Ok(None));
        assert_eq!(rate(2_400_000, 2_000_000, true), Ok(Some(2_400_000)));
        let near = 2_000_000 + 500;
        assert_eq!(rate(near, 2_000_000, false), Ok(Some(near)));
        for saved_khz in [near + 1, 2_000_000 - 501, 0, u32::MAX] {
            let host_khz = 2_000_000;
            let error = rate(saved_khz, host_khz, false).unwrap_err();
            assert_eq!(
                error,
                OtherRate {
                    saved_khz,
                    host_khz
                }
            );
            let said = error.to_string();
            assert!(said.contains(&saved_khz.to_string()) && said.contains("2000000"));
        }
    }

    proptest! {
        #[test]
        fn a_guest_reads_on_from_where_it_was_and_its_processors_stay_as_they_were_to_each_other(
            saved in any::<u64>(),
            saved_offsets in prop::collection::vec(any::<u64>(), 1..4),
            host in any::<u64>(),
            offset in any::<u64>(),
            later in 0..1_u64 << 40,
        ) {
            let first = Reading { tsc: saved, offset: saved_offsets[0] };
            let here = Reading { tsc: host.wrapping_add(offset), offset };
            let shift = here.shift_to(first);
            let read = |saved_offset: u64| {
                let offset = saved_offset.wrapping_add(shift);
                host.wrapping_add(later).wrapping_add(offset)
            };
            prop_assert_eq!(read(first.offset), saved.wrapping_add(later));
            for saved_offset in saved_offsets {
                let apart = saved_offset.wrapping_sub(first.offset);
                prop_assert_eq!(read(saved_offset), read(first.offset).wrapping_add(apart));
            }
        }
    }
}
