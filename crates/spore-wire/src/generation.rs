//! The one version number of every contract in this crate, and what each generation added.
//!
//! Read by both ends of every channel before anything else is said. A number is never used twice
//! and never goes down.
//!
//! | generation | added |
//! |---|---|
//! | 1 | the first: frames, thaw, app, exec, files, logs, gateway feed, egress blob |
//! | 2 | forks: freeze, unfreeze, thaw with a name, steps and hold; later secrets as a step |

/// What this build speaks.
pub const GENERATION: u32 = 2;

/// The oldest generation of an agent that this build still serves. An older agent is refused, and
/// its VM rebuilt from the image.
pub const GENERATION_OLDEST_SERVED: u32 = 1;

/// The oldest generation of an agent whose VM can be copied.
pub const GENERATION_FORKS: u32 = 2;

/// The oldest generation of a VMM that this build still serves: the first that there were.
pub const GENERATION_VMMS: u32 = 2;

/// Whether this build can serve a peer of `generation`.
#[must_use]
pub const fn is_served(generation: u32) -> bool {
    generation >= GENERATION_OLDEST_SERVED && generation <= GENERATION
}

/// Whether this build can serve a VMM of `generation`, such as one that an earlier daemon started.
#[must_use]
pub const fn is_vmm_served(generation: u32) -> bool {
    generation >= GENERATION_VMMS && generation <= GENERATION
}

#[cfg(test)]
mod tests {
    use super::{GENERATION, GENERATION_OLDEST_SERVED, GENERATION_VMMS, is_served, is_vmm_served};

    #[test]
    fn only_the_served_range_is_served() {
        assert!(is_served(GENERATION));
        assert!(is_served(GENERATION_OLDEST_SERVED));
        assert!(!is_served(GENERATION + 1));
        assert!(!is_served(GENERATION_OLDEST_SERVED - 1));
        assert!(is_vmm_served(GENERATION));
        assert!(is_vmm_served(GENERATION_VMMS));
        assert!(!is_vmm_served(GENERATION + 1));
        assert!(!is_vmm_served(GENERATION_VMMS - 1));
    }
}
