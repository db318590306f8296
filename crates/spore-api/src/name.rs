//! Names that people choose, validated once and typed ever after.

use core::fmt;
use core::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use utoipa::ToSchema;

/// Why a text is not a name: what it is for, the text, and what would be right.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{what} `{value}` is not allowed: {rule}")]
pub struct NameError {
    /// `app name`, `secret name` and so on.
    pub what: &'static str,
    /// What was given, cut at 80 characters.
    pub value: String,
    /// What would be right.
    pub rule: &'static str,
}

macro_rules! name {
    ($(#[$doc:meta])* $type:ident, $what:literal, $rule:literal, $check:path) => {
        $(#[$doc])*
        #[derive(
            Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema,
        )]
        #[serde(try_from = "String", into = "String")]
        #[schema(value_type = String)]
        pub struct $type(String);

        impl $type {
            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $type {
            type Err = NameError;

            fn from_str(text: &str) -> Result<Self, NameError> {
                if $check(text) {
                    return Ok(Self(text.to_owned()));
                }
                let value = text.chars().take(80).collect();
                Err(NameError { what: $what, value, rule: $rule })
            }
        }

        impl TryFrom<String> for $type {
            type Error = NameError;

            fn try_from(text: String) -> Result<Self, NameError> {
                text.parse()
            }
        }

        impl From<$type> for String {
            fn from(name: $type) -> Self {
                name.0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name! {
    /// An app's name; it becomes a label of its host name.
    AppName, "app name",
    "1 to 40 of a-z, 0-9 and -, beginning with a letter, not ending with -, without --",
    is_label
}

name! {
    /// An account's name; it becomes part of a label of a host name.
    AccountName, "account name",
    "1 to 40 of a-z, 0-9 and -, beginning with a letter, not ending with -, without --",
    is_label
}

name! {
    /// A secret's name; it becomes an environment variable or a file in `/run/secrets`.
    SecretName, "secret name",
    "1 to 64 of A-Z, a-z, 0-9 and _, not beginning with a digit; not PORT, HOME, PATH, TZ, LD_… \
     or SPORE_…",
    is_secret_name
}

name! {
    /// An image's name, such as `debian/python3`.
    ImageName, "image name",
    "one or two parts of 1 to 40 of a-z, 0-9, - and ., joined by /, each beginning with a letter \
     or digit",
    is_image_name
}

name! {
    /// A snapshot's name.
    TagName, "tag",
    "1 to 40 of a-z, 0-9 and -, beginning with a letter, not ending with -, without --, and not \
     26 of a-z and 2-7, as ids have",
    is_tag
}

name! {
    /// A sandbox's id: 128 random bits in base32.
    SandboxId, "sandbox id", "26 of a-z and 2-7 are expected: `spore sandbox ls` lists them", is_id
}

/// The platform's own account: everybody may fork its snapshots, and nobody has it.
pub const PUBLIC_ACCOUNT: &str = "public";

/// The account of a host with one user.
pub const DEFAULT_ACCOUNT: &str = "me";

impl AccountName {
    /// The account of a host with one user: `me`.
    #[must_use]
    pub fn default_account() -> Self {
        Self(DEFAULT_ACCOUNT.to_owned())
    }

    /// The platform's own account: `public`.
    #[must_use]
    pub fn public_account() -> Self {
        Self(PUBLIC_ACCOUNT.to_owned())
    }
}

/// The host name of `app` in `account` under `base`: `APP.BASE` for the default account,
/// `APP--ACCOUNT.BASE` for others, so that one wildcard certificate serves all.
#[must_use]
pub fn host_of(app: &AppName, account: &AccountName, base: &str) -> String {
    if account.as_str() == DEFAULT_ACCOUNT {
        format!("{app}.{base}")
    } else {
        format!("{app}--{account}.{base}")
    }
}

fn is_label(text: &str) -> bool {
    let bytes = text.as_bytes();
    (1..=40).contains(&bytes.len())
        && bytes[0].is_ascii_lowercase()
        && bytes
            .iter()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-')
        && !text.ends_with('-')
        && !text.contains("--")
}

fn is_tag(text: &str) -> bool {
    is_label(text) && !is_id(text)
}

fn is_id(text: &str) -> bool {
    text.len() == 26 && text.bytes().all(|b| matches!(b, b'a'..=b'z' | b'2'..=b'7'))
}

fn is_secret_name(text: &str) -> bool {
    let bytes = text.as_bytes();
    let upper = text.to_ascii_uppercase();
    (1..=64).contains(&bytes.len())
        && !bytes[0].is_ascii_digit()
        && bytes
            .iter()
            .all(|b| b.is_ascii_alphanumeric() || *b == b'_')
        && !["PORT", "HOME", "PATH", "TZ"].contains(&upper.as_str())
        && !upper.starts_with("LD_")
        && !upper.starts_with("SPORE_")
}

fn is_image_name(text: &str) -> bool {
    let part = |part: &str| {
        let bytes = part.as_bytes();
        (1..=40).contains(&bytes.len())
            && (bytes[0].is_ascii_lowercase() || bytes[0].is_ascii_digit())
            && bytes
                .iter()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'.'))
    };
    text.split('/').count() <= 2 && text.split('/').all(part)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{prop_assert, proptest};

    use super::{AccountName, AppName, ImageName, SandboxId, SecretName, TagName, host_of};

    #[test]
    fn names_that_would_be_misread_are_refused() {
        for text in [
            "", "a--b", "-a", "a-", "1a", "8080-x", "A", "a.b", "a/b", "..", "é", "a b",
        ] {
            assert!(text.parse::<AppName>().is_err(), "{text}");
        }
        assert!("a".repeat(41).parse::<AppName>().is_err());
        for text in [
            "LD_PRELOAD",
            "ld_preload",
            "SPORE_APP",
            "PORT",
            "1A",
            "A-B",
            "",
            "A=B",
        ] {
            assert!(text.parse::<SecretName>().is_err(), "{text}");
        }
        for text in [
            "../etc",
            "debian//x",
            "a/b/c",
            "/a",
            "a/",
            ".hidden",
            "Debian",
        ] {
            assert!(text.parse::<ImageName>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_tag_is_never_taken_for_an_id() {
        let id = "abcdefghijklmnopqrstuvwx27";
        id.parse::<SandboxId>().unwrap();
        assert!(id.parse::<TagName>().is_err());
        for text in [
            "",
            "abcdefghijklmnopqrstuvwx2",
            "abcdefghijklmnopqrstuvwx28",
            "../x",
        ] {
            assert!(text.parse::<SandboxId>().is_err(), "{text}");
        }
        for text in ["", "A", "a--b", "-a", "1a", "a/b", "..", "a b"] {
            assert!(text.parse::<TagName>().is_err(), "{text}");
        }
        "python3".parse::<TagName>().unwrap();
    }

    #[test]
    fn an_error_says_what_would_be_right() {
        let error = "My App".parse::<AppName>().unwrap_err().to_string();
        assert!(
            error.contains("`My App`") && error.contains("beginning with a letter"),
            "{error}"
        );
    }

    #[test]
    fn the_default_account_is_not_in_the_host() {
        let app = "notes".parse::<AppName>().unwrap();
        let me = AccountName::default_account();
        let you = "you".parse::<AccountName>().unwrap();
        assert_eq!(host_of(&app, &me, "localhost"), "notes.localhost");
        assert_eq!(host_of(&app, &you, "localhost"), "notes--you.localhost");
    }

    proptest! {
        #[test]
        fn a_host_is_one_label_before_its_base(text in "[a-z0-9-]{0,42}") {
            if let Ok(app) = text.parse::<AppName>() {
                let host = host_of(&app, &AccountName::default_account(), "localhost");
                prop_assert!(host.len() < 63 && host.split('.').count() == 2);
            }
        }
    }
}
