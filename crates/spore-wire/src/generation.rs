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

/// Whether this build can serve a peer of `generation`.
#[must_use]
pub const fn is_served(generation: u32) -> bool {
    generation >= GENERATION_OLDEST_SERVED && generation <= GENERATION
}

#[cfg(test)]
mod tests {
    use super::{GENERATION, GENERATION_OLDEST_SERVED, is_served};

    #[test]
    fn only_the_served_range_is_served() {
        assert!(is_served(GENERATION));
        assert!(is_served(GENERATION_OLDEST_SERVED));
        assert!(!is_served(GENERATION + 1));
        assert!(!is_served(GENERATION_OLDEST_SERVED - 1));
    }
}
