//! Rules without IO: what is allowed, what follows from what.
//!
//! Used by the API and the reconcilers. Every refusal names the field, the value and what would be
//! right.

pub mod app;
pub mod egress;
pub mod image;
pub mod page;
pub mod release;
pub mod snapshot;

/// Why a request is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RuleError {
    /// A value is outside its limits or contradicts another.
    #[error("`{field}` is {value}: {rule}")]
    Invalid {
        /// As in the request: `spec.port`.
        field: String,
        /// What was given, cut.
        value: String,
        /// What would be right.
        rule: String,
    },
    /// The value means something that this version does not do.
    #[error("`{field}` is {value}: not in this version; {instead}")]
    NotInThisVersion {
        /// As in the request.
        field: String,
        /// What was given, cut.
        value: String,
        /// What to do instead.
        instead: String,
    },
    /// The account may have no more bytes of images.
    #[error("{}", image_bytes(*used, *more, *most))]
    ImageBytes {
        /// What it has.
        used: u64,
        /// What it wants besides; `None` when that is not known yet.
        more: Option<u64>,
        /// What it may have.
        most: u64,
    },
    /// A quota of the account is used up.
    #[error("the account has {used} {what}, and at most {most} are allowed: remove some first")]
    Quota {
        /// What is counted.
        what: &'static str,
        /// How many there are.
        used: u64,
        /// How many there may be.
        most: u64,
    },
}

impl RuleError {
    /// A value that is wrong.
    pub fn invalid(
        field: impl Into<String>,
        value: impl core::fmt::Display,
        rule: impl Into<String>,
    ) -> Self {
        Self::Invalid {
            field: field.into(),
            value: cut(&value.to_string()),
            rule: rule.into(),
        }
    }

    fn not_yet(field: impl Into<String>, value: &str, instead: impl Into<String>) -> Self {
        Self::NotInThisVersion {
            field: field.into(),
            value: cut(value),
            instead: instead.into(),
        }
    }
}

fn image_bytes(used: u64, more: Option<u64>, most: u64) -> String {
    const MIB: u64 = 1024 * 1024;
    let (used, most) = (used.div_ceil(MIB), most / MIB);
    let more = match more {
        Some(more) => format!(", and this one takes {} MiB more", more.div_ceil(MIB)),
        None => ", and nothing is left".to_owned(),
    };
    format!(
        "the account's images, uploads and releases take {used} MiB of the {most} MiB that they \
         may have{more}: remove apps and images that are not needed, or raise `image_quota` in \
         /etc/spore/spore.toml"
    )
}

fn cut(value: &str) -> String {
    const SHOWN: usize = 80;
    let mut shown: String = value.chars().take(SHOWN).collect();
    if value.chars().count() > SHOWN {
        shown.push('…');
    }
    format!("`{shown}`")
}
