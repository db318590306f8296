//! Rules without IO: what is allowed, what follows from what.
//!
//! Used by the API and the reconcilers. Every refusal names the field, the value and what would be
//! right.

pub mod app;
pub mod egress;
pub mod image;
pub mod page;
pub mod release;

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

fn cut(value: &str) -> String {
    const SHOWN: usize = 80;
    let mut shown: String = value.chars().take(SHOWN).collect();
    if value.chars().count() > SHOWN {
        shown.push('…');
    }
    format!("`{shown}`")
}
